"""Export a model for other runtimes, as ONNX or `torch.export` graphs that are compared with the model first.

Graphs, all float32, for any numbers of images and locations (and rows and columns of a teacher's tokens):

    fold:  pixel_values                                -> trigger_column
    query: trigger_column, coordinates[, pixel_values] -> features[, rgb], pooled[, levels]
    model: pixel_values, coordinates                   -> the same in one call

`fold` is one small layer, so `fold` and `query` do what `model` does and hold the weights once. A query takes
`pixel_values` where `config.local_patch` is on. Where the teacher is not inside, `query` is alone.
"""

import copy
import json
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..modeling_apm import APMModel
from ..position_encoding import grid_coordinates
from ..runs.files import atomic_folder, write_atomically

logger = logging.get_logger(__name__)

OUTPUTS = {"features": "last_hidden_state", "rgb": "rgb", "pooled": "pooler_output", "levels": "levels"}
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
DESCRIPTION = "export.json"
TOLERANCE = 1e-4  # of an output's largest value
LOWEST_OPSET = 18  # torch converts down from it to graphs that do not load

Tensors = dict[str, Tensor]
Axes = dict[str, list[Any]]  # by name of a tensor: sizes, or the names of those that are free


def export_model(
    model: APMModel,
    output_dir: str | os.PathLike[str],
    *,
    image_processor: Any = None,
    format: str = "onnx",
    graphs: Sequence[str] | None = None,
    per_image: bool = False,
    opset: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write graphs, `export.json` about them, `config.json` and `preprocessor_config.json`; return their folder.

    Args:
        model: on any device, in any dtype; it is not changed.
        output_dir: new or empty; it appears complete or not at all.
        image_processor: what makes `pixel_values`; None writes no `preprocessor_config.json`.
        format: `"onnx"`, or `"torch"` for what `torch.export.load` reads.
        graphs: some of those above; None is `fold` and `query`, where the model has both.
        per_image: coordinates are `(B, L, 2)`, other places for each image, instead of `(L, 2)`.
        opset: of ONNX, 18 or later; None is the default of this version of torch.
        overwrite: files of a folder that is not empty may be replaced.

    Raises:
        ValueError: for a model that is no [`APMModel`], an unknown format, graph or opset, or a folder with files.
        ImportError: where ONNX's libraries are missing; says what to install.
        RuntimeError: for a graph whose outputs are not the model's; nothing is written.
    """
    if format not in SUFFIXES:
        raise ValueError(f"format: expected one of {sorted(SUFFIXES)}, got {format!r}")
    if not isinstance(model, APMModel):
        raise ValueError(f"model: expected an APMModel (a head's is its .apm), got {type(model).__name__}")
    source = model.config.trigger_source
    possible = ("fold", "query", "model") if model.folds else ("query",)
    graphs = possible[:2] if graphs is None else tuple(dict.fromkeys(graphs))
    if unknown := set(graphs) - set(possible):
        raise ValueError(f"graphs: expected some of {possible} with trigger_source={source!r}, got {sorted(unknown)}")
    description: dict[str, Any] = {"format": format, "graphs": {}}
    with atomic_folder(output_dir, overwrite=overwrite) as folder:
        for name in graphs:
            graph, path = _Graph(model, name, per_image), folder / f"{name}{SUFFIXES[format]}"
            error = _largest_error(graph, _write(graph, path, opset))
            facts = {"file": path.name, "inputs": graph.inputs, "outputs": graph.outputs}
            description["graphs"][name] = facts | {"largest_error": float(f"{error:.1e}")}
            logger.info(f"{path.name}: {', '.join(graph.inputs)} -> {', '.join(graph.outputs)}; error {error:.0e}")
        model.config.save_pretrained(folder)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
        write_atomically(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    return Path(output_dir)


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `export.json`: the file of every graph, its inputs and outputs with their axes, the largest error found."""
    return json.loads((Path(folder) / DESCRIPTION).read_text(encoding="utf-8"))


class _Graph(nn.Module):
    """Calls a model by names of tensors and returns plain dictionaries, which load where this package is missing."""

    def __init__(self, model: APMModel, name: str, per_image: bool):
        super().__init__()
        config, self.name = model.config, name
        self.model = copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)
        self.model.decoder.teacher_heads = nn.ModuleDict()
        if name == "fold":
            del self.model.decoder, self.model.pooler
        pixels: Axes = {"pixel_values": ["batch", config.num_channels, config.image_size, config.image_size]}
        places: Axes = {"coordinates": ["batch", "locations", 2] if per_image else ["locations", 2]}
        column: list[Any] = ["batch", config.trigger_width]
        if config.trigger_is_grid:
            column = ["batch", "rows", "cols", config.trigger_width]
            if self.model.folds:
                pixel_values = torch.zeros(1, config.num_channels, config.image_size, config.image_size)
                column = ["batch", *self.model.fold(pixel_values).shape[1:]]
        if name == "query":
            self.model.trigger = nn.Identity()
        query = {"trigger_column": column} | places | (pixels if config.local_patch else {})
        self.inputs = {"fold": pixels, "query": query, "model": pixels | places}[name]
        self.outputs: Axes = {}
        for output, tensor in self(**self.examples()).items():
            free = ["batch", "locations"] if tensor.ndim > 2 and name != "fold" else ["batch"]
            self.outputs[output] = free + list(tensor.shape[len(free) :])

    def forward(self, pixel_values=None, coordinates=None, trigger_column=None) -> Tensors:
        if self.name == "fold":
            return {"trigger_column": self.model.fold(pixel_values)}
        outputs = self.model(pixel_values, coordinates, trigger_column=trigger_column, return_dict=True)
        return {name: outputs[field] for name, field in OUTPUTS.items() if outputs.get(field) is not None}

    def examples(self, num_images: int = 2, num_locations: int = 5) -> Tensors:
        """Draw inputs, by default of sizes to trace: torch takes 0 and 1 for constants."""
        sizes = {"batch": num_images, "locations": num_locations, "rows": 4 + num_images, "cols": 6}
        generator = torch.Generator().manual_seed(0)
        shapes = {name: [sizes.get(axis, axis) for axis in axes] for name, axes in self.inputs.items()}
        return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _write(graph: _Graph, path: Path, opset: int | None) -> Callable[[Tensors], Tensors]:
    """Write one file, and return a function that runs it."""
    dims = {name: torch.export.Dim(name, min=1) for name in ("batch", "locations", "rows", "cols")}
    free = {
        name: {i: dims[axis] for i, axis in enumerate(axes) if axis in dims} for name, axes in graph.inputs.items()
    }
    if path.suffix == SUFFIXES["torch"]:
        program = torch.export.export(graph, (), graph.examples(), dynamic_shapes=free, strict=False)
        program.example_inputs = None  # they would be saved too
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        return lambda inputs: loaded(**inputs)
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('ONNX needs onnx, onnxscript and onnxruntime: pip install "apm_hf[export]"') from error
    options: dict[str, Any] = {"input_names": list(graph.inputs), "output_names": list(graph.outputs)}
    options |= {"opset_version": opset, "dynamo": True, "verbose": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's, about itself
        onnx = torch.onnx.export(graph, kwargs=graph.examples(), dynamic_shapes=free, **options)
    assert onnx is not None
    written = onnx.model.opset_imports[""]
    if opset not in (None, written) or written < LOWEST_OPSET:
        raise ValueError(f"opset: expected one that torch writes, from {LOWEST_OPSET} on, got {opset}")
    onnx.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(inputs: Tensors) -> Tensors:
        outputs = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        return dict(zip(graph.outputs, map(torch.from_numpy, outputs), strict=True))

    return run


def _largest_error(graph: _Graph, run: Callable[[Tensors], Tensors]) -> float:
    """Compare an exported file with the model on other sizes than it was traced with, and on the grid.

    Returns the largest error as a share of an output's largest value; one above `TOLERANCE` raises RuntimeError.
    """
    size, largest = graph.model.config.grid_size, 0.0
    grid = graph.examples(1, size**2)
    if "coordinates" in grid:
        grid["coordinates"] = grid_coordinates(size, size).view_as(grid["coordinates"])
    for inputs in (graph.examples(3, 7), graph.examples(1, 1), grid):
        # Without coordinates, the model computes its grid in another way.
        expected, outputs = graph(**inputs | {"coordinates": None} if inputs is grid else inputs), run(inputs)
        for name, values in expected.items():
            same = outputs[name].shape == values.shape
            error = float((outputs[name] - values).abs().max() / (values.abs().max() or 1)) if same else math.inf
            if not error <= TOLERANCE:
                raise RuntimeError(f"{graph.name}: {name}: expected the model's values, got an error of {error:.1e}")
            largest = max(largest, error)
    return largest


__all__ = ["export_model", "read_description"]
