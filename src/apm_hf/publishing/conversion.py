"""Convert checkpoints of the authors' release to model folders.

The release has two networks, which differ in the names of their tensors (both as observed; its source was not read):

* `coco`, the grid-distilled one (`model_15.pth`, our preset `dinov2-large`): fc1 to fc5, mean pooling. Its inputs are
  images in BGR order, each scaled to [0, 1] by its own minimum and maximum.
* `ttt`, the test-time-training one (our preset `clip-ttt`): fc1, fc4, fc5, and an attention pooling of 8 heads with a
  learned query. Its inputs are images with ImageNet's mean and standard deviation, as the paper says, in BGR order.

Widths come from the shapes. They do not say where fc1's columns pass from the trigger column to the position
code: in the release both are 1024 wide, so halves are assumed unless the image's size is given.

Legend: T trigger channels, D trigger width, P position width, F feature width, n rows and columns of the grid.
"""

import math
import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers.utils import logging

from ..configuration_apm import PRESETS, APMConfig
from ..image_processing_apm import APMImageProcessor
from ..modeling_apm import APMModel
from ..runs.files import atomic_folder

logger = logging.get_logger(__name__)

POOLING_NUM_HEADS = 8  # the release's; shapes do not say
SHOWN_PROBLEMS = 6  # in one message


@dataclass(frozen=True)
class ReleaseNetwork:
    """One of the release's networks.

    Args:
        preset: our architecture with its widths.
        layers: its MLP's layers, in order.
        image_options: of the image processor that prepares its inputs.
    """

    preset: str
    layers: tuple[str, ...]
    image_options: dict[str, Any] = field(default_factory=dict)

    @property
    def has_attention(self) -> bool:
        """Return whether the network pools by attention."""
        return PRESETS[self.preset]["pooling"] == "attention"

    def modules(self) -> dict[str, str]:
        """Map its names of layers with a weight and a bias to ours; `rename_tensors` splits the two queries."""
        names = {"conv1": "trigger", "feat_proj_head": "decoder.feature_head"}
        names |= {self.layers[0]: "decoder.query", "rgb_head_1": "decoder.rgb_head.query"}
        names |= {layer: f"decoder.layers.{index}" for index, layer in enumerate(self.layers[1:])}
        names |= {f"rgb_head_{index + 2}": f"decoder.rgb_head.layers.{index}" for index in range(2)}
        return names | ({"little_self_attention.out_proj": "pooler.out_proj"} if self.has_attention else {})

    def tensor_names(self) -> set[str]:
        """Return its names of tensors."""
        names = {f"{module}.{kind}" for module in self.modules() for kind in ("weight", "bias")}
        attention = {f"little_self_attention.in_proj_{kind}" for kind in ("weight", "bias")} | {"little_query"}
        return names | (attention if self.has_attention else set())


RELEASE_NETWORKS = {
    "coco": ReleaseNetwork(
        "dinov2-large",
        ("fc1", "fc2", "fc3", "fc4", "fc5"),
        {"do_min_max": True, "do_flip_channel_order": True},
    ),
    "ttt": ReleaseNetwork("clip-ttt", ("fc1", "fc4", "fc5"), {"do_flip_channel_order": True}),
}


