"""Exported graphs compute what the model computes, for any number of images and locations, without this package."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from apm_hf import APMForImageClassification, APMImageProcessor, APMModel
from apm_hf.commands.main import main
from apm_hf.publishing.export import export_model, read_description
from fixtures_runs import forked, status_of
from naive_apm import COLUMNS, assert_close, random_coordinates, small_config, small_images, small_model

# Every module that a graph may hold, in three models; `rich` takes the same coordinates for all images.
RICH = {
    "local_patch": True,
    "local_patch_scales": [1, 2],
    "pooling": "attention",
    "num_levels": 2,
    "level_size": 6,
    "hidden_sizes": [24],
    "rgb_hidden_sizes": [8],
}
EMBEDDING = {"trigger_source": "embedding", "use_rgb_head": False}

OUTSIDE = """
import sys
import numpy as np
import onnxruntime

cases = np.load("cases.npz")
outputs = {}
for case in sorted({name.partition(" ")[0] for name in cases}):
    path = case.partition("@")[0]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = {i.name: cases[f"{case} {i.name}"] for i in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]
    outputs |= {f"{case} {name}": value for name, value in zip(names, session.run(names, given))}
np.savez("outputs.npz", **outputs)
assert not {"torch", "apm_hf", "transformers"} & set(sys.modules)
"""


def outputs_of(model: APMModel, pixels: Tensor | None, places: Tensor, column: Tensor | None = None) -> dict:
    with torch.no_grad():
        outputs = model(pixels, places, trigger_column=column)
    return {
        "features": outputs.last_hidden_state,
        "rgb": outputs.rgb,
        "pooled": outputs.pooler_output,
        "levels": outputs.levels,
    }


def rich_model() -> APMModel:
    return small_model(**RICH)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders of graphs: `rich` through the command, `plain` and `embedding` through the library."""
    folder = tmp_path_factory.mktemp("exported")
    rich_model().save_pretrained(folder / "apm")
    APMImageProcessor(size={"height": 12, "width": 12}).save_pretrained(folder / "apm")
    assert main(["export", str(folder / "apm"), str(folder / "rich")]) == 0
    export_model(small_model(), folder / "plain", graphs=["model"], per_image=True)
    narrow = small_model(**EMBEDDING).bfloat16().train()
    export_model(narrow, folder / "embedding", opset=20)
    assert narrow.dtype == torch.bfloat16 and narrow.training  # the model is left as it was
    return folder


def run_alone(code: str, folder: Path, environment: dict[str, str]) -> None:
    """Run code in a process that looks neither at the current folder nor at PYTHONPATH."""
    command = [sys.executable, "-I", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def test_onnx_graphs_are_the_model_without_torch_and_without_this_package(exported, environment):
    cases, expected = {}, {}

    def add(case: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor | None]) -> None:
        cases.update({f"{case} {name}": tensor.numpy() for name, tensor in inputs.items()})
        expected.update({f"{case} {name}": tensor for name, tensor in outputs.items() if tensor is not None})

    rich, plain = rich_model(), small_model()
    embedding = small_model(**EMBEDDING).bfloat16().float()
    for size, (batch_size, num_locations) in enumerate([(1, 1), (4, 11), (2, 64)]):
        pixels = small_images(batch_size, seed=size)
        with torch.no_grad():
            column = rich.fold(pixels)
        add(f"rich/fold.onnx@{size}", {"pixel_values": pixels}, {"trigger_column": column})
        places = random_coordinates(num_locations, seed=size, reach=1.3)
        given = {"trigger_column": column, "coordinates": places, "pixel_values": pixels}
        add(f"rich/query.onnx@{size}", given, outputs_of(rich, pixels, places))
        given = {"trigger_column": torch.randn(batch_size, 16), "coordinates": places}
        add(f"embedding/query.onnx@{size}", given, outputs_of(embedding, None, places, given["trigger_column"]))
        places = random_coordinates(batch_size, num_locations, seed=size)
        given = {"pixel_values": pixels, "coordinates": places}
        add(f"plain/model.onnx@{size}", given, outputs_of(plain, pixels, places))
    np.savez(exported / "cases.npz", **cases)
    run_alone(OUTSIDE, exported, environment)
    with np.load(exported / "outputs.npz") as outputs:
        assert sorted(outputs) == sorted(expected)
        for name, values in outputs.items():
            assert_close(torch.from_numpy(values), expected[name])


def test_the_description_names_inputs_and_outputs_with_their_axes(exported):
    import onnx
    import onnxruntime

    assert sorted(path.name for path in (exported / "rich").iterdir() if path.suffix != ".py") == [
        "config.json",
        "export.json",
        "fold.onnx",
        "preprocessor_config.json",
        "query.onnx",
    ]
    query = read_description(exported / "rich")["graphs"]["query"]
    assert query["inputs"] == {
        "trigger_column": ["batch", 18],
        "coordinates": ["locations", 2],
        "pixel_values": ["batch", 3, 12, 12],
    }
    assert query["outputs"]["levels"] == ["batch", "locations", 2, 6]
    for folder in ("rich", "plain", "embedding"):
        description = read_description(exported / folder)
        assert description["format"] == "onnx" and len(description["graphs"]) == (2 if folder == "rich" else 1)
        for graph in description["graphs"].values():
            session = onnxruntime.InferenceSession(exported / folder / graph["file"])
            assert {i.name: i.shape for i in session.get_inputs()} == graph["inputs"]
            assert {o.name: o.shape for o in session.get_outputs()} == graph["outputs"]
            assert 0 < graph["largest_error"] < 1e-5
    opsets = onnx.load(exported / "embedding" / "query.onnx").opset_import
    assert [opset.version for opset in opsets if not opset.domain] == [20]


