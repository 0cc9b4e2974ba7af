"""A machine for other runtimes: ONNX graphs and `torch.export` programs, compared with the model before they are kept.

Graphs, all float32, with free numbers of images and of locations:

    model: pixel_values, coordinates                   -> features, rgb, pooled, levels
    fold:  pixel_values                                -> trigger_column
    query: trigger_column, coordinates[, pixel_values] -> features, rgb, pooled, levels

`fold` once and `query` whenever a place is asked about is the point of the machine (arXiv:2410.20535, Fig. 1). A
machine with `trigger_source="embedding"` has a `query` alone: its trigger columns come from a teacher. `pixel_values`
go into a query where `config.local_patch` is on; `rgb` and `levels` come out where the machine has them.

A graph answers all its locations at once: whoever asks about very many asks in chunks, since locations do not see each
other. (`pooled` is over the locations of one call.)

Legend: B images (axis `batch`), L locations (axis `locations`), D trigger width, F feature width, N levels, S image
size; coordinates are (y, x) in [-1, 1].
"""

import copy
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .files import whole_folder, write_atomically
from .modeling_apm import APMModel
from .modeling_apm_decoder import APMQuery
from .modeling_apm_pooling import begin_pooling
from .position_encoding import grid_coordinates

logger = logging.getLogger(__name__)

GRAPHS = ("model", "fold", "query")
SUFFIXES = {"onnx": ".onnx", "torch": ".pt2"}
DESCRIPTION = "export.json"
TOLERANCE = 1e-4  # of the largest value that is expected
LOWEST_OPSET = 18  # what torch's exporter writes; the conversion down from it yields graphs that no runtime loads
PROTOBUF_BYTES = 2**31 - 2**24  # beyond them, weights lie in a file beside the ONNX graph

Arrays = dict[str, np.ndarray]
Shapes = dict[str, list[str | int]]  # by name, in order, the axes: free ones by name


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
    """A folder with graphs, `export.json` about them, `config.json`, and the image processor where one is given.

    Args:
        model: on any device, in any dtype; it is not changed.
        output_dir: new or empty; it appears whole or not at all.
        image_processor: what makes `pixel_values`; saved as `preprocessor_config.json`.
        format: `"onnx"`, or `"torch"` for what `torch.export.load` reads.
        graphs: some of `GRAPHS`; None is all that the machine has.
        per_image: coordinates are `(B, L, 2)`, each image's own places, instead of `(L, 2)`, the same for all.
        opset: of ONNX, 18 or later; None is the one that this version of torch writes.
        overwrite: files of a folder that is not empty may be replaced.

    Returns:
        `output_dir`.

    Raises:
        ValueError: for a model that is no [`APMModel`], an unknown graph, or a folder that is not empty.
        ImportError: where ONNX's libraries are missing; says what to install.
        RuntimeError: for a graph that does not answer as the model does; nothing is written.
    """
    if format not in SUFFIXES:
        raise ValueError(f"format: expected one of {sorted(SUFFIXES)}, got {format!r}")
    _check_model(model)
    description: dict[str, Any] = {"format": format, "graphs": {}}
    with whole_folder(output_dir, overwrite=overwrite) as folder:
        for graph in dict.fromkeys(available_graphs(model) if graphs is None else graphs):
            path = folder / f"{graph}{SUFFIXES[format]}"
            if format == "onnx":
                error = export_onnx(model, path, graph, per_image=per_image, opset=opset)
            else:
                error = export_program(model, path, graph, per_image=per_image)
            inputs, outputs = graph_shapes(model, graph, per_image=per_image)
            description["graphs"][graph] = {
                "file": path.name,
                "inputs": inputs,
                "outputs": outputs,
                "largest_error": float(f"{error:.1e}"),
            }
            logger.info(f"{path.name}: {', '.join(inputs)} -> {', '.join(outputs)}; largest error {error:.0e}")
        model.config.save_pretrained(folder)
        if image_processor is not None:
            image_processor.save_pretrained(folder)
        write_atomically(folder / DESCRIPTION, json.dumps(description, indent=2) + "\n")
    return Path(output_dir)


