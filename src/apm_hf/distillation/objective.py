"""What a student is trained for: what its teachers answer, where it is asked, and how far off it is.

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
from .losses import LossWeights, distillation_losses
from .targets import Question, TargetMaker, ask_all

MAIN = ""  # the main head's name among those of further teachers


class Objective:
    """Targets and losses for batches of images.

    Args:
        architecture: the student's.
        targets: asks the teachers.
        weights: of the losses; those of colours and levels are the main teacher's alone.
        num_locations: random patches of each teacher that are asked about in training; None is all of them.
        jitter: whether teachers' grids are moved by a random part of a patch in training.
    """

    def __init__(
        self,
        architecture: APMConfig,
        targets: TargetMaker,
        weights: LossWeights,
        *,
        num_locations: int | None = None,
        jitter: bool = False,
    ):
        self.architecture, self.targets, self.weights = architecture, targets, weights
        self.num_locations, self.jitter = num_locations, jitter
        self.asking: Callable[[], AbstractContextManager] = nullcontext  # entered around the teachers' answers

    @property
    def used(self) -> set[str]:
        """Fields of a student's output that the losses look at."""
        weights = self.weights
        fields = {"last_hidden_state": weights.grid, "pooler_output": weights.cls, "rgb": weights.rgb}
        fields |= {"levels": weights.level, "teacher_features": weights.grid, "teacher_embeds": weights.cls}
        return {name for name, weight in fields.items() if weight}

    def questions(
        self, batch: dict[str, Tensor], shift: tuple[float, float] = (0.0, 0.0)
    ) -> tuple[Question, dict[str, Question]]:
        """Those to the main head, and to further ones by name.

        Args:
            shift: see [`TargetMaker`].

        Raises:
            ValueError: for targets that are not as wide as the student's answers, or missing.
        """
        main, further = self.targets(batch, shift=shift), self.targets.further(batch, shift=shift)
        for name, question in {MAIN: main, **further}.items():
            wanted = question.targets.features.shape[-1]
            size = self.architecture.teacher_head(name)["feature_size"]
            if wanted != size:
                head = f" of head {name!r}" if name else ""
                raise ValueError(f"feature_size{head}: expected the targets' {wanted}, got {size}")
        num_levels = self.architecture.num_levels
        if num_levels and main.targets.levels is None and self.weights.level:
            raise ValueError(
                f"levels: expected targets for the student's {num_levels} levels, got none; give level_layers, or "
                "level_weight=0 to leave them as they are"
            )
        return main, further

    def losses(self, student: Any, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The losses by name, those of a further teacher as `NAME/loss_grid`, and their sum, `loss`.

        Args:
            student: an [`APMModel`], or what wraps one.
            generator: of the moves and the locations, on the CPU.
        """
        shift = (0.0, 0.0)
        if self.jitter:
            down, right = (torch.rand(2, generator=generator) - 0.5).tolist()
            shift = (down, right)
        with self.asking():
            main, further = self.questions(batch, shift)
        pixel_values = batch["pixel_values"]
        locations: dict[tuple[int, int], Tensor] = {}
        grids = {one.grid: one.targets.features.shape[1] for one in (main, *further.values())}
        for grid, num_targets in grids.items():
            if self.num_locations is not None and self.num_locations < num_targets:
                drawn = torch.randperm(num_targets, generator=generator)[: self.num_locations]
                locations[grid] = drawn.to(pixel_values.device)
        outputs, others = ask_all(student, pixel_values, main, further, locations)
        losses = self._losses(MAIN, outputs, main, locations, self.weights)
        for name, answers in others.items():
            weights = replace(self.weights, rgb=0.0, level=0.0)
            own = self._losses(name, answers, further[name], locations, weights)
            losses["loss"] = losses["loss"] + own.pop("loss")
            losses |= {f"{name}/{loss}": value for loss, value in own.items()}
        return losses

    def answers(self, student: Any, batch: dict[str, Tensor]) -> dict[str, tuple[APMModelOutput, Question]]:
        """What every head answers at all patches of its teacher, beside what it was asked; the main one is `MAIN`."""
        main, further = self.questions(batch)
        outputs, others = ask_all(student, batch["pixel_values"], main, further, {})
        return {MAIN: (outputs, main), **{name: (others[name], further[name]) for name in further}}

    def not_finite(self, batch: dict[str, Tensor]) -> str | None:
        """Which images a teacher answers NaN or infinity to, by their `index` where they have one; None for none."""
        main, further = self.questions(batch)
        for name, question in {MAIN: main, **further}.items():
            targets = question.targets
            finite = targets.image_embeds.isfinite().all(dim=1) & targets.features.isfinite().flatten(1).all(dim=1)
            if not finite.all():
                places = (~finite).nonzero().flatten()
                where = f"rows {batch['index'][places].tolist()}" if "index" in batch else f"images {places.tolist()}"
                teacher = f"the teacher of head {name!r}" if name else "the teacher"
                return f"expected finite features of {teacher}, got NaN or infinite ones for {where}"
        return None

    def features(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """By head, what statistics are measured on: the teachers' patches, or, where only they count, embeddings."""
        main, further = self.questions(batch)
        targets = {name: question.targets for name, question in {MAIN: main, **further}.items()}
        return {name: one.features if self.weights.grid else one.image_embeds for name, one in targets.items()}

    def _losses(
        self,
        name: str,
        answers: APMModelOutput,
        question: Question,
        locations: dict[tuple[int, int], Tensor],
        weights: LossWeights,
    ) -> dict[str, Tensor]:
        targets = question.targets.at(locations.get(question.grid))
        std = self.architecture.teacher_head(name)["feature_std"]
        if std is not None:
            std = torch.tensor(std, dtype=torch.float32, device=targets.features.device)
        return distillation_losses(answers, targets, weights, feature_std=std)