def test_torch_graphs_are_the_model_without_this_package(tmp_path):
    model = small_model(teacher_heads={"other": {"feature_size": 64}})
    export_model(model, tmp_path / "out", format="torch", graphs=["model", "fold", "query"])
    sizes = {path.stem: path.stat().st_size for path in (tmp_path / "out").glob("*.pt2")}
    used = sum(p.nbytes for name, p in model.named_parameters() if ".teacher_heads." not in name)
    assert sizes["fold"] < used < min(sizes["query"], sizes["model"])  # a fold needs no other layers
    program = torch.export.load(tmp_path / "out" / "model.pt2")
    assert not any("teacher_heads" in name for name in program.state_dict)
    for batch_size, num_locations in [(1, 1), (4, 11)]:
        pixels, places = small_images(batch_size), random_coordinates(num_locations)
        expected = outputs_of(model, pixels, places)
        outputs = program.module()(coordinates=places, pixel_values=pixels)
        assert list(outputs) == ["features", "rgb", "pooled"]
        for name, values in outputs.items():
            assert_close(values, expected[name])

    def without_the_package():
        for name in list(sys.modules):
            if name.partition(".")[0] in ("apm_hf", "transformers"):
                sys.modules[name] = None  # any import of it fails
        fold, query = (torch.export.load(tmp_path / "out" / f"{name}.pt2").module() for name in ("fold", "query"))
        outputs = query(coordinates=places, **fold(pixel_values=pixels))
        torch.save(outputs, tmp_path / "out" / "outputs.pt")

    assert status_of(forked(without_the_package)) == 0
    for name, values in torch.load(tmp_path / "out" / "outputs.pt").items():
        assert_close(values, expected[name])


@pytest.mark.parametrize("wrong", [1e-3, torch.nan])
def test_a_graph_that_is_not_the_model_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, wrong):
    fold = APMModel.fold
    monkeypatch.setattr(APMModel, "fold", lambda *args: fold(*args) * (1 + wrong * torch.compiler.is_compiling()))
    with pytest.raises(RuntimeError, match="fold: trigger_column: expected the model's values, got an error of "):
        export_model(small_model(), tmp_path / "out", format="torch", graphs=["fold"])
    assert not list(tmp_path.iterdir())


def test_local_columns_are_exported_in_one_graph_and_in_two(tmp_path):
    model = small_model(**COLUMNS, local_patch=True)
    graphs = ["fold", "query", "model"]
    export_model(model, tmp_path / "out", format="torch", graphs=graphs)  # compares them with the model
    inputs = read_description(tmp_path / "out")["graphs"]["query"]["inputs"]
    assert inputs["trigger_column"] == ["batch", 3, 3, 16]


def test_a_graph_that_differs_on_the_grid_alone_is_an_error(tmp_path, monkeypatch):
    forward = APMModel.forward

    def shifted(self, pixel_values=None, coordinates=None, **options):
        outputs = forward(self, pixel_values, coordinates, **options)
        outputs.pooler_output = outputs.pooler_output + (0.1 if coordinates is None else 0)
        return outputs

    monkeypatch.setattr(APMModel, "forward", shifted)
    with pytest.raises(RuntimeError, match="query: pooled: expected the model's values, got an error of "):
        export_model(small_model(), tmp_path / "out", format="torch", graphs=["query"])


def test_what_cannot_be_exported_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    out = tmp_path / "out"
    cases = [
        (small_model(**EMBEDDING), {"graphs": ["fold"]}, r"trigger_source='embedding', got \['fold'\]"),
        (small_model(), {"graphs": ["query", "unfold"]}, r"graphs: expected some of .*, got \['unfold'\]"),
        (small_model(), {"format": "tflite"}, "format: expected one of"),
        (small_model(), {"graphs": ["fold"], "opset": 17}, "opset: expected one that torch writes, .*, got 17"),
        (small_model(), {"graphs": ["fold"], "opset": 99}, "opset: expected one that torch writes, .*, got 99"),
        (APMForImageClassification(small_config()), {}, "expected an APMModel .* got APMForImageClassification"),
    ]
    for model, options, message in cases:
        with pytest.raises(ValueError, match=message):
            export_model(model, out, **options)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'pip install "apm_hf\[export\]"'):
        export_model(small_model(), out)
    assert not list(tmp_path.iterdir())


def test_the_command_refuses_in_one_line(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="apm_hf")
    small_model().save_pretrained(tmp_path / "apm")
    APMImageProcessor().save_pretrained(tmp_path / "apm")
    assert main(["export", str(tmp_path / "apm"), str(tmp_path / "apm"), "--graphs", "fold"]) == 1
    assert main(["export", str(tmp_path / "apm"), str(tmp_path / "out"), "--graphs", "grid"]) == 1
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(lines) == 2 and lines[0].startswith("apm export: output_dir: expected a new or an empty folder")
    assert "'grid'" in lines[1] and not (tmp_path / "out").exists()
    assert "export.json" not in json.dumps([path.name for path in (tmp_path / "apm").iterdir()])
