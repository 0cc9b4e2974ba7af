"""Normalise the targets of a fit, compute its loss, and decide when to stop.

Source: arXiv:2410.20535, section 4 (the pooled embedding); sections 3.2 and 3.3 for features and colours.

Legend: B images, T targets per image (views, teachers), L locations, N levels, C a level's width, F feature width,
(rows, cols) a target's grid.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..modeling_apm import APMModel
from .stacked import at


def as_float(name: str, values: Any) -> Tensor | None:
    """Convert a tensor, an array, or lists of either or of numbers to a float32 tensor without gradient.

    Raises:
        ValueError: for anything else, such as lists of different lengths.
    """
    if values is None:
        return None
    try:
        if not isinstance(values, Tensor):
            of_tensors = isinstance(values, list | tuple) and any(isinstance(value, Tensor) for value in values)
            values = torch.stack(list(values)) if of_tensors else torch.from_numpy(np.array(values, dtype=np.float32))
        values = values.detach().to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}: expected a tensor, an array or lists of numbers: {error}") from error
    # Clone, since inference tensors cannot be saved for backward.
    return values.clone() if values.is_inference() else values


@dataclass(frozen=True, kw_only=True)
class TTTTargets:
    """Hold a weighted mixture of targets for B images; every loss is a mean squared error in float32.

    Embeddings and features are the teacher's, unchanged; if the model has their statistics, they are compared in the
    standardised space. All may be tensors, arrays or lists.

    Args:
        image_embeds: targets of the pooled feature: `(B, F)`, or `(B, T, F)` for several views or teachers.
        embed_weights: `(T,)`, weights of these; equal ones by default, which sum to 1.
        features: targets of the locations' features: `(B, rows, cols, F)`; the model is queried at the centres of
            these cells, independent of its grid, so that no target is interpolated.
        rgb: targets of their colours: `(B, rows, cols, 3)`, in [0, 1]. The RGB head is then fitted too. Interpolated
            bilinearly if `features` have another grid.
        levels: targets of the locations' levels: `(B, N, rows, cols, C)`, normalised by [`normalise_levels`]; the
            levels' head is then fitted too. Interpolated bilinearly if `features` have another grid.
        cls_weight, grid_weight, rgb_weight, level_weight: weights of the four losses.

    Raises:
        ValueError: for shapes that do not fit each other, or no target at all.
    """

    image_embeds: Tensor | None = None
    embed_weights: Tensor | None = None
    features: Tensor | None = None
    rgb: Tensor | None = None
    levels: Tensor | None = None
    cls_weight: float = 1.0
    grid_weight: float = 1.0
    rgb_weight: float = 1.0
    level_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("image_embeds", "embed_weights", "features", "rgb", "levels"):
            object.__setattr__(self, name, as_float(name, getattr(self, name)))
        given = self.tensors()
        if not given:
            raise ValueError("targets: expected image_embeds, features, rgb or levels, got none of them")
        for name, dims in (("image_embeds", (2, 3)), ("features", (4,)), ("rgb", (4,)), ("levels", (5,))):
            if name in given and given[name].ndim not in dims:
                raise ValueError(f"{name}: expected {dims} dimensions, got shape {tuple(given[name].shape)}")
        if "rgb" in given and given["rgb"].shape[-1] != 3:
            raise ValueError(f"rgb: expected shape (B, rows, cols, 3), got {tuple(given['rgb'].shape)}")
        counts = {name: len(values) for name, values in given.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"targets: expected the same number of images everywhere, got {counts}")
        if self.embed_weights is not None:
            several = self.image_embeds is not None and self.image_embeds.ndim == 3
            expected = (given["image_embeds"].shape[1] if several else 1,)
            if self.embed_weights.shape != expected:
                raise ValueError(f"embed_weights: expected shape {expected}, got {tuple(self.embed_weights.shape)}")
        for name in ("cls_weight", "grid_weight", "rgb_weight", "level_weight"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a positive finite number, got {getattr(self, name)}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def tensors(self) -> dict[str, Tensor]:
        """Return the targets that are given, by name."""
        named = {name: getattr(self, name) for name in ("image_embeds", "features", "rgb", "levels")}
        return {name: values for name, values in named.items() if values is not None}

    @property
    def grid(self) -> tuple[int, int] | None:
        """Return (rows, cols) of the locations' targets; None without any."""
        for values in (self.features, self.rgb, self.levels):
            if values is not None:
                return values.shape[-3], values.shape[-2]
        return None


