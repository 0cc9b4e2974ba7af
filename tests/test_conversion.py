"""Checkpoints of the release's layout, written by a witness of either network, become models that answer as it does.

With the release's own widths, against what the release computes: test_release_parity.py.
"""

import logging
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from apm_hf import APMModel
from apm_hf.commands.main import main
from apm_hf.publishing.conversion import convert_checkpoint
from naive_apm import assert_close, naive_grid_coordinates, naive_position_code

PATCH, GRID = 4, 4  # 16 cells: trigger columns and position codes are 16 wide
FEATURE_SIZE = 16
HIDDEN = {"coco": (24, 20, 16, 12, 8), "ttt": (24, 20, 12)}
LAYERS = {"coco": ("fc1", "fc2", "fc3", "fc4", "fc5"), "ttt": ("fc1", "fc4", "fc5")}


class Witness(nn.Module):
    """Either network, written the slow way, with the release's names; `forward` takes one image `(3, S, S)`."""

    def __init__(self, kind: str, *, grid: int = GRID, position_size: int = 16):
        super().__init__()
        self.kind, self.grid, self.position_size = kind, grid, position_size
        query = grid**2 + position_size
        self.conv1 = nn.Conv2d(3, 1, PATCH, stride=PATCH)
        widths = [query, *HIDDEN[kind]]
        for name, inputs, outputs in zip(LAYERS[kind], widths, widths[1:], strict=False):
            self.add_module(name, nn.Linear(inputs, outputs))
        self.feat_proj_head = nn.Linear(widths[-1], FEATURE_SIZE)
        self.rgb_head_1 = nn.Linear(FEATURE_SIZE + query, 10)
        self.rgb_head_2 = nn.Linear(10, 6)
        self.rgb_head_3 = nn.Linear(6, 3)
        if kind == "ttt":
            self.little_query = nn.Parameter(torch.empty(FEATURE_SIZE))
            self.little_self_attention = nn.MultiheadAttention(FEATURE_SIZE, 8, batch_first=True)
            self.norm = nn.LayerNorm(widths[-1])
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.4, generator=generator)

    @torch.no_grad()
    def forward(self, image: Tensor) -> dict[str, Tensor]:
        trigger = self.conv1(image[None]).flatten()
        features, colours, inputs = [], [], []
        for y, x in naive_grid_coordinates(self.grid, self.grid):
            code = naive_position_code(y, x, self.grid, self.grid, self.position_size).float()
            query = hidden = torch.cat([trigger, code])
            for layer in LAYERS[self.kind]:
                hidden = getattr(self, layer)(hidden).relu()
            features.append(self.feat_proj_head(hidden))
            rgb = torch.cat([features[-1], query])
            for head in (self.rgb_head_1, self.rgb_head_2, self.rgb_head_3):
                rgb = head(rgb).relu()
            colours.append(rgb)
            inputs.append(features[-1] + naive_position_code(y, x, self.grid, self.grid, FEATURE_SIZE).float())
        pooled = torch.stack(features).mean(dim=0)
        if self.kind == "ttt":
            keys = torch.stack(inputs)[None]
            pooled = self.little_self_attention(self.little_query[None, None], keys, keys)[0][0, 0]
        return {"features": torch.stack(features), "rgb": torch.stack(colours), "pooled": pooled}


def checkpoint(kind: str, **options) -> dict[str, Tensor]:
    return dict(Witness(kind, **options).state_dict())


def assert_answers_as(witness: Witness, folder: Path) -> None:
    model, loading = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is APMModel and not any(loading.values())
    side = witness.grid * PATCH
    image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = model(image[None])
    expected = witness(image)
    assert_close(outputs.last_hidden_state[0], expected["features"])
    assert_close(outputs.rgb[0], expected["rgb"])
    assert_close(outputs.pooler_output[0], expected["pooled"])


def plain(state, path):
    torch.save(state, path)


