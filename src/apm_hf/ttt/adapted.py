"""Define the outputs of a fit: adapted models, and the steps that a callback receives.

Legend: B images, B' images that have not stopped, L locations, F feature width.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..modeling_apm import APMModel, APMModelOutput
from .stacked import StackedModels, Weights


@dataclass(frozen=True)
class TTTStep:
    """Hold what a callback receives for a group of images, before the update of a step.

    Args:
        step: from 0.
        images: `(B',)`, indices of the images that have not stopped, on the CPU.
        losses: `(B',)`.
        image_embeds: `(B', F)`, pooled over this step's locations.
        state_dict: image index -> weights of its model, for the images that have not stopped.
    """

    step: int
    images: Tensor
    losses: Tensor
    image_embeds: Tensor
    state_dict: Callable[[int], Weights]


@dataclass(frozen=True)
class Adapted:
    """Hold B adapted models.

    Args:
        image_embeds: `(B, F)`, float32, after the last update, pooled over the locations of the last step; if a rule
            stopped the fit, the value at which it did.
        losses: `(B, steps)`, float32, each before its update; NaN after the fit had stopped.
        steps: `(B,)`, number of updates.
        diverged: `(B,)`, true if a loss was not finite; only that image's results are invalid.
    """

    image_embeds: Tensor
    losses: Tensor
    steps: Tensor
    diverged: Tensor
    model: APMModel = field(repr=False)
    models: list[tuple[StackedModels, int]] | None = field(repr=False)  # models of every image, and its index in them
    pixel_values: Tensor | None = field(repr=False)
    trigger_column: Tensor | None = field(repr=False)

    def __getitem__(self, images: slice) -> "Adapted":
        """Return some of the images, e.g. `adapted[2:3]`."""
        names = ("image_embeds", "losses", "steps", "diverged", "models", "pixel_values", "trigger_column")
        values = {name: getattr(self, name) for name in names}
        return replace(self, **{name: value[images] for name, value in values.items() if value is not None})

    @torch.no_grad()
    def query(self, coordinates: Tensor | None = None, *, chunk_size: int | None = None) -> APMModelOutput:
        """Query every adapted model about its image, one at a time, without additional heads, which were not trained.

        Args:
            coordinates: `(L, 2)` or `(B, L, 2)`, (y, x) in [-1, 1]; None is the full grid.
            chunk_size: locations decoded at a time.

        Returns:
            [`APMModelOutput`], B images.
        """
        num_images = len(self.losses)
        if coordinates is not None and coordinates.ndim == 3 and len(coordinates) != num_images:
            raise ValueError(
                f"coordinates: expected shape (L, 2) or ({num_images}, L, 2), got {tuple(coordinates.shape)}"
            )
        model = copy.deepcopy(self.model).float().eval()
        outputs = []
        for index in range(num_images):
            one = slice(index, index + 1)
            model.load_state_dict(self.state_dict(index))
            pixels, trigger = (None if x is None else x[one] for x in (self.pixel_values, self.trigger_column))
            where = coordinates[one] if coordinates is not None and coordinates.ndim == 3 else coordinates
            outputs.append(
                model(pixels, where, trigger_column=trigger, chunk_size=chunk_size, heads=(), return_dict=True)
            )
        joined: dict[str, Any] = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
        return APMModelOutput(**joined)

    def state_dict(self, index: int) -> Weights:
        """Return copies of the weights fitted to image `index`, for `APMModel.load_state_dict`.

        Raises:
            ValueError: if `adapt` was called with `keep_models=False`.
        """
        if self.models is None:
            raise ValueError("state_dict, query: expected adapted models with weights, got keep_models=False")
        models, place = self.models[index]
        return models.weights(place)
