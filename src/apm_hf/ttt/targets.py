"""What machines are fitted to at test time: the teacher's answers about each image, and when that is enough.

Source: arXiv:2410.20535, section 4 (the pooled embedding); sections 3.2 and 3.3 for features and colours.

Legend: B images, T targets an image (views, teachers), L locations, N levels, C a level's width, F feature width,
(rows, cols) a target's grid.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

STOPS = ("plateau", "cosine", "stable")


@dataclass(frozen=True, kw_only=True)
class TTTTargets:
    """A weighted mixture of targets for B images; every loss is a mean squared error in float32.

    Embeddings and features are the teacher's own; where the machine has their statistics, they are compared in the
    standardised space.

    Args:
        image_embeds: for the pooled feature: `(B, F)`, or `(B, T, F)` for several views or teachers of one width.
        embed_weights: `(T,)`, of these; equal ones by default, which sum to 1.
        features: for the features of locations: `(B, rows, cols, F)`; the machine is asked at the centres of these
            cells, wherever its own grid lies, so that no target is interpolated.
        rgb: for their colours: `(B, rows, cols, 3)`, in [0, 1]. The RGB head is then fitted too. Interpolated
            bilinearly where `features` have another grid.
        levels: for the levels of locations: `(B, N, rows, cols, C)`, normalised by [`normalise_levels`]; the head of
            levels is then fitted too. Interpolated bilinearly where `features` have another grid.
        cls_weight, grid_weight, rgb_weight, level_weight: of the four.

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
            raise ValueError(f"targets: expected as many images everywhere, got {counts}")
        if self.embed_weights is not None:
            num_targets = (
                self.image_embeds.shape[1] if self.image_embeds is not None and self.image_embeds.ndim == 3 else 1
            )
            if self.embed_weights.shape != (num_targets,):
                raise ValueError(
                    f"embed_weights: expected shape ({num_targets},), got {tuple(self.embed_weights.shape)}"
                )
        for name in ("cls_weight", "grid_weight", "rgb_weight", "level_weight"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected a positive finite number, got {getattr(self, name)}")

    def __len__(self) -> int:
        return len(next(iter(self.tensors().values())))

    def tensors(self) -> dict[str, Tensor]:
        """Those that are given."""
        named = {
            "image_embeds": self.image_embeds,
            "features": self.features,
            "rgb": self.rgb,
            "levels": self.levels,
        }
        return {name: values for name, values in named.items() if values is not None}

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, cols) of the locations' targets; None without any."""
        for values in (self.features, self.rgb, self.levels):
            if values is not None:
                return values.shape[-3], values.shape[-2]
        return None

    @property
    def everywhere(self) -> bool:
        """Whether locations have targets of their own."""
        return self.grid is not None


@dataclass(frozen=True)
class Answers:
    """What B machines say at one step.

    Args:
        pooled: `(B, F)`.
        features: `(B, n, F)`; None where only their mean is needed.
        rgb: `(B, n, 3)`, where there are targets for it.
        levels: `(B, n, N, C)`, likewise.
    """

    pooled: Tensor
    features: Tensor | None = None
    rgb: Tensor | None = None
    levels: Tensor | None = None


