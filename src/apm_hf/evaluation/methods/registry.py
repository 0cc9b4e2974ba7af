"""Register methods by name, and define those that need only the teacher's embeddings.

* one prompt, and an ensemble of prompts averaged per class (CLIP, arXiv:2103.00020, Secs. 3.1.2 and 3.1.4);
* the mean embedding of several views, the baseline of every method that uses several views;
* NEO (Murphy et al., ICLR 2026, arXiv:2510.05635): embeddings are re-centred before they are classified. A corruption
  moves all embeddings alike; the shift is the mean of the corrupted embeddings less that of clean ones, and the clean
  mean is the origin for a classifier trained to neural collapse on balanced classes (Prop. 4.2). So the mean of the
  given embeddings is subtracted, and no clean data are needed. The paper shows this for classifiers' last features.
  A dual encoder's clean embeddings have a nonzero mean, which is subtracted too; text embeddings are unchanged.

Legend: B images, V views, K classes, F width of the teacher's embeddings.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

from ...teachers import Teacher
from ...teachers.zero_shot import classify
from .adapted import APMAdapted, APMForward
from .prompt_tuning import TPT
from .task import ImageBatch, Method, MethodOutput, ZeroShotTask
from .votes import MTA, NUM_VIEWS, Zero, check_views, mean_direction, recentred


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Predict with the teacher alone.

    Args:
        ensemble: average many prompts per class.
    """

    name: str = "zero_shot"
    title: str = "Zero-shot"
    num_views: int = 1
    baseline: str | None = None
    sequential: bool = False
    ensemble: bool = False

    def __post_init__(self) -> None:
        if self.num_views != 1:
            raise ValueError(f"num_views: expected 1, the image itself, got {self.num_views}")

    def __call__(self, task: ZeroShotTask, batch: ImageBatch) -> MethodOutput:
        texts = task.ensemble_text_embeds if self.ensemble else task.text_embeds
        return MethodOutput(logits=classify(batch.embeds()[:, 0], texts, logit_scale=task.teacher.logit_scale).cpu())


@dataclass(frozen=True, kw_only=True)
class MeanViews:
    """Classify the mean of the views' directions.

    Args:
        keep: share of the views, the most confident ones by entropy.
    """

    name: str = "mean_views"
    title: str = "Mean of views"
    num_views: int = NUM_VIEWS
    baseline: str | None = None
    sequential: bool = False
    keep: float = 1.0

    def __post_init__(self) -> None:
        check_views(self.num_views, self.keep)

    def __call__(self, task: ZeroShotTask, batch: ImageBatch) -> MethodOutput:
        embeds = mean_direction(task, batch.embeds(self.num_views), self.keep)
        return MethodOutput(logits=classify(embeds, task.text_embeds, logit_scale=task.teacher.logit_scale).cpu())


@dataclass(frozen=True, kw_only=True)
class Recentred:
    """Apply NEO: subtract the mean of all available embeddings from the image's, or from its views' mean direction.

    A single image is classified unchanged.

    Args:
        sequential: take the mean over this batch and all images before it, each counted once; else over this batch.
    """

    name: str = "recentred_batch"
    title: str = "Re-centred by the batch (NEO)"
    num_views: int = 1
    baseline: str | None = "zero_shot"
    sequential: bool = False

    def __post_init__(self) -> None:
        check_views(self.num_views)
        if self.sequential and self.num_views != 1:
            raise ValueError(f"num_views: expected 1 with sequential, got {self.num_views}")

    def __call__(self, task: ZeroShotTask, batch: ImageBatch) -> MethodOutput:
        """
        Raises:
            ValueError: if the preceding images are needed but not given.
        """
        if self.sequential and batch.earlier is None:
            raise ValueError(f"{self.name}: expected the embeddings of the images before this batch, got none")
        views = batch.embeds(self.num_views)
        embeds = views[:, 0] if self.num_views == 1 else mean_direction(task, views)
        embeds = recentred(embeds, batch.earlier if self.sequential else None)
        return MethodOutput(logits=classify(embeds, task.text_embeds, logit_scale=task.teacher.logit_scale).cpu())


