"""Compute a batch's targets and losses: run the teachers, query the student where their features lie, compare.

Source: arXiv:2410.20535, section 3; a head for each of several teachers as in AM-RADIO (arXiv:2312.06709), compared in
standardised spaces where the student's configuration holds their statistics. Losses of teachers are added.

Legend: B images, L locations, F feature width, (rows, cols) a teacher's grid.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..configuration_apm import APMConfig
from ..modeling_apm import APMModelOutput
from .losses import DistillationTargets, LossWeights, distillation_losses
from .targets import TargetMaker, query_heads

MAIN = ""  # the main head's name among those of additional teachers


class Objective:
    """Compute targets and losses for batches of images.

    Args:
        architecture: the student's.
        targets: runs the teachers.
        weights: of the losses; those of colours and levels apply to the main teacher only.
        num_locations: random patches of each teacher that are queried in training; None queries all.
        distance: of features, see [`distillation_losses`].
        jitter: whether teachers' grids are moved by a random part of a patch in training.
    """

    def __init__(
        self,
        architecture: APMConfig,
        targets: TargetMaker,
        weights: LossWeights,
        *,
        distance: str = "mse",
        num_locations: int | None = None,
        jitter: bool = False,
    ):
        self.architecture, self.targets, self.weights, self.distance = architecture, targets, weights, distance
        self.num_locations, self.jitter = num_locations, jitter
        self.around_teachers: Callable[[], AbstractContextManager] = nullcontext  # entered while teachers run

    @property
    def used(self) -> set[str]:
        """Return the fields of a student's output that the losses use."""
        weights = self.weights
        fields = {"last_hidden_state": weights.grid, "pooler_output": weights.cls, "rgb": weights.rgb}
        fields |= {"levels": weights.level, "teacher_features": weights.grid, "teacher_embeds": weights.cls}
        return {name for name, weight in fields.items() if weight}

    def head_targets(
        self, batch: dict[str, Tensor], shift: tuple[float, float] = (0.0, 0.0)
    ) -> tuple[DistillationTargets, dict[str, DistillationTargets]]:
        """Return the targets of the main head, and of additional heads by name.

        Args:
            shift: see [`TargetMaker`].

        Raises:
            ValueError: for targets that are missing, or not as wide as the student's features.
        """
        main, additional = self.targets(batch, shift=shift), self.targets.additional(batch, shift=shift)
        for name, one in {MAIN: main, **additional}.items():
            wanted = one.features.shape[-1]
            size = self.architecture.teacher_head(name)["feature_size"]
            if wanted != size:
                head = f" of head {name!r}" if name else ""
                raise ValueError(f"feature_size{head}: expected the targets' {wanted}, got {size}")
        num_levels = self.architecture.num_levels
        if num_levels and main.levels is None and self.weights.level:
            raise ValueError(
                f"levels: expected targets for the student's {num_levels} levels, got none; give level_layers, or "
                "level_weight=0 to leave them as they are"
            )
        return main, additional

    def targets_by_head(self, batch: dict[str, Tensor]) -> dict[str, DistillationTargets]:
        """Return the targets of every head; the main head is `MAIN`."""
        main, additional = self.head_targets(batch)
        return {MAIN: main, **additional}

    def losses(self, student: Any, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Return the losses by name, those of an additional teacher as `NAME/loss_grid`, and their sum, `loss`.

        Args:
            student: an [`APMModel`], or a wrapper of one.
            generator: draws shifts and locations, on the CPU.
        """
        shift = (0.0, 0.0)
        if self.jitter:
            down, right = (torch.rand(2, generator=generator) - 0.5).tolist()
            shift = (down, right)
        with self.around_teachers():
            main, additional = self.head_targets(batch, shift)
        pixel_values = batch["pixel_values"]
        locations: dict[tuple[int, int], Tensor] = {}
        grids = {one.grid: one.features.shape[1] for one in (main, *additional.values())}
        for grid, num_targets in grids.items():
            if self.num_locations is not None and self.num_locations < num_targets:
                drawn = torch.randperm(num_targets, generator=generator)[: self.num_locations]
                locations[grid] = drawn.to(pixel_values.device)
        outputs, others = query_heads(student, pixel_values, main, additional, locations)
        losses = self._losses(MAIN, outputs, main, locations, self.weights)
        for name, head_outputs in others.items():
            weights = replace(self.weights, rgb=0.0, level=0.0)
            own = self._losses(name, head_outputs, additional[name], locations, weights)
            losses["loss"] = losses["loss"] + own.pop("loss")
            losses |= {f"{name}/{loss}": value for loss, value in own.items()}
        return losses

    def predict(self, student: Any, batch: dict[str, Tensor]) -> dict[str, tuple[APMModelOutput, DistillationTargets]]:
        """Return every head's outputs at all patches of its teacher, beside their targets; the main head is `MAIN`."""
        main, additional = self.head_targets(batch)
        outputs, others = query_heads(student, batch["pixel_values"], main, additional, {})
        return {MAIN: (outputs, main), **{name: (others[name], additional[name]) for name in additional}}

    def not_finite(self, batch: dict[str, Tensor]) -> str | None:
        """Say for which images a teacher's outputs are not finite, by `index` if the batch has it; None for none."""
        for name, targets in self.targets_by_head(batch).items():
            finite = targets.image_embeds.isfinite().all(dim=1) & targets.features.isfinite().flatten(1).all(dim=1)
            if not finite.all():
                places = (~finite).nonzero().flatten()
                where = f"rows {batch['index'][places].tolist()}" if "index" in batch else f"images {places.tolist()}"
                teacher = f"the teacher of head {name!r}" if name else "the teacher"
                return f"expected finite features of {teacher}, got NaN or infinite ones for {where}"
        return None

    def features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return by head what statistics are measured on: the teachers' patches or, if only they count, embeddings."""
        return {
            name: one.features if self.weights.grid else one.image_embeds
            for name, one in self.targets_by_head(batch).items()
        }

    def _losses(
        self,
        name: str,
        outputs: APMModelOutput,
        head: DistillationTargets,
        locations: dict[tuple[int, int], Tensor],
        weights: LossWeights,
    ) -> dict[str, Tensor]:
        targets = head.at(locations.get(head.grid))
        statistics = {
            kind: torch.tensor(value, dtype=torch.float32, device=targets.features.device)
            for kind, value in self.architecture.teacher_head(name).items()
            if kind in ("feature_mean", "feature_std") and value is not None
        }
        return distillation_losses(outputs, targets, weights, distance=self.distance, **statistics)
