"""Predict with an APM: adapted to each image (arXiv:2410.20535, Sec. 4), or distilled beforehand and only queried.

The teacher's embeddings are those that the other methods get too; a student receives the image itself. A student
fitted to convergence reproduces its target, so differences from the baseline come from the target, from early stopping
or from what a distilled student learnt before.

Legend: B images, V views, K classes, F width of the teacher's embeddings, S the student's image side.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional as F

from ...configuration_apm import APMConfig
from ...pair import APM
from ...teachers import Teacher, first_five
from ...teachers.zero_shot import classify
from ...ttt import TTTConfig, TTTStep, adapt
from ...ttt.photos import random_model
from .task import ImageBatch, MethodOutput, ZeroShotTask
from .votes import check_views, mean_direction, recentred

STEPS = (1, 2, 3, 5, 8, 10, 15, 20, 30)  # steps after which predictions are recorded, besides the last
TARGETS = ("views", "recentred")
CONSENSUS = (None, "probabilities", "embeddings")
STARTS = ("random", "model")

# A student is shared by all methods that need the same one, as long as its teacher is alive.
_STUDENTS: WeakKeyDictionary[Teacher, dict[Any, APM]] = WeakKeyDictionary()


@dataclass(frozen=True, kw_only=True)
class APMAdapted:
    """Fit a student to the teacher's embedding of each image, then classify the student's embedding.

    All images start from the same weights, so a prediction does not depend on the batch, except for the target
    `"recentred"`. A target made of several embeddings is scaled to the norm of the teacher's embedding of the image,
    for which the learning rates were chosen.

    Args:
        num_views: number of views that the target is made of.
        preset, overrides: the recipe, see [`TTTConfig.preset`]; its `start` is given here.
        start: `"random"` for a fresh `clip-ttt` as wide as the teacher, `"model"` for `model`.
        model: folder or Hub name of the student to start from, with its image processor.
        target: `"views"`: the mean direction of the views, for one view the unchanged embedding of the teacher;
            `"recentred"`: that, minus the batch's mean.
        keep: share of the views in the target, the most confident ones by entropy.
        consensus: `"probabilities"` or `"embeddings"`: predict with the mean of the student's and the target's, for
            embeddings of their directions. None: the student alone.
        record_steps: also record the predictions after fewer steps.

    Raises:
        ValueError: for an option outside its range.
    """

    name: str = "apm_fast"
    title: str = "APM, fast"
    num_views: int = 1
    baseline: str | None = "zero_shot"
    sequential: bool = False
    preset: str = "fast"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    start: str = "random"
    model: str | None = None
    target: str = "views"
    keep: float = 1.0
    consensus: str | None = None
    record_steps: bool = False

    def __post_init__(self) -> None:
        check_views(self.num_views, self.keep)
        _check_choice(self, target=TARGETS, consensus=CONSENSUS, start=STARTS)
        _ = self.config  # raises if an override is out of range

    @property
    def config(self) -> TTTConfig:
        """The settings of the fits: the preset with the method's own values."""
        return TTTConfig.preset(self.preset, **{**self.overrides, "start": self.start})

    def __call__(self, task: ZeroShotTask, batch: ImageBatch) -> MethodOutput:
        """
        Raises:
            ValueError: for a student that does not fit the teacher, or if a fit diverged, naming the images.
        """
        config = self.config
        # Random weights are drawn once for all batches.
        student = load_student(task.teacher, self.start, self.model, seed=config.seed)
        model, image_processor = student.bare_model, student.image_processor
        views = batch.embeds(self.num_views)  # (B, V, F)
        targets = self.targets(task, views)
        pixel_values = image_processor(list(batch.images), return_tensors="pt")["pixel_values"]  # (B, 3, S, S)
        recorded: dict[int, Tensor] = {}

        def record(step: TTTStep) -> None:  # called before the update of a step, i.e. after `step.step` updates
            if step.step in STEPS:
                classes = recorded.setdefault(step.step, torch.full((len(targets),), -1))
                sound = step.image_embeds.isfinite().all(dim=1).cpu()
                images = step.images[sound]
                embeds = step.image_embeds[sound.to(step.image_embeds.device)]
                classes[images] = self.predict(task, embeds, targets[images.to(targets.device)]).argmax(dim=1)

        adapted = adapt(
            model,
            pixel_values,
            targets,
            config=replace(config, start="model"),
            trigger_column=views[:, 0] if model.config.trigger_source == "embedding" else None,
            text_embeds=task.text_embeds if config.stop == "stable" else None,
            callback=record if self.record_steps else None,
            keep_models=False,
        )
        if adapted.diverged.any():
            images = [batch.indices[row] for row in adapted.diverged.nonzero().flatten().tolist()]
            raise ValueError(
                f"{self.name}: expected fits that converge, got divergence for the images {first_five(images)}"
            )
        logits, steps = self.predict(task, adapted.image_embeds, targets), adapted.steps.cpu()
        if not self.record_steps:
            return MethodOutput(logits=logits, steps=steps)
        last = logits.argmax(dim=1)
        by_step = {  # an image that stopped keeps its prediction
            step: torch.where(steps > step, recorded.get(step, last), last) for step in STEPS if step < config.steps
        }
        return MethodOutput(logits=logits, steps=steps, by_step=by_step | {config.steps: last})

    def targets(self, task: ZeroShotTask, views: Tensor) -> Tensor:
        """Return targets `(B, F)` for the teacher's embeddings `(B, V, F)` of the views."""
        image = views[:, 0]
        if self.num_views == 1 and self.target == "views":
            return image
        direction = image if self.num_views == 1 else mean_direction(task, views, self.keep)
        direction = recentred(direction) if self.target == "recentred" else direction
        return F.normalize(direction, dim=1) * image.norm(dim=1, keepdim=True)

    def predict(self, task: ZeroShotTask, embeds: Tensor, targets: Tensor) -> Tensor:
        """Return logits `(B, K)` on the CPU for the students' embeddings `(B, F)` and their targets `(B, F)`."""
        return _consensus(task, embeds, targets, self.consensus)


