"""The release's two networks, with weights anyone can re-create, against what the release computes for them.

`parity/release_outputs.npz` lies beside the checkout and holds the answers at 12 grid locations; without it these
tests skip. Weight `name` of `shape` is drawn by `draw(seed, name, shape)`.
"""

import hashlib
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from apm_hf import APMConfig, APMModel
from apm_hf.position_encoding import grid_coordinates

TOLERANCE = 1e-4  # on outputs of order 1

# The release's names for our layers; every one of them has a weight and a bias.
COCO_LAYERS = {
    "conv1": "trigger",
    "fc1": "decoder.layers.0",
    "fc2": "decoder.layers.1",
    "fc3": "decoder.layers.2",
    "fc4": "decoder.layers.3",
    "fc5": "decoder.layers.4",
    "feat_proj_head": "decoder.feature_head",
    "rgb_head_1": "decoder.rgb_head.layers.0",
    "rgb_head_2": "decoder.rgb_head.layers.1",
    "rgb_head_3": "decoder.rgb_head.layers.2",
}
TTT_LAYERS = {
    **{name: COCO_LAYERS[name] for name in ("conv1", "feat_proj_head", "rgb_head_1", "rgb_head_2", "rgb_head_3")},
    "fc1": "decoder.layers.0",
    "fc4": "decoder.layers.1",
    "fc5": "decoder.layers.2",
    "little_self_attention.out_proj": "pooler.out_proj",
}


def draw(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """The recipe: a stream of its own for each tensor; He's range for weights, 0.1 for one-dimensional tensors."""
    stream = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    values = np.random.Generator(np.random.PCG64(stream)).standard_normal(shape, np.float32)
    scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
    return torch.from_numpy(values) * scale


def release_model(preset: str, layers: dict[str, str], seed: int) -> APMModel:
    """Our architecture with the release's weights under our names."""
    with torch.device("meta"):
        model = APMModel(APMConfig.preset(preset))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    weights = {}
    for theirs, ours in layers.items():
        for kind in ("weight", "bias"):
            weights[f"{ours}.{kind}"] = draw(seed, f"{theirs}.{kind}", shapes[f"{ours}.{kind}"])
    if model.pooler is not None:
        width = model.config.feature_size
        weights["pooler.query"] = draw(seed, "little_query", (width,))
        in_projection = {
            "weight": draw(seed, "little_self_attention.in_proj_weight", (3 * width, width)),
            "bias": draw(seed, "little_self_attention.in_proj_bias", (3 * width,)),
        }
        for kind, stacked in in_projection.items():
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), stacked.split(width), strict=True):
                weights[f"pooler.{projection}.{kind}"] = part.clone()
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


@pytest.fixture(scope="module")
def release(shared_dir):
    path = shared_dir / "parity" / "release_outputs.npz"
    if not path.exists():
        pytest.skip("no outputs of the release beside the checkout")
    with np.load(path) as arrays:
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.fixture(scope="module")
def pixel_values(release) -> Tensor:
    noise = np.random.Generator(np.random.PCG64(release["seed"].item())).random((1, 3, 16, 16), np.float32)
    image = F.interpolate(torch.from_numpy(noise), size=(448, 448), mode="bicubic", align_corners=False)
    return image.clamp(0, 1)


def assert_equal_to_the_release(actual: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 1
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


def test_coco_network_answers_as_the_release(release, pixel_values):
    model = release_model("dinov2-large", COCO_LAYERS, release["seed"].item())
    with torch.inference_mode():
        outputs = model(pixel_values, grid_coordinates(32, 32)[release["locations"]])
    assert_equal_to_the_release(outputs.last_hidden_state[0], release["coco_features"])
    assert_equal_to_the_release(outputs.rgb[0], release["coco_rgb"])


def test_ttt_network_answers_as_the_release(release, pixel_values):
    model = release_model("clip-ttt", TTT_LAYERS, release["seed"].item())
    with torch.inference_mode():
        outputs = model(pixel_values)
    assert_equal_to_the_release(outputs.last_hidden_state[0, release["locations"]], release["ttt_features"])
    assert_equal_to_the_release(outputs.rgb[0, release["locations"]], release["ttt_rgb"])
    assert_equal_to_the_release(outputs.pooler_output[0], release["ttt_pooled"])