def read_description(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`export.json` of a folder: by graph its file, inputs and outputs with their axes, the largest error found."""
    return json.loads((Path(folder) / DESCRIPTION).read_text(encoding="utf-8"))


def export_onnx(
    model: APMModel,
    path: str | os.PathLike[str],
    graph: str = "model",
    *,
    per_image: bool = False,
    opset: int | None = None,
) -> float:
    """Write one graph as ONNX, run it with onnxruntime on another batch and other places, and compare.

    Args:
        model, graph, per_image, opset: as in [`export_model`].
        path: the file to write; beyond 2 GB its weights lie beside it.

    Returns:
        The largest error found, as a share of the largest value expected.

    Raises:
        ValueError, ImportError: as [`export_model`].
        RuntimeError: for a graph that does not answer as the model does; the file is then good for nothing.
    """
    onnxruntime = _load_onnxruntime()
    if opset is not None and opset < LOWEST_OPSET:
        raise ValueError(f"opset: expected {LOWEST_OPSET} or later, got {opset}")
    model = _plain(model)
    inputs, outputs = graph_shapes(model, graph, per_image=per_image)
    program = _trace(model, graph, per_image)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    with _quiet_torch():
        written = torch.onnx.export(
            program,
            dynamo=True,
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=opset,
            dynamic_shapes=_dynamic_shapes(inputs, lambda name: name),
            verbose=False,
        )
    assert written is not None
    version = written.model.opset_imports[""]
    if opset not in (None, version):
        raise ValueError(f"opset: expected a version that torch can write, e.g. {version}, got {opset}")
    written.save(os.fspath(path), external_data=weights > PROTOBUF_BYTES)
    session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
    return _compare(model, graph, per_image, lambda arrays: dict(zip(outputs, session.run(None, arrays), strict=True)))


def export_program(
    model: APMModel, path: str | os.PathLike[str], graph: str = "model", *, per_image: bool = False
) -> float:
    """Write one graph with `torch.export.save`, load it again, and compare; arguments as in [`export_onnx`].

    `torch.export.load(path).module()` takes the inputs in order and returns the outputs by name.

    Raises:
        ValueError, RuntimeError: as in [`export_onnx`].
    """
    model = _plain(model)
    traced = _trace(model, graph, per_image)
    traced.example_inputs = None  # images, which would be saved too
    torch.export.save(traced, path)
    program = torch.export.load(path).module()

    def run(arrays: Arrays) -> Arrays:
        with torch.no_grad():
            answers = program(*map(torch.from_numpy, arrays.values()))
        return {name: values.numpy() for name, values in answers.items()}

    return _compare(model, graph, per_image, run)


def available_graphs(model: APMModel) -> tuple[str, ...]:
    """Which of `GRAPHS` a machine has."""
    return GRAPHS if model.config.trigger_source == "conv" else ("query",)


def graph_shapes(model: APMModel, graph: str, *, per_image: bool = False) -> tuple[Shapes, Shapes]:
    """Inputs and outputs of a graph, in order: by name their axes, free ones by name.

    Raises:
        ValueError: for a graph that the machine does not have.
    """
    if graph not in available_graphs(model):
        raise ValueError(
            f"graphs: expected some of {list(available_graphs(model))} for a machine with "
            f"trigger_source={model.config.trigger_source!r}, got {graph!r}"
        )
    config = model.config
    pixels: Shapes = {"pixel_values": ["batch", config.num_channels, config.image_size, config.image_size]}
    column: Shapes = {"trigger_column": ["batch", config.trigger_width]}
    if graph == "fold":
        return pixels, column
    places: Shapes = {"coordinates": [*(["batch"] if per_image else []), "locations", 2]}
    if graph == "model":
        inputs = pixels | places
    else:
        inputs = column | places | (pixels if config.local_patch else {})
    outputs: Shapes = {"features": ["batch", "locations", config.feature_size]}
    if config.use_rgb_head:
        outputs["rgb"] = ["batch", "locations", 3]
    outputs["pooled"] = ["batch", config.feature_size]
    if config.num_levels:
        outputs["levels"] = ["batch", "locations", config.num_levels, config.level_width]
    return inputs, outputs


class _Fold(nn.Module):
    """What is traced for `fold`: the one layer it takes."""

    def __init__(self, model: APMModel):
        super().__init__()
        self.trigger = model.trigger

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {"trigger_column": self.trigger(pixel_values).flatten(1)}  # (B, T, rows, cols) -> (B, D)


class _Query(nn.Module):
    """What is traced else: the model's layers, without its checks of sizes and its chunks, which would fix them."""

    def __init__(self, model: APMModel, inputs: Sequence[str], outputs: Sequence[str]):
        super().__init__()
        self.model, self.inputs, self.outputs = model, list(inputs), list(outputs)

    def forward(self, *tensors: Tensor) -> dict[str, Tensor]:
        given = dict(zip(self.inputs, tensors, strict=True))
        model, coordinates = self.model, given["coordinates"]
        column = given["trigger_column"] if "trigger_column" in given else model.fold(given["pixel_values"])
        query = APMQuery(
            trigger_column=column,
            grid_size=model.config.grid_size,
            pixel_values=given["pixel_values"] if model.config.local_patch else None,
            coordinates=coordinates if coordinates.ndim == 3 else coordinates[None],  # (L, 2) -> (1, L, 2)
        )
        answer = model.decoder(query, output_hidden_states=False)
        features, pooling = answer["last_hidden_state"], begin_pooling(model.pooler)
        pooling.add(features, query.locations())
        pooled, space = pooling.result(column.dtype), model.feature_space
        if space is not None:  # from the standardised space to the teacher's own
            features, pooled = space(features), space(pooled)
        answer |= {"features": features, "pooled": pooled}
        return {name: answer[name] for name in self.outputs}


def _trace(model: APMModel, graph: str, per_image: bool) -> Any:
    inputs, outputs = graph_shapes(model, graph, per_image=per_image)
    # Sizes above 1: torch takes 0 and 1 for constants.
    examples = _examples(model, inputs, 2, 5)
    dims = {name: torch.export.Dim(name, min=1) for name in ("batch", "locations")}
    shapes = _dynamic_shapes(inputs, dims.__getitem__)
    with torch.no_grad():
        if graph == "fold":
            return torch.export.export(_Fold(model), examples, dynamic_shapes=shapes)
        traced = _Query(model, list(inputs), list(outputs))
        return torch.export.export(traced, examples, dynamic_shapes=(shapes,))  # `*tensors` is one argument


def _dynamic_shapes(shapes: Shapes, named: Callable[[str], Any]) -> tuple[dict[int, Any], ...]:
    """Per input, its free axes."""
    return tuple({i: named(axis) for i, axis in enumerate(axes) if isinstance(axis, str)} for axes in shapes.values())


def _examples(model: APMModel, shapes: Shapes, batch_size: int, num_locations: int) -> tuple[Tensor, ...]:
    """Images and columns of unit variance, places within and around the image."""
    generator = torch.Generator().manual_seed(batch_size)
    sizes = {"batch": batch_size, "locations": num_locations}
    drawn = {}
    for name, axes in shapes.items():
        shape = [sizes[axis] if isinstance(axis, str) else axis for axis in axes]
        drawn[name] = torch.randn(shape, generator=generator) * (0.6 if name == "coordinates" else 1)
    if "trigger_column" in shapes and model.config.trigger_source == "conv":
        shape = [batch_size, model.config.num_channels, model.config.image_size, model.config.image_size]
        with torch.no_grad():
            drawn["trigger_column"] = model.fold(drawn.get("pixel_values", torch.randn(shape, generator=generator)))
    return tuple(drawn.values())


def _compare(model: APMModel, graph: str, per_image: bool, run: Callable[[Arrays], Arrays]) -> float:
    """The largest error beside the model itself, of other numbers of images and places, and of the whole grid."""
    inputs, _ = graph_shapes(model, graph, per_image=per_image)
    size = model.config.grid_size
    largest = 0.0
    for batch_size, num_locations in ((3, 7), (1, size**2)):
        given = dict(zip(inputs, _examples(model, inputs, batch_size, num_locations), strict=True))
        asked = given.get("coordinates")
        if batch_size == 1 and asked is not None:  # where the model itself takes another way
            given["coordinates"], asked = grid_coordinates(size, size).view_as(asked), None
        with torch.no_grad():
            expected = _expected(model, graph, given, asked)
        answers = run({name: tensor.contiguous().numpy() for name, tensor in given.items()})
        for name, values in answers.items():
            wanted = expected[name].numpy()
            if values.shape != wanted.shape:
                raise RuntimeError(f"{graph}: {name}: expected shape {wanted.shape}, got {values.shape}")
            error = np.abs(values - wanted).max() / (np.abs(wanted).max() or 1.0)
            if not error <= TOLERANCE:
                raise RuntimeError(
                    f"{graph}: {name}: expected the model's values to {TOLERANCE:.0e} of the largest, got an error of "
                    f"{error:.1e} with {batch_size} images and {num_locations} places"
                )
            largest = max(largest, float(error))
    return largest


def _expected(model: APMModel, graph: str, given: dict[str, Tensor], coordinates: Tensor | None) -> dict[str, Tensor]:
    if graph == "fold":
        return {"trigger_column": model.fold(given["pixel_values"])}
    outputs = model(given.get("pixel_values"), coordinates, trigger_column=given.get("trigger_column"))
    answers = {"features": outputs.last_hidden_state, "rgb": outputs.rgb, "pooled": outputs.pooler_output}
    return {name: values for name, values in (answers | {"levels": outputs.levels}).items() if values is not None}


def _plain(model: APMModel) -> APMModel:
    """A copy on the CPU, in float32, that does not train."""
    _check_model(model)
    return copy.deepcopy(model).to("cpu", torch.float32).eval()


def _check_model(model: Any) -> None:
    if not isinstance(model, APMModel):
        raise ValueError(f"model: expected an APMModel (of a model with a head, its .apm), got {type(model).__name__}")


def _load_onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError('ONNX needs onnx, onnxscript and onnxruntime: pip install "apm_hf[export]"') from error
    return onnxruntime


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Without what the exporter says of itself: deprecations in its own code, that torchvision is missing, and what it
    does not compute in advance."""
    names = ("torch.onnx._internal.exporter._registration", "onnxscript.optimizer._constant_folding")
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        # Two inputs with the same free axis, as is meant.
        warnings.filterwarnings("ignore", message=".*axis name: .* will not be used", category=UserWarning)
        try:
            for noisy in levels:
                noisy.setLevel(logging.ERROR)
            yield
        finally:
            for noisy, level in levels.items():
                noisy.setLevel(level)


__all__ = ["available_graphs", "export_model", "export_onnx", "export_program", "graph_shapes", "read_description"]
