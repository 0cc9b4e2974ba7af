"""The release's two networks, with weights anyone can re-create, against what the release computes for them.

`parity/release_outputs.npz` lies beside the checkout and holds the answers at 12 grid locations; without it these
tests skip. The checkpoints are written as the release's are and come in through `convert_checkpoint`. Tensor `name` of
`shape` is drawn by `draw(seed, name, shape)`.
"""

import hashlib
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel

from apm_hf import APMModel
from apm_hf.position_encoding import grid_coordinates
from apm_hf.publishing.conversion import convert_checkpoint

TOLERANCE = 1e-4  # on outputs of order 1

RGB = {"rgb_head_2.weight": (256, 256), "rgb_head_3.weight": (3, 256)}
COCO = {
    "conv1.weight": (1, 3, 14, 14),
    "fc1.weight": (4096, 2048),
    "fc2.weight": (4096, 4096),
    "fc3.weight": (4096, 4096),
    "fc4.weight": (2048, 4096),
    "fc5.weight": (1024, 2048),
    "feat_proj_head.weight": (1024, 1024),
    "rgb_head_1.weight": (256, 3072),
    **RGB,
}
TTT = {
    "conv1.weight": (1, 3, 14, 14),
    "fc1.weight": (4096, 2048),
    "fc4.weight": (2048, 4096),
    "fc5.weight": (1024, 2048),
    "feat_proj_head.weight": (768, 1024),
    "rgb_head_1.weight": (256, 2816),
    "little_self_attention.in_proj_weight": (2304, 768),
    "little_self_attention.out_proj.weight": (768, 768),
    "norm.weight": (1024,),
    **RGB,
}


def draw(seed: int, name: str, shape: tuple[int, ...]) -> Tensor:
    """The recipe: a stream of its own for each tensor; He's range for weights, 0.1 for one-dimensional tensors."""
    stream = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little")
    values = np.random.Generator(np.random.PCG64(stream)).standard_normal(shape, np.float32)
    scale = math.sqrt(2 / math.prod(shape[1:])) if len(shape) > 1 else 0.1
    return torch.from_numpy(values) * scale


def release_model(weight_shapes: dict[str, tuple[int, ...]], seed: int) -> APMModel:
    """A checkpoint with the release's names, as `torch.save` writes it, converted and loaded."""
    shapes = weight_shapes | {name.replace("weight", "bias"): shape[:1] for name, shape in weight_shapes.items()}
    if "norm.weight" in shapes:
        shapes["little_query"] = (768,)
    with tempfile.TemporaryDirectory() as folder:  # hundreds of megabytes, which pytest would keep
        path = Path(folder, "model_15.pth")
        torch.save({name: draw(seed, name, shape) for name, shape in shapes.items()}, path)
        return AutoModel.from_pretrained(convert_checkpoint(path, Path(folder, "converted")))


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


def test_converted_coco_network_answers_as_the_release(release, pixel_values):
    model = release_model(COCO, release["seed"].item())
    with torch.inference_mode():
        outputs = model(pixel_values, grid_coordinates(32, 32)[release["locations"]])
    assert_equal_to_the_release(outputs.last_hidden_state[0], release["coco_features"])
    assert_equal_to_the_release(outputs.rgb[0], release["coco_rgb"])


def test_converted_ttt_network_answers_as_the_release(release, pixel_values):
    model = release_model(TTT, release["seed"].item())
    with torch.inference_mode():
        outputs = model(pixel_values)
    assert_equal_to_the_release(outputs.last_hidden_state[0, release["locations"]], release["ttt_features"])
    assert_equal_to_the_release(outputs.rgb[0, release["locations"]], release["ttt_rgb"])
    assert_equal_to_the_release(outputs.pooler_output[0], release["ttt_pooled"])