class Loss:
    """Compute the loss of a group of images.

    Args:
        targets: targets of all images.
        images: slice of the group.
        model: model whose feature statistics standardise features.
    """

    def __init__(self, targets: TTTTargets, images: slice, model: APMModel):
        device, statistics = model.device, (model.config.feature_mean, model.config.feature_std)
        self.mean, self.std = (
            None if values is None else torch.tensor(values, dtype=torch.float32, device=device)
            for values in statistics
        )
        self.cls_weight = targets.cls_weight
        self.weights = {"features": targets.grid_weight, "rgb": targets.rgb_weight, "levels": targets.level_weight}
        self.embeds = self.embed_weights = None
        if targets.image_embeds is not None:
            embeds = targets.image_embeds[images].to(device)
            self.embeds = embeds if embeds.ndim == 3 else embeds[:, None]  # (B, T, F)
            num_targets = self.embeds.shape[1]
            equal = torch.full((num_targets,), 1 / num_targets, dtype=torch.float32)
            self.embed_weights = (equal if targets.embed_weights is None else targets.embed_weights).to(device)
        self.expected: dict[str, Tensor] = {}  # (B, L, ...)
        for name in self.weights:
            if (values := getattr(targets, name)) is not None:
                values = values[images].to(device)
                values = values if name == "levels" else values[:, None]  # (B, N, rows, cols, C)
                columns = values.movedim(-1, 2).flatten(1, 2)  # (B, N * C, rows, cols)
                if columns.shape[-2:] != targets.grid:
                    columns = F.interpolate(columns, targets.grid, mode="bilinear", align_corners=False)
                columns = columns.flatten(2).mT.contiguous()  # (B, L, N * C)
                self.expected[name] = columns.unflatten(-1, (values.shape[1], -1)) if name == "levels" else columns

    def __call__(self, outputs: dict[str, Tensor], where: Tensor | None) -> Tensor:
        """Return `(B,)` for the outputs of [`StackedModels`] at these locations."""
        terms = []
        if self.embeds is not None and self.embed_weights is not None:
            errors = self._scaled(outputs["pooled"][:, None] - self.embeds).square().mean(dim=2)  # (B, T)
            terms.append(self.cls_weight * (errors * self.embed_weights).sum(dim=1))
        for name, expected in self.expected.items():
            error = outputs[name] - at(expected, where)
            error = self._scaled(error) if name == "features" else error
            terms.append(self.weights[name] * error.square().flatten(1).mean(dim=1))
        return torch.stack(terms).sum(dim=0)

    def target_size(self) -> Tensor | None:
        """Return the root mean square of the (standardised) target features, `(B, 1, 1)`, if there are any."""
        expected = self.embeds if self.embeds is not None else self.expected.get("features")
        if expected is None:
            return None
        expected = self._scaled(expected if self.mean is None else expected - self.mean)
        return expected.square().mean(dim=(1, 2), keepdim=True).sqrt()

    def cosine(self, pooled: Tensor) -> Tensor | None:
        """Return the cosines `(B,)` of pooled features `(B, F)` to the (mean) target; None if there is none."""
        if self.embeds is None or self.embed_weights is None:
            return None
        return F.cosine_similarity(pooled, (self.embeds * self.embed_weights[:, None]).sum(dim=1))

    def _scaled(self, errors: Tensor) -> Tensor:
        return errors if self.std is None else errors / self.std

    def keep(self, images: Tensor) -> None:
        """Continue with these images only, `(B',)` indices."""
        self.embeds = None if self.embeds is None else self.embeds[images]
        self.expected = {name: values[images] for name, values in self.expected.items()}


class Stopper:
    """Decide which images of a group are done, without labels, by `TTTConfig.stop`.

    Args:
        classify: embeddings `(B, F)` -> classes `(B,)`, for `"stable"`.
    """

    def __init__(self, rule: str, threshold: float, patience: int, num_images: int, classify: Callable | None):
        self.rule, self.threshold, self.patience, self.classify = rule, threshold, patience, classify
        self.best = torch.full((num_images,), torch.inf, dtype=torch.float32)
        self.waited = torch.zeros(num_images, dtype=torch.long)
        self.predicted = torch.full((num_images,), -1)

    def __call__(self, losses: Tensor, pooled: Tensor, loss: Loss) -> Tensor:
        """Return `(B,)` bool, on the CPU, from losses `(B,)` and embeddings `(B, F)` of a step, before its update."""
        if self.rule == "plateau":
            losses = losses.cpu()
            restart = losses < self.best * (1 - self.threshold)
            self.best = torch.where(restart, losses, self.best)
        elif self.rule == "cosine":
            cosines = loss.cosine(pooled)
            assert cosines is not None
            restart = ~(cosines >= self.threshold).cpu()  # NaN restarts
        else:
            assert self.classify is not None
            predicted = self.classify(pooled).cpu()
            restart, self.predicted = predicted != self.predicted, predicted
        self.waited = torch.where(restart, 0, self.waited + 1)
        return self.waited >= self.patience

    def keep(self, images: Tensor) -> None:
        """Continue with these images only, `(B',)` indices."""
        images = images.cpu()
        self.best, self.waited, self.predicted = self.best[images], self.waited[images], self.predicted[images]