class GridTargets:
    """The same, location by location, float32 on the machine's device, for the images in a group.

    Args:
        scale: `(F,)` or one number, what differences of features are divided by: their standard deviation.
    """

    def __init__(self, targets: TTTTargets, device: torch.device, rows: slice, *, scale: Tensor | None = None):
        self.scale = scale

        def gridded(values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            values = values[rows].to(device, torch.float32, copy=True).movedim(-1, 1)  # (B, F, rows, cols)
            assert targets.grid is not None
            if values.shape[-2:] != targets.grid:
                values = F.interpolate(values, targets.grid, mode="bilinear", align_corners=False)
            return values.flatten(2).mT.contiguous()  # (B, L, F)

        self.features, self.rgb, self.levels = gridded(targets.features), gridded(targets.rgb), None
        if targets.levels is not None:
            num_levels = targets.levels.shape[1]
            columns = gridded(targets.levels.movedim(1, -2).flatten(-2))  # (B, N, rows, cols, C) -> (B, L, N * C)
            assert columns is not None
            self.levels = columns.unflatten(-1, (num_levels, -1))
        self.embeds, self.embed_weights = None, None
        if targets.image_embeds is not None:
            # Copies, since what was made in inference mode cannot be differentiated through.
            embeds = targets.image_embeds[rows].to(device, torch.float32, copy=True)
            self.embeds = embeds if embeds.ndim == 3 else embeds[:, None]  # (B, T, F)
            num_targets = self.embeds.shape[1]
            weights = torch.full((num_targets,), 1 / num_targets)
            weights = weights if targets.embed_weights is None else targets.embed_weights
            self.embed_weights = weights.to(device, torch.float32)
        self.cls_weight = targets.cls_weight
        self.weights = {"features": targets.grid_weight, "rgb": targets.rgb_weight, "levels": targets.level_weight}

    def loss(self, answers: Answers, where: Tensor | None) -> Tensor:
        """`(B,)` for what the machines answer at these locations."""
        pooled = answers.pooled
        terms = []
        if self.embeds is not None and self.embed_weights is not None:
            if self.embeds.shape[1] == 1:
                error = self._scaled(pooled - self.embeds[:, 0]).square().mean(dim=1) * self.embed_weights
            else:
                errors = self._scaled(pooled[:, None] - self.embeds).square().mean(dim=2)
                error = (errors * self.embed_weights).sum(dim=1)
            terms.append(self.cls_weight * error)
        for name, weight in self.weights.items():
            answer, wanted = getattr(answers, name), getattr(self, name)
            if wanted is not None:
                error = answer - at(wanted, where)
                error = self._scaled(error) if name == "features" else error
                terms.append(weight * error.square().flatten(2).mean(dim=2).mean(dim=1))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def _scaled(self, errors: Tensor) -> Tensor:
        return errors if self.scale is None else errors / self.scale

    def keep(self, kept: Tensor) -> None:
        """Go on with these images alone, `(B',)` indices."""
        self.embeds, self.features, self.rgb, self.levels = (
            None if values is None else values[kept] for values in (self.embeds, self.features, self.rgb, self.levels)
        )


class Stopper:
    """Says which images of a group are done; it sees no labels.

    Args:
        rule: `"plateau"`: the loss has not fallen by the fraction `threshold` within `patience` steps. `"cosine"`: the
            cosine to the (mean) target has been at least `threshold` for `patience` steps. `"stable"`: the class
            predicted has been the same for `patience` steps.
        classify: embeddings `(B, F)` -> classes `(B,)`, for `"stable"`.
    """

    def __init__(self, rule: str, threshold: float, patience: int, num_images: int, classify: Callable | None):
        self.rule, self.threshold, self.patience, self.classify = rule, threshold, patience, classify
        self.best = torch.full((num_images,), torch.inf)
        self.waited = torch.zeros(num_images, dtype=torch.long)
        self.predicted = torch.full((num_images,), -1)

    def __call__(self, losses: Tensor, pooled: Tensor, targets: GridTargets) -> Tensor:
        """`(B,)` bool, on the CPU, from the losses `(B,)` and embeddings `(B, F)` of this step, before its update."""
        if self.rule == "plateau":
            losses = losses.cpu()
            better = losses < self.best * (1 - self.threshold)
            self.best = torch.where(better, losses, self.best)
        elif self.rule == "cosine":
            assert targets.embeds is not None and targets.embed_weights is not None
            wanted = (targets.embeds * targets.embed_weights[:, None]).sum(dim=1)
            better = (F.cosine_similarity(pooled, wanted) < self.threshold).cpu()
        else:
            assert self.classify is not None
            predicted = self.classify(pooled).cpu()
            better = predicted != self.predicted
            self.predicted = predicted
        self.waited = torch.where(better, 0, self.waited + 1)
        return self.waited >= self.patience

    def keep(self, kept: Tensor) -> None:
        """Go on with these images alone, `(B',)` indices."""
        kept = kept.cpu()
        self.best, self.waited, self.predicted = self.best[kept], self.waited[kept], self.predicted[kept]


def at(values: Tensor, where: Tensor | None) -> Tensor:
    """`(B, n, ...)` of `(B, L, ...)`."""
    if where is None:
        return values
    if where.ndim == 1:
        return values[:, where]
    return values[torch.arange(len(values), device=values.device)[:, None], where]