def convert_checkpoint(
    path: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    image_size: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Convert a checkpoint of the release to a model folder: weights, configuration and image processor.

    Nothing in the file is executed. Weights are saved in float32.

    Args:
        path: a state dict that `torch.save` wrote, or a `.safetensors` file; it may be wrapped as
            `{"state_dict": ...}` or `{"model": ...}`, its names may begin with `module.`.
        output_dir: the folder to write, new or empty; it appears complete or not at all.
        image_size: side of the network's input in pixels; None takes fc1's columns for D and P in equal halves, as in
            the release (448).
        overwrite: files of a folder that is not empty may be replaced.

    Returns:
        `output_dir`, for `AutoModel.from_pretrained` and `AutoImageProcessor.from_pretrained`.

    Raises:
        ValueError: for anything that is not one of the two networks, complete and finite; says what was expected
            and what came.
        OSError: for a file that cannot be read.
    """
    weights = read_state_dict(path)
    try:
        name = find_network(weights)
        network = RELEASE_NETWORKS[name]
        unused = [key for key in weights if network.has_attention and key.startswith("norm.")]
        weights = {key: tensor for key, tensor in weights.items() if key not in unused}
        _check_tensors(network, weights)
        config = release_config(network, weights, image_size)
        _check_shapes(release_shapes(network, config), weights)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error
    if unused:
        logger.info(f"left out, since the network never uses them: {', '.join(sorted(unused))}")
    with torch.device("meta"):
        model = APMModel(config)
    model.load_state_dict(rename_tensors(network, config, weights), strict=True, assign=True)
    size = {"height": config.image_size, "width": config.image_size}
    with atomic_folder(output_dir, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        APMImageProcessor(size=size, **network.image_options).save_pretrained(folder)
    logger.info(f"the release's {name} network, {model.num_parameters():,} parameters: {os.fspath(output_dir)}")
    return Path(output_dir)


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the names and tensors of a checkpoint, unwrapped, on the CPU. Nothing in the file is executed.

    Raises:
        ValueError: for a file that holds no state dict, or code.
        OSError: for a file that cannot be read.
    """
    expected = f"{os.fspath(path)}: expected a state dict, as torch.save or safetensors write it"
    content: Any
    with open(path, "rb"):  # beyond this, an OSError comes from what is in the file
        pass
    try:
        if Path(path).suffix == ".safetensors":
            content = load_file(path)
        else:  # files of torch before 1.6 are no archives, and cannot be mapped into memory
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        # What torch says at length is how to load the file all the same, by executing it.
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise ValueError(f"{expected}, got something else or a damaged file") from error
        raise ValueError(
            f"{expected}, got a pickle that asks for {refused[1]}, which could be any code: nothing was executed"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"{expected}, got no safetensors file: {error}") from error
    except Exception as error:  # on damaged files torch raises nearly anything
        raise ValueError(f"{expected}, got a damaged file: {str(error).partition(chr(10))[0]}") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise ValueError(f"{expected}, got a {type(content).__name__}")
    strays = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strays or not content:
        what = f"{strays[0]!r}: {type(content[strays[0]]).__name__}" if strays else "nothing"
        raise ValueError(f"{expected}, from names to tensors, got {what}")
    prefix = "module." if all(key.startswith("module.") for key in content) else ""
    return {key.removeprefix(prefix): tensor.detach() for key, tensor in content.items()}


def find_network(names: Iterable[str]) -> str:
    """Return `"coco"` or `"ttt"`, by the names of a checkpoint's tensors; only the latter has an attention.

    Raises:
        ValueError: for other names; says which are missing and which should not be there.
    """
    came = set(names)
    found = "ttt" if any(name.startswith("little_") for name in came) else "coco"
    expected = RELEASE_NETWORKS[found].tensor_names()
    surplus = {name for name in came - expected if not (found == "ttt" and name.startswith("norm."))}
    problems = [
        f"{what} {_listed(names)}" for what, names in (("without", expected - came), ("with", surplus)) if names
    ]
    if problems:
        raise ValueError(f"expected the tensors of the release's {found} network, got them {' and '.join(problems)}")
    return found


def release_config(network: ReleaseNetwork, weights: dict[str, Tensor], image_size: int | None) -> APMConfig:
    """Return the architecture that the shapes of a checkpoint describe, without checking that they agree.

    Raises:
        ValueError: for shapes that describe no grid, or no architecture.
    """
    widths = {name: len(weights[f"{name}.weight"]) for name in network.modules()}
    channels, patch_size = widths["conv1"], weights["conv1.weight"].shape[-1]
    query_width = weights["fc1.weight"].shape[1]  # D + P
    if min(channels, patch_size) < 1:
        raise ValueError(f"conv1.weight: expected a kernel, got shape {tuple(weights['conv1.weight'].shape)}")
    if image_size is None:
        grid_size = math.isqrt(query_width // (2 * channels))
        trigger_width = query_width / 2
    else:
        grid_size = image_size // patch_size
        trigger_width = channels * grid_size**2
    if grid_size < 1 or trigger_width != channels * grid_size**2 or trigger_width >= query_width:
        raise ValueError(
            "fc1.weight: expected as columns the trigger column, of a square grid, and a position code"
            + (" as wide (otherwise image_size must be given)" if image_size is None else f", image_size={image_size}")
            + f", got {query_width} columns beside {channels} trigger channels and patches of {patch_size} pixels"
        )
    return APMConfig.preset(
        network.preset,
        image_size=patch_size * grid_size if image_size is None else image_size,
        patch_size=patch_size,
        trigger_channels=channels,
        position_size=query_width - channels * grid_size**2,
        hidden_sizes=[widths[layer] for layer in network.layers],
        feature_size=widths["feat_proj_head"],
        rgb_hidden_sizes=[widths["rgb_head_1"], widths["rgb_head_2"]],
        pooling_num_heads=POOLING_NUM_HEADS,
    )


def release_shapes(network: ReleaseNetwork, config: APMConfig) -> dict[str, tuple[int, ...]]:
    """Return the release's names and shapes of all tensors of an architecture."""
    width, query_width, patch_size = config.feature_size, config.query_width, config.patch_size
    hidden, rgb = [query_width, *config.hidden_sizes], [width + query_width, *config.rgb_hidden_sizes, 3]
    linears = {layer: (hidden[index + 1], hidden[index]) for index, layer in enumerate(network.layers)}
    linears |= {f"rgb_head_{index + 1}": (rgb[index + 1], rgb[index]) for index in range(3)}
    linears |= {"feat_proj_head": (width, hidden[-1])}
    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (config.trigger_channels, 3, patch_size, patch_size)}
    shapes |= {"conv1.bias": (config.trigger_channels,)}
    if network.has_attention:
        linears |= {"little_self_attention.out_proj": (width, width)}
        shapes |= {"little_query": (width,), "little_self_attention.in_proj_weight": (3 * width, width)}
        shapes |= {"little_self_attention.in_proj_bias": (3 * width,)}
    shapes |= {f"{name}.weight": shape for name, shape in linears.items()}
    return shapes | {f"{name}.bias": shape[:1] for name, shape in linears.items()}


def rename_tensors(network: ReleaseNetwork, config: APMConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the release's tensors under our names, each in memory of its own, float32."""
    named: dict[str, Tensor] = {}
    # The columns of a query's weight; the position code begins with the column.
    widths = {"trigger": config.trigger_width, "column": config.position_size // 2, "row": config.position_size // 2}
    for theirs, ours in network.modules().items():
        weight, bias = weights[f"{theirs}.weight"], weights[f"{theirs}.bias"]
        if ours.endswith("query"):
            own = {"features": config.feature_size} | widths if "rgb_head" in ours else widths
            parts = weight.split(list(own.values()), dim=1)
            named |= {f"{ours}.{name}.weight": part for name, part in zip(own, parts, strict=True)}
            named[f"{ours}.trigger.bias"] = bias
        else:
            named |= {f"{ours}.weight": weight, f"{ours}.bias": bias}
    if network.has_attention:
        named["pooler.query"] = weights["little_query"][None, None]  # (F,) -> (1, 1, F)
        for kind in ("weight", "bias"):
            parts = weights[f"little_self_attention.in_proj_{kind}"].chunk(3)  # (3 * F, ...) -> q, k, v
            named |= {f"pooler.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    return {name: torch.empty(tensor.shape).copy_(tensor) for name, tensor in named.items()}


def _check_tensors(network: ReleaseNetwork, weights: dict[str, Tensor]) -> None:
    """Raise unless all are dense, finite floating-point tensors with as many axes as the release's."""
    problems = []
    for name in sorted(network.tensor_names()):
        tensor, axes = weights[name], 4 if name == "conv1.weight" else 2 if name.endswith("weight") else 1
        if tensor.ndim != axes:
            problems.append(f"{name}: expected {axes} axes, got shape {tuple(tensor.shape)}")
        elif not tensor.is_floating_point() or tensor.layout != torch.strided or tensor.is_meta:
            problems.append(f"{name}: expected dense floating-point values, got {tensor.dtype}, {tensor.layout}")
        elif not tensor.isfinite().all():
            count = (~tensor.isfinite()).sum().item()
            problems.append(f"{name}: expected finite values, got {count} that are NaN or infinite")
    if problems:
        raise ValueError(_listed(problems, "; "))


def _check_shapes(expected: dict[str, tuple[int, ...]], weights: dict[str, Tensor]) -> None:
    """Raise unless all tensors have the expected shapes."""
    came = {name: tuple(weights[name].shape) for name in expected}
    wrong = [f"{name}: expected shape {expected[name]}, got {came[name]}" for name in expected]
    wrong = [line for line, name in zip(wrong, expected, strict=True) if came[name] != expected[name]]
    if wrong:
        raise ValueError(f"shapes that do not fit together: {_listed(wrong, '; ')}")


def _listed(items: Iterable[str], separator: str = ", ") -> str:
    items = sorted(items)
    more = f"{separator}and {len(items) - SHOWN_PROBLEMS} more" if len(items) > SHOWN_PROBLEMS else ""
    return separator.join(items[:SHOWN_PROBLEMS]) + more
