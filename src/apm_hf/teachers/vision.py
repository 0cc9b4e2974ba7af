"""Compute an image embedding, patches in its space, and patches of intermediate layers from pixels.

`FamilyVision` runs a transformers model by its family's description, `ModuleVision` any module through a user's
function. Both expect frozen models.

Shapes: B images, T tokens, N levels, (rows, cols) the grid, C width of the vision tower, F width of the embeddings.
Maps of early layers of a convolutional network are finer than the last one's: each location of the last grid gets
their mean over its cell. They are narrower too: their channels are repeated up to C, which, if C is a multiple,
changes neither cosines nor layernorm outputs.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from .families import DUAL_ENCODERS, VISION_TOWERS, DualEncoder, LinearHead, VisionTower

Grid = tuple[int, int]
Outputs = dict[str, Tensor]
ModuleOutputs = Callable[[nn.Module, Tensor], Any]


class FamilyVision:
    """Run the vision tower of a transformers model.

    Attributes:
        feature_size, hidden_size: F and C.
        num_layers: `layers` range from 0, the input of the first layer, to this.
        patch_size: Pixels from one patch to the next.
        image_size: The config's image size in pixels, if any.
        head: The linear layer of a classifier that reads image embeddings, else None.
        head_size: Number of inputs of a classifier's linear layer, or None without one.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.dual = model, model.config.model_type in DUAL_ENCODERS
        self.is_classifier = not self.dual and VISION_TOWERS[model.config.model_type].is_classifier(model.config)
        family, tower = self.family, self.tower
        self.hidden_size = family.hidden_size(tower)
        self.num_layers = family.num_layers(tower)
        self.patch_size = _side(family.patch_size(tower), "patches")
        self.image_size = _side(getattr(tower.config, "image_size", None) or 224, "images")
        self.feature_size = self.hidden_size if family.feature_size is None else family.feature_size(tower)
        if self.dual:
            self.feature_size = self.dual_encoder.feature_size(model.config)
        head = family.head(model) if self.is_classifier else None
        self.head_size = None if head is None else head.in_features
        self.head: LinearHead = head if self.head_size == self.feature_size else None

    # Descriptions hold functions that cannot be pickled, so they are looked up.
    @property
    def family(self) -> VisionTower:
        """The facts about this kind of vision tower."""
        return VISION_TOWERS[self.tower.config.model_type]

    @property
    def dual_encoder(self) -> DualEncoder:
        """The facts about this kind of dual encoder."""
        return DUAL_ENCODERS[self.model.config.model_type]

    @property
    def tower(self) -> Any:
        """The vision tower, without heads or text tower."""
        if self.dual:
            return self.model.vision_model
        return VISION_TOWERS[self.model.config.model_type].tower(self.model) if self.is_classifier else self.model

    def encode(self, pixel_values: Tensor, layers: Sequence[int] | None) -> Outputs:
        """Return `image_embeds` `(B, F)`, `features` `(B, rows, cols, F)` and, with layers, `levels`
        `(B, N, rows, cols, C)`.

        Raises:
            ValueError: Tokens or maps that do not fit the grid.
        """
        family, tower = self.family, self.tower
        grid = (pixel_values.shape[-2] // self.patch_size, pixel_values.shape[-1] // self.patch_size)
        states = family.forward(tower, pixel_values, layers is not None)
        last = states.last_hidden_state
        if last.ndim == 4 and tuple(last.shape[-2:]) != grid:
            raise ValueError(f"Expected maps of {grid[0]} x {grid[1]} places, got {tuple(last.shape)}.")
        patches = self._patches(last, grid)
        if self.dual or family.standalone == "pooler_output":
            pooled = getattr(states, "pooler_output", None)
            if pooled is None:
                raise ValueError(f"{type(tower).__name__}: expected one with a pooling head, got none")
            image_embeds, features = pooled.flatten(1), family.pool(tower, patches)
        elif family.standalone == "mean":
            image_embeds, features = patches.mean(dim=(1, 2)), patches
        else:
            image_embeds, features = last[:, 0], patches
        if self.dual:
            project = self.dual_encoder.project
            image_embeds, features = project(self.model, image_embeds), project(self.model, features)
        outputs = {"image_embeds": image_embeds, "features": features}
        if layers is not None:
            if (num_states := len(states.hidden_states)) != self.num_layers + 1:
                raise ValueError(f"Expected {self.num_layers + 1} hidden states, got {num_states}.")
            levels = [_widened(self._patches(states.hidden_states[n], grid), self.hidden_size) for n in layers]
            outputs["levels"] = torch.stack(levels, dim=1)  # N times (B, rows, cols, C) -> (B, N, rows, cols, C)
        return outputs

    def _patches(self, states: Tensor, grid: Grid) -> Tensor:
        """Convert tokens or maps to `(B, rows, cols, C)`."""
        rows, cols = grid
        if states.ndim == 4:
            if states.shape[-2] % rows or states.shape[-1] % cols:
                raise ValueError(f"Expected maps that a grid of {rows} x {cols} divides, got {tuple(states.shape)}.")
            return nn.functional.adaptive_avg_pool2d(states, grid).permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        num_prefix_tokens = self.family.num_prefix_tokens(self.tower)
        if states.shape[1] != num_prefix_tokens + rows * cols:
            raise ValueError(
                f"Expected {num_prefix_tokens} prefix tokens and {rows} x {cols} patches, "
                f"got {states.shape[1]} tokens."
            )
        return states[:, num_prefix_tokens:].unflatten(1, grid)  # (B, T, C) -> (B, rows, cols, C)


class ModuleVision:
    """Run any module through a user's function; see [`Teacher.from_module`]. Attributes as in [`FamilyVision`]."""

    head: LinearHead = None
    head_size: int | None = None

    def __init__(self, module: nn.Module, outputs: ModuleOutputs, *, patch_size: int, image_size: int) -> None:
        self.model, self.outputs = module, outputs
        self.patch_size, self.image_size = patch_size, image_size
        self.feature_size = self.hidden_size = self.num_layers = 0
        device, dtype = device_and_dtype(module)
        with torch.inference_mode():  # sizes are read from the outputs for a blank image
            blank = self._run(torch.zeros(1, 3, image_size, image_size, device=device, dtype=dtype))
        self.feature_size = self.hidden_size = blank["image_embeds"].shape[1]
        if "levels" in blank:
            self.num_layers, self.hidden_size = blank["levels"].shape[1] - 1, blank["levels"].shape[-1]

    def encode(self, pixel_values: Tensor, layers: Sequence[int] | None) -> Outputs:
        """Encode as [`FamilyVision.encode`] does."""
        outputs = self._run(pixel_values)
        if outputs["image_embeds"].shape[1] != self.feature_size:
            raise ValueError(
                f"outputs: expected width {self.feature_size} as before, got {outputs['image_embeds'].shape}"
            )
        levels = outputs.pop("levels", None)
        if layers is not None:
            if levels is None:
                raise ValueError("layers: expected None for a teacher whose `outputs` give no levels")
            outputs["levels"] = levels[:, list(layers)]
        return outputs

    def _run(self, pixel_values: Tensor) -> Outputs:
        given = self.outputs(self.model, pixel_values)
        parts = given.to_tuple() if isinstance(given, ModelOutput) else given
        if not isinstance(parts, tuple | list) or len(parts) not in (2, 3):
            what = f"{len(parts)} values" if isinstance(parts, tuple | list) else type(parts).__name__
            raise ValueError(
                f"outputs: expected (image_embeds, features) or (image_embeds, features, levels), got {what}"
            )
        outputs = dict(zip(("image_embeds", "features", "levels"), parts, strict=False))
        if isinstance(levels := outputs.get("levels"), tuple | list):
            kinds = [tuple(level.shape) if isinstance(level, Tensor) else type(level).__name__ for level in levels]
            if not levels or not all(isinstance(level, Tensor) and level.shape == levels[0].shape for level in levels):
                raise ValueError(f"outputs: expected levels of one shape (B, rows, cols, C), got {kinds}")
            outputs["levels"] = torch.stack(list(levels), dim=1)
        batch_size, patch_size = len(pixel_values), self.patch_size
        rows, cols = pixel_values.shape[-2] // patch_size, pixel_values.shape[-1] // patch_size
        shapes: dict[str, tuple[int | str, ...]] = {
            "image_embeds": (batch_size, "F"),
            "features": (batch_size, rows, cols, "F"),
            "levels": (batch_size, "N", rows, cols, "C"),
        }
        sizes: dict[str, int] = {}
        for name, value in outputs.items():
            if not isinstance(value, Tensor) or not value.is_floating_point():
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"outputs: expected {name} to be a floating point tensor, got {got}")
            shape, wanted = tuple(value.shape), shapes[name]
            # The first size under a letter fixes it: F of the features must be that of the embeddings.
            fits = len(shape) == len(wanted) and all(
                got == (sizes.setdefault(want, got) if isinstance(want, str) else want)
                for got, want in zip(shape, wanted, strict=True)
            )
            if not fits:
                expected = ", ".join(str(sizes.get(want, want) if isinstance(want, str) else want) for want in wanted)
                raise ValueError(
                    f"outputs: expected {name} of shape ({expected}) for {batch_size} x 3 x "
                    f"{pixel_values.shape[-2]} x {pixel_values.shape[-1]} pixels and patch_size {patch_size}, "
                    f"got {shape}"
                )
        return outputs


def device_and_dtype(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype of a module's weights; the CPU and float32 for one without weights."""
    tensors = [tensor for tensor in chain(module.parameters(), module.buffers()) if tensor.is_floating_point()]
    return (tensors[0].device, tensors[0].dtype) if tensors else (torch.device("cpu"), torch.float32)


def _widened(patches: Tensor, width: int) -> Tensor:
    """Repeat channels, `(..., c)` -> `(..., width)`; tokens already have this width and are unchanged."""
    repeats = -(-width // patches.shape[-1])
    return patches if repeats == 1 else patches.repeat(1, 1, 1, repeats)[..., :width]


def _side(size: int | Sequence[int], what: str) -> int:
    sides = set(size) if isinstance(size, Sequence) else {size}
    if len(sides) != 1:
        raise ValueError(f"Expected a teacher with square {what}, got {size}.")
    return int(sides.pop())