def without_archive(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


def from_parallel_training(state, path):
    state = {f"module.{name}": nn.Parameter(tensor) for name, tensor in state.items()}
    torch.save({"epoch": 15, "state_dict": state, "optimizer": {"lr": 1e-4}}, path)


def wrapped_doubles(state, path):
    torch.save({"model": {name: tensor.double() for name, tensor in state.items()}}, path)


def safetensors(state, path):
    save_file(state, path)


@pytest.mark.parametrize("kind", ["coco", "ttt"])
@pytest.mark.parametrize("save", [plain, without_archive, from_parallel_training, wrapped_doubles, safetensors])
def test_a_checkpoint_becomes_a_model_that_answers_as_the_network_did(tmp_path, kind, save):
    path = tmp_path / ("weights.safetensors" if save is safetensors else "model_15.pth")
    save(checkpoint(kind), path)
    folder = convert_checkpoint(path, tmp_path / "converted")
    assert_answers_as(Witness(kind), folder)
    assert sorted(file.name for file in folder.iterdir() if file.suffix != ".py") == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert sorted(tmp_path.iterdir()) == sorted([path, folder])  # nothing else is left behind


def test_the_image_size_tells_trigger_column_and_position_code_apart(tmp_path):
    witness = Witness("ttt", grid=3, position_size=20)
    plain(witness.state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match="fc1.weight: .*image_size must be given.* got 29 columns"):
        convert_checkpoint(tmp_path / "model.pth", tmp_path / "converted")
    for wrong in (13, 0, 400):
        with pytest.raises(ValueError, match="image_size|position_size"):
            convert_checkpoint(tmp_path / "model.pth", tmp_path / "converted", image_size=wrong)
    assert not (tmp_path / "converted").exists()
    assert_answers_as(witness, convert_checkpoint(tmp_path / "model.pth", tmp_path / "converted", image_size=12))


@pytest.mark.parametrize("kind", ["coco", "ttt"])
def test_the_image_processor_shows_what_the_network_was_shown(tmp_path, kind):
    plain(checkpoint(kind), tmp_path / "model.pth")
    folder = convert_checkpoint(tmp_path / "model.pth", tmp_path / "converted")
    side = GRID * PATCH
    image = np.random.default_rng(0).integers(30, 200, (side, side, 3), dtype=np.uint8)
    shown = AutoImageProcessor.from_pretrained(folder)(Image.fromarray(image), return_tensors="pt")["pixel_values"]
    pixels = image.astype(np.float64)
    if kind == "coco":
        pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    else:
        pixels = (pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert_close(shown[0], torch.from_numpy(pixels[..., ::-1].copy()).permute(2, 0, 1))  # BGR


def test_layers_that_the_network_never_uses_are_left_out_and_named(tmp_path, caplog):
    plain(checkpoint("ttt"), tmp_path / "model.pth")
    with caplog.at_level(logging.INFO, logger="apm_hf"):
        convert_checkpoint(tmp_path / "model.pth", tmp_path / "converted")
    assert "norm.bias, norm.weight" in caplog.text


def test_narrow_floats_are_kept_to_the_bit(tmp_path):
    state = {name: tensor.bfloat16() for name, tensor in checkpoint("coco").items()}
    plain(state, tmp_path / "model.pth")
    model = AutoModel.from_pretrained(convert_checkpoint(tmp_path / "model.pth", tmp_path / "converted"))
    assert model.decoder.layers[0].weight.dtype == torch.float32
    assert torch.equal(model.decoder.layers[0].weight, state["fc2.weight"].float())


class Code:
    """Pickled, it would write a file when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def changed(kind: str, **changes: Tensor | None) -> dict[str, Tensor]:
    """A checkpoint with some of its tensors replaced, added or, by None, taken away; `__` stands for a dot."""
    state: dict = checkpoint(kind) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


NAN = torch.full((20, 24), 0.5).index_put((torch.tensor([3]), torch.tensor([4])), torch.tensor(torch.nan))
BAD = {
    "a tensor is missing": (changed("coco", fc2__bias=None), "coco network, got them without fc2.bias"),
    "a tensor is surplus": (changed("coco", fc6__bias=torch.ones(3)), "coco network, got them with fc6.bias"),
    "an attention is incomplete": (changed("ttt", little_query=None), "ttt network, got them without little_query"),
    "only the ttt network has a norm": (changed("coco", norm__bias=torch.ones(8)), "with norm.bias"),
    "another network's": (dict(nn.Linear(2, 2).state_dict()), "without conv1.bias, .* more and with bias, weight"),
    "a width does not fit": (
        changed("ttt", fc4__weight=torch.ones(20, 23)),
        r"fc4.weight: expected shape \(20, 24\), got \(20, 23\)",
    ),
    "a bias does not fit": (
        changed("ttt", little_self_attention__in_proj_bias=torch.ones(32)),
        r"in_proj_bias: expected shape \(48,\), got \(32,\)",
    ),
    "a kernel is not square": (
        changed("coco", conv1__weight=torch.ones(1, 3, 5, 4)),
        r"\(1, 3, 4, 4\), got \(1, 3, 5, 4\)",
    ),
    "an image has four channels": (changed("coco", conv1__weight=torch.ones(1, 4, 4, 4)), r"got \(1, 4, 4, 4\)"),
    "colours are four": (
        changed("coco", rgb_head_3__weight=torch.ones(4, 6)),
        r"rgb_head_3.weight: expected shape \(3, 6\), got \(4, 6\)",
    ),
    "a grid is not square": (
        changed("coco", fc1__weight=torch.ones(24, 30), rgb_head_1__weight=torch.ones(10, 46)),
        "fc1.weight: .* got 30 columns",
    ),
    "heads do not fit": (changed("ttt", feat_proj_head__weight=torch.ones(12, 12)), "divisor of feature_size=12"),
    "a layer is empty": (changed("coco", fc2__weight=torch.ones(0, 24)), "hidden_sizes: expected"),
    "a kernel is empty": (changed("coco", conv1__weight=torch.ones(0, 3, 4, 4)), "conv1.weight: expected a kernel"),
    "axes are missing": (changed("coco", fc1__weight=torch.ones(3)), r"fc1.weight: expected 2 axes, got shape \(3,\)"),
    "NaN": (changed("coco", fc2__weight=NAN), "fc2.weight: expected finite values, got 1 "),
    "infinite": (changed("coco", fc5__bias=torch.full((8,), torch.inf)), "fc5.bias: expected finite values, got 8 "),
    "integers": (changed("coco", fc2__bias=torch.ones(20, dtype=torch.int64)), "fc2.bias: expected dense floating"),
    "sparse": (changed("coco", fc2__weight=torch.ones(20, 24).to_sparse()), "fc2.weight: expected dense floating"),
    "a list": ([1, 2], "expected a state dict, .* got a list"),
    "no tensors": ({"epoch": 3}, "from names to tensors, got 'epoch': int"),
    "nothing": ({}, "from names to tensors, got nothing"),
    "a module": (nn.Linear(2, 2), "asks for torch.nn.modules.linear.Linear, .* nothing was executed"),
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch 2.14, of the time that may take
@pytest.mark.parametrize("what", BAD)
def test_anything_else_is_one_error_that_says_what_was_expected_and_came(tmp_path, what):
    content, message = BAD[what]
    path = tmp_path / "model.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message) as raised:
        convert_checkpoint(path, tmp_path / "converted")
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("archive", [True, False])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path, archive):
    path, written = tmp_path / "model.pth", tmp_path / "written"
    torch.save({"fc1.weight": Code(written)}, path, _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match="which could be any code: nothing was executed"):
        convert_checkpoint(path, tmp_path / "converted")
    assert not written.exists()
    pickle.loads(pickle.dumps(Code(written)))
    assert written.exists()  # the code is real


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_damaged_files_are_one_error(tmp_path, name):
    path = tmp_path / name
    (save_file if path.suffix == ".safetensors" else torch.save)(checkpoint("coco"), path)
    whole = path.read_bytes()
    for content in (b"", b"version https://git-lfs.github.com/spec/v1\n", whole[: len(whole) // 2], whole[:-9]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{path}: expected a state dict")) as raised:
            convert_checkpoint(path, tmp_path / "converted")
        assert "\n" not in str(raised.value) and "weights_only" not in str(raised.value)


def test_a_folder_that_is_not_empty_is_left_alone_unless_told(tmp_path):
    plain(checkpoint("coco"), tmp_path / "model.pth")
    folder = tmp_path / "converted"
    folder.mkdir()
    convert_checkpoint(tmp_path / "model.pth", folder)  # empty: taken
    (folder / "config.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    for place in (folder, tmp_path / "model.pth"):
        with pytest.raises(ValueError, match="output_dir: expected"):
            convert_checkpoint(tmp_path / "model.pth", place)
    assert (folder / "config.json").read_text() == "{}"
    convert_checkpoint(tmp_path / "model.pth", folder, overwrite=True)
    assert_answers_as(Witness("coco"), folder)
    assert (folder / "notes.txt").read_text() == "mine"


def test_the_command(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="apm_hf")
    plain(checkpoint("ttt"), tmp_path / "model.pth")
    arguments = ["convert", str(tmp_path / "model.pth"), str(tmp_path / "converted"), "--image_size", "16"]
    assert main(arguments) == 0
    assert_answers_as(Witness("ttt"), tmp_path / "converted")
    caplog.clear()
    assert main(arguments) == 1
    assert main(["convert", str(tmp_path / "nowhere.pth"), str(tmp_path / "other")]) == 1
    refused, missing = (record.getMessage() for record in caplog.records if record.levelname == "ERROR")
    assert refused.startswith("apm convert: output_dir: expected a new or an empty folder")
    assert "nowhere.pth" in missing