@dataclass(frozen=True, kw_only=True)
class APMForward:
    """Predict with a student without adaptation: a distilled one or, as a control, one with random weights.

    Args:
        start: `"model"` for `model`, `"random"` for a fresh `clip-ttt` as wide as the teacher.
        model: folder or Hub name of a student with its image processor.
        seed: random seed of the weights.
        consensus: as in [`APMAdapted`], with the teacher's embedding of the image.
    """

    name: str = "apm_distilled"
    title: str = "APM, distilled"
    num_views: int = 1
    baseline: str | None = "zero_shot"
    sequential: bool = False
    start: str = "model"
    model: str | None = None
    seed: int = 0
    consensus: str | None = None

    def __post_init__(self) -> None:
        _check_choice(self, consensus=CONSENSUS, start=STARTS)
        if self.num_views != 1:
            raise ValueError(f"num_views: expected 1, since the student gets the image itself, got {self.num_views}")

    @torch.no_grad()
    def __call__(self, task: ZeroShotTask, batch: ImageBatch) -> MethodOutput:
        student = load_student(task.teacher, self.start, self.model, seed=self.seed)
        model, image_processor = student.bare_model, student.image_processor
        routed = model.config.trigger_source == "embedding"
        # Only computed if needed: a distilled student can do without its teacher.
        targets = batch.embeds()[:, 0] if routed or self.consensus else None
        pixel_values = image_processor(list(batch.images), return_tensors="pt")["pixel_values"].to(model.device)
        triggers = targets if routed else None
        # One image at a time: it has a thousand locations, each as wide as the model.
        embeds = [
            model.pooled_features(
                pixel_values[row : row + 1], trigger_column=None if triggers is None else triggers[row : row + 1]
            )
            for row in range(len(pixel_values))
        ]
        return MethodOutput(logits=_consensus(task, torch.cat(embeds).float(), targets, self.consensus))


def load_student(teacher: Teacher, start: str, model: str | None, *, seed: int) -> APM:
    """Load a student that fits the teacher, on its device; the same object for the same arguments.

    Args:
        start: `"model"` for the given one, `"random"` for a fresh `clip-ttt` as wide as the teacher, with a
            matching image processor.
        model: folder or Hub name.
        seed: random seed of a fresh student's weights.

    Raises:
        ValueError: for a missing model, or one that is no APM or of another width than the teacher.
    """
    if start == "model" and model is None:
        raise ValueError("model: expected the folder or name of a distilled APM, got none")
    students = _STUDENTS.setdefault(teacher, {})
    key = model if start == "model" else seed
    if key not in students:
        config = APMConfig.preset("clip-ttt", feature_size=teacher.feature_size)
        pair = APM.load(model if start == "model" else random_model(config, seed=seed), teacher=teacher)
        pair.bare_model.requires_grad_(False)
        students[key] = replace(pair, teacher=None)  # or it would keep its teacher from leaving
    return students[key]


def _consensus(task: ZeroShotTask, embeds: Tensor, targets: Tensor | None, how: str | None) -> Tensor:
    texts, scale = task.text_embeds, task.teacher.logit_scale
    if how is None:
        return classify(embeds, texts, logit_scale=scale).cpu()
    assert targets is not None
    if how == "embeddings":
        embeds = F.normalize(embeds, dim=1) + F.normalize(targets, dim=1)
        return classify(embeds, texts, logit_scale=scale).cpu()
    both = [classify(one, texts, logit_scale=scale).log_softmax(dim=1) for one in (embeds, targets)]
    return torch.logaddexp(*both).log_softmax(dim=1).cpu()


def _check_choice(method: Any, **choices: tuple[str | None, ...]) -> None:
    for name, known in choices.items():
        if getattr(method, name) not in known:
            raise ValueError(f"{name}: expected one of {list(known)}, got {getattr(method, name)!r}")
