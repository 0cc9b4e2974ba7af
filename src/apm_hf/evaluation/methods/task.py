"""Define the inputs and outputs of an evaluation's methods.

A method receives a batch of images, the teacher and the classes; never a label. The teacher's embeddings of an image's
views are computed once and shared between methods; their cost is charged to every method that uses them.

Legend: B images, V views, K classes, F width of the teacher's embeddings.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import PIL.Image
import torch
from torch import Tensor

from ...teachers import DEFAULT_TEMPLATES, Teacher
from ...teachers.zero_shot import ENSEMBLE_TEMPLATES, class_embeds


@dataclass(frozen=True)
class ZeroShotTask:
    """Hold a teacher and the classes to distinguish.

    Args:
        teacher: frozen model that computes the embeddings.
        class_names: K names; of equal names the first is predicted.
        templates, ensemble_templates: prompts, one and many.
        text_embeds, ensemble_text_embeds: `(K, F)`, unit rows on the teacher's device.
    """

    teacher: Teacher
    class_names: list[str]
    templates: tuple[str, ...]
    ensemble_templates: tuple[str, ...]
    text_embeds: Tensor
    ensemble_text_embeds: Tensor

    @classmethod
    def build(
        cls,
        teacher: Teacher,
        class_names: Sequence[str],
        *,
        templates: Sequence[str] = DEFAULT_TEMPLATES,
        ensemble_templates: Sequence[str] = ENSEMBLE_TEMPLATES,
    ) -> "ZeroShotTask":
        """Build the task and encode its texts once."""
        single = class_embeds(teacher, class_names, templates)
        # A classifier's weights are its class embeddings: there are no prompts to average.
        ensemble = class_embeds(teacher, class_names, ensemble_templates) if teacher.has_text else single
        names = list(class_names), tuple(templates), tuple(ensemble_templates)
        return cls(teacher, *names, single, ensemble)


@dataclass(frozen=True, kw_only=True)
class MethodOutput:
    """Hold the predictions for B images.

    Args:
        logits: `(B, K)`, float32, on the CPU; their softmax is the method's confidence.
        steps: `(B,)`, gradient steps taken, if any.
        by_step: step -> `(B,)`, the class predicted after that step; for curves and for the oracle, which picks the
            step with labels and is unattainable.
    """

    logits: Tensor
    steps: Tensor | None = None
    by_step: dict[int, Tensor] | None = None


class Method(Protocol):
    """Predict classes. An image's prediction may depend on its batch only if `name` says so (batch statistics).

    Attributes:
        name: name in result files: lower case, digits and underscores.
        title: title in tables.
        num_views: number of views of an image that it uses, the image itself included.
        baseline: name of the method that only queries the teacher with the same views; None for baselines.
        sequential: whether it needs the preceding images (`ImageBatch.earlier`).
    """

    name: str
    title: str
    num_views: int
    baseline: str | None
    sequential: bool

    def __call__(self, task: ZeroShotTask, batch: "ImageBatch") -> MethodOutput: ...


@dataclass
class ImageBatch:
    """Hold B images and the teacher's embeddings of their views.

    Args:
        images: upright 8-bit RGB, already corrupted where requested.
        indices: indices of the images in their data set.
        seeds: one per image, independent of the batch: seeds of views and of anything else that is drawn.
        encode: `(batch, view)` -> `(B, F)`, the teacher's embeddings of view number `view` of every image.
        earlier: `(N, F)`, embeddings of view 0 of all images before this batch, for sequential methods.
    """

    images: list[PIL.Image.Image]
    indices: list[int]
    seeds: list[int]
    encode: Callable[["ImageBatch", int], Tensor]
    earlier: Tensor | None = None
    view_seconds: list[float] = field(default_factory=list)
    num_used_views: int = 0
    _views: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def embeds(self, num_views: int = 1) -> Tensor:
        """Return `(B, V, F)`, float32, not normalised; view 0 is the image as the teacher's processor prepares it."""
        while len(self._views) < num_views:
            started = time.perf_counter()
            self._views.append(self.encode(self, len(self._views)))
            self.view_seconds.append(time.perf_counter() - started)
        self.num_used_views = max(self.num_used_views, num_views)
        return torch.stack(self._views[:num_views], dim=1)

    def timed(self, method: Method, task: ZeroShotTask) -> tuple[MethodOutput, float]:
        """Return the method's output and its seconds, including the time of cached views when first computed."""
        self.num_used_views, before = 0, sum(self.view_seconds)
        started = time.perf_counter()
        output = method(task, self)
        method_seconds = time.perf_counter() - started - (sum(self.view_seconds) - before)
        return output, method_seconds + sum(self.view_seconds[: self.num_used_views])


def method_options(method: Any) -> dict[str, Any]:
    """Return the options specific to a method, for the file that describes a run."""
    common = Method.__annotations__
    return {key: value for key, value in vars(method).items() if key not in common and value is not None}