_KEEP = 0.3  # share of the views in a target: larger than for voting, since embeddings are averaged
_STABLE = {"stop": "stable"}
_PLATEAU = {"stop": "plateau", "stop_threshold": 0.05}
_ON_VIEWS: dict[str, Any] = {"num_views": NUM_VIEWS, "baseline": "mean_views"}

_FACTORIES: list[Callable[[], Any]] = [
    partial(ZeroShot),
    partial(ZeroShot, name="ensemble", title="Prompt ensemble", baseline="zero_shot", ensemble=True),
    partial(MeanViews),
    partial(MeanViews, name="confident_views", title="Mean of confident views", baseline="mean_views", keep=_KEEP),
    partial(Recentred),
    partial(Recentred, name="recentred_stream", title="Re-centred by the stream (NEO)", sequential=True),
    partial(Recentred, name="recentred_mean_views", title="Mean of views, re-centred by the batch", **_ON_VIEWS),
    partial(Zero),
    partial(MTA),
    partial(TPT),
    partial(APMAdapted),
    partial(APMAdapted, name="apm_paper", title="APM, the paper's recipe", preset="paper"),
    partial(APMAdapted, name="apm_fast_stable", title="APM, fast, until the class is stable", overrides=_STABLE),
    partial(APMAdapted, name="apm_fast_plateau", title="APM, fast, until the loss stalls", overrides=_PLATEAU),
    partial(APMAdapted, name="apm_fast_views", title="APM, fast, on views", **_ON_VIEWS),
    partial(
        APMAdapted, name="apm_fast_filtered_views", title="APM, fast, on confident views", keep=_KEEP, **_ON_VIEWS
    ),
    partial(APMAdapted, name="apm_fast_recentred", title="APM, fast, on re-centred targets", target="recentred"),
    partial(
        APMAdapted, name="apm_consensus", title="APM, fast, and teacher (probabilities)", consensus="probabilities"
    ),
    partial(
        APMAdapted, name="apm_consensus_embeds", title="APM, fast, and teacher (embeddings)", consensus="embeddings"
    ),
    partial(APMForward),
    partial(APMAdapted, name="apm_distilled_fast", title="APM, distilled, then fast", start="model"),
    partial(
        APMForward,
        name="apm_distilled_consensus",
        title="APM, distilled, and teacher (probabilities)",
        consensus="probabilities",
    ),
    partial(
        APMAdapted,
        name="apm_output_bias",
        title="Control: an output bias is fitted",
        overrides={"fit": "output_bias", "learning_rate": 0.2},  # as measured in docs/test_time_training.md
    ),
    partial(APMForward, name="apm_random", title="Control: APM of random weights", start="random"),
]
METHODS: dict[str, Callable[[], Method]] = {factory().name: factory for factory in _FACTORIES}


def make_methods(
    names: Sequence[str],
    *,
    num_views: int = NUM_VIEWS,
    model: str | None = None,
    seed: int = 0,
    record_steps: bool = True,
    teacher: Teacher | None = None,
) -> list[Method]:
    """Make the methods of these names, in order.

    Args:
        names: keys of `METHODS`, each once.
        num_views: views per image, for methods that use several.
        model: folder or Hub name of a distilled APM, for methods that start from one.
        seed: random seed of models' initial weights and of the locations they are queried at.
        record_steps: whether adapted models record their predictions after fewer steps.
        teacher: checked at once for what the methods need.

    Raises:
        ValueError: for unknown or repeated names, a method without its model or, if `teacher` is given, without its
            text tower.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {', '.join(map(repr, unknown))}")
    if len(set(names)) < len(names):
        raise ValueError(f"methods: expected each once, got {', '.join(names)}")
    check_views(num_views)
    methods = []
    for name in names:
        method: Any = METHODS[name]()
        changes: dict[str, Any] = {}
        if method.num_views > 1:
            changes["num_views"] = num_views
        if getattr(method, "start", None) == "model":
            if model is None:
                raise ValueError(f"{name}: expected a distilled APM, a folder or name, as model, got none")
            changes["model"] = model
        if isinstance(method, APMAdapted):
            changes |= {"record_steps": record_steps, "overrides": {**method.overrides, "seed": seed}}
        elif "seed" in {option.name for option in fields(method)}:
            changes["seed"] = seed
        if isinstance(method, TPT) and teacher is not None:
            method.check(teacher)
        methods.append(replace(method, **changes))
    return methods
