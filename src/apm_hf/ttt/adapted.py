"""What a fit gives back: machines that have adapted, and what a callback sees on the way.

Legend: B images, B' those still fitted, L locations, F feature width.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ..modeling_apm import APMModel, APMModelOutput


@dataclass(frozen=True)
class TTTStep:
    """What a callback sees of a group of images, before the update of a step.

    Args:
        step: from 0.
        images: `(B',)`, indices of the images that are still fitted, on the CPU.
        losses: `(B',)`.
        image_embeds: `(B', F)`, pooled over this step's locations.
        state_dict: the weights of the machine of an image that is still fitted, by the image's index.
    """

    step: int
    images: Tensor
    losses: Tensor
    image_embeds: Tensor
    state_dict: Callable[[int], dict[str, Tensor]]


@dataclass(frozen=True)
class Adapted:
    """B adapted machines.

    Args:
        image_embeds: `(B, F)`, float32, after the last update, pooled over the locations of the last step; where a
            rule stopped the fit, as the rule saw it.
        losses: `(B, steps)`, float32, each before its update; NaN where the fit had stopped.
        steps: `(B,)`, updates taken.
        diverged: `(B,)`, true where a loss was not finite; that image's numbers mean nothing, the others' do.
    """

    image_embeds: Tensor
    losses: Tensor
    steps: Tensor
    diverged: Tensor
    _model: APMModel = field(repr=False)
    _states: list[Callable[[], dict[str, Tensor]]] | None = field(repr=False)
    _pixel_values: Tensor | None = field(repr=False)
    _trigger_column: Tensor | None = field(repr=False)

    def __getitem__(self, images: slice) -> "Adapted":
        """The machines of some of the images, e.g. `adapted[2:3]`."""
        return Adapted(
            self.image_embeds[images],
            self.losses[images],
            self.steps[images],
            self.diverged[images],
            self._model,
            None if self._states is None else self._states[images],
            None if self._pixel_values is None else self._pixel_values[images],
            None if self._trigger_column is None else self._trigger_column[images],
        )

    def query(self, coordinates: Tensor | None = None, *, chunk_size: int | None = None) -> APMModelOutput:
        """Ask every adapted machine about its own image, one after the other; the main head alone has adapted.

        Args:
            coordinates: `(L, 2)` or `(B, L, 2)`, (y, x) in [-1, 1]; None asks for the full grid.
            chunk_size: locations answered at a time.

        Returns:
            [`APMModelOutput`], B images.
        """
        num_images = len(self.losses)
        if coordinates is not None:
            coordinates = self._model._check_coordinates(coordinates, num_images)
        outputs = []
        for index in range(num_images):
            inputs = [None if x is None else x[index : index + 1] for x in (self._pixel_values, self._trigger_column)]
            where = coordinates if coordinates is None or len(coordinates) == 1 else coordinates[index : index + 1]
            with torch.no_grad():
                arguments = {"trigger_column": inputs[1], "chunk_size": chunk_size, "heads": (), "return_dict": True}
                outputs.append(functional_call(self._model, self.state_dict(index), (inputs[0], where), arguments))
        answers: dict[str, Any] = {name: torch.cat([output[name] for output in outputs]) for name in outputs[0]}
        return APMModelOutput(**answers)

    def state_dict(self, index: int) -> dict[str, Tensor]:
        """The weights fitted to image `index`, for `APMModel.load_state_dict`.

        Raises:
            ValueError: where `adapt` was told not to keep the machines.
        """
        if self._states is None:
            raise ValueError("state_dict, query: expected adapted machines that were kept, got keep_machines=False")
        return self._states[index]()
