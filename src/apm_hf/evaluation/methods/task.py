"""What every method of an evaluation is given and what it gives back.

A method sees a batch of images, the teacher and the classes; never a label. The teacher's embeddings of an image's
views are taken once and shared between methods, and what they cost is charged to every method that asked for them.

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
    """A teacher and the classes to tell apart.

    Args:
        teacher: frozen; gives the embeddings.
        class_names: K names; of several equal ones the first is predicted.
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
        """Encode the texts, once."""
        single = class_embeds(teacher, class_names, templates)
        # A classifier's weights are its class embeddings: it has no prompts to average.
        ensemble = class_embeds(teacher, class_names, ensemble_templates) if teacher.has_text else single
        names = list(class_names), tuple(templates), tuple(ensemble_templates)
        return cls(teacher, *names, single, ensemble)


@dataclass(frozen=True, kw_only=True)
class MethodOutput:
    """Answers for B images.

    Args:
        logits: `(B, K)`, float32, on the CPU; their softmax is the method's confidence.
        steps: `(B,)`, gradient steps taken, where there were any.
        by_step: step -> `(B,)`, the class predicted after so many steps; for curves and for the oracle, which picks
            the step with labels and is unattainable.
    """

    logits: Tensor
    steps: Tensor | None = None
    by_step: dict[int, Tensor] | None = None


class Method(Protocol):
    """A way to predict. Its answer for an image may depend on its batch only where `name` says so (batch statistics).

    Attributes:
        name: in result files: lower case, digits and underscores.
        title: in tables.
        num_views: views of an image that it looks at, the image itself included.
        baseline: the name of the method that does nothing but ask the teacher about the same views; None for those.
        sequential: whether it needs the images before it (`ImageBatch.earlier`).
    """

    name: str
    title: str
    num_views: int
    baseline: str | None
    sequential: bool

    def __call__(self, task: ZeroShotTask, batch: "ImageBatch") -> MethodOutput: ...


@dataclass
class ImageBatch:
    """B images and what the teacher says of their views.

    Args:
        images: upright 8-bit RGB, corrupted already where that is asked.
        indices: of the images in their data set.
        seeds: one an image, the same whatever batch it is in: of views and of anything else that is drawn.
        encode: `(images, view)` -> `(B, F)`, the teacher's embeddings of everybody's view of that number.
        earlier: `(N, F)`, embeddings of view 0 of all images before this batch, for sequential methods.
    """

    images: list[PIL.Image.Image]
    indices: list[int]
    seeds: list[int]
    encode: Callable[["ImageBatch", int], Tensor]
    earlier: Tensor | None = None
    view_seconds: list[float] = field(default_factory=list)
    asked: int = 0
    _views: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)

    def embeds(self, num_views: int = 1) -> Tensor:
        """`(B, V, F)`, float32, not normalised; view 0 is the image as the teacher's own processor takes it."""
        while len(self._views) < num_views:
            started = time.perf_counter()
            self._views.append(self.encode(self, len(self._views)))
            self.view_seconds.append(time.perf_counter() - started)
        self.asked = max(self.asked, num_views)
        return torch.stack(self._views[:num_views], dim=1)

    def timed(self, method: Method, task: ZeroShotTask) -> tuple[MethodOutput, float]:
        """The method's answer and its seconds; views cost what they cost whoever asked first."""
        self.asked, before = 0, sum(self.view_seconds)
        started = time.perf_counter()
        output = method(task, self)
        own = time.perf_counter() - started - (sum(self.view_seconds) - before)
        return output, own + sum(self.view_seconds[: self.asked])


def options_of(method: Any) -> dict[str, Any]:
    """What a method was built with beyond what every method has, for the file that describes a run."""
    common = Method.__annotations__
    return {key: value for key, value in vars(method).items() if key not in common and value is not None}
