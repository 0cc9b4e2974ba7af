"""A photo and labels -> the teacher's scores against the APM's, while the APM adapts to the photo.

Source: test-time training, arXiv:2410.20535, section 4. A model that is fitted to the end repeats its teacher; what
it said before is shown beside.

Legend: K labels, F feature width.
"""

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..islands.figures import figure_pixels, new_figure
from ..teachers import Teacher
from ..teachers.zero_shot import class_embeds, classify
from ..ttt import TTTConfig, TTTStep, adapt
from .models import AppModels
from .pictures import Picture

_FRAMES = 10  # shown on the way, about
_ORANGE = "#D55E00"  # of Okabe & Ito, as in `style.css`
_GREY = "#777777"  # read on white and on black alike


@dataclass(frozen=True)
class Progress:
    """How far an adaptation is.

    Args:
        step: updates taken.
        cosines: step and cosine between the student's pooled feature, of the whole grid, and the teacher's embedding,
            so far.
        teacher: `(K,)` probabilities, the teacher's.
        before: `(K,)`, the student's before the first update.
        now: `(K,)`, the student's.
    """

    step: int
    cosines: tuple[tuple[int, float], ...]
    teacher: list[float]
    before: list[float]
    now: list[float]


def adaptation(
    models: AppModels,
    photo: Image.Image,
    labels: Sequence[str],
    *,
    start: str = "model",
    num_steps: int = 60,
    seed: int = 0,
) -> Iterator[Progress]:
    """Adapt to a photo with the recipe `fast`; yields every few steps, the last time after all of them.

    The fit goes on while what was yielded is drawn, and ends early where nobody asks for the rest.

    Args:
        labels: K.
        start: `"model"` adapts the distilled APM, unless it is dense, `"random"` one with new weights.
        num_steps: gradient steps.

    Raises:
        ValueError: without a teacher that knows the labels, for a dense APM to start from, or where the fit diverges.
    """
    if start == "model" and not models.adaptable.is_fitted:
        raise ValueError("This APM reads its teacher and cannot be adapted: please start from random weights.")
    apm = models.adaptable
    config = TTTConfig.preset("fast", steps=num_steps, start=start, seed=seed)
    teacher = _check_teacher(models.teacher, labels)
    texts = class_embeds(teacher, list(labels)).cpu()  # (K, F)
    target = teacher.encode_images([photo]).image_embeds
    assert target is not None
    pixel_values = apm.image_processor([photo], return_tensors="pt")["pixel_values"]
    column = apm.trigger_column([photo])
    student, updates = copy.deepcopy(apm.bare_model), list[Progress]()

    def scores(embeds: Tensor) -> list[float]:
        return classify(embeds.cpu(), texts, logit_scale=teacher.logit_scale)[0].softmax(dim=-1).tolist()

    teachers_scores = scores(target)

    def progress(step: int, weights: dict[str, Tensor]) -> Progress:
        student.load_state_dict(weights)
        with torch.no_grad():
            inputs = pixel_values.to(student.device)
            embeds = student(inputs, trigger_column=column, return_dict=True).pooler_output.float()
        cosine = float(F.cosine_similarity(embeds, target.to(embeds)))
        now, past = scores(embeds), updates[-1].cosines if updates else ()
        before = updates[0].now if updates else now
        updates.append(Progress(step, (*past, (step, cosine)), teachers_scores, before, now))
        return updates[-1]

    seen: SimpleQueue[Progress | BaseException | None] = SimpleQueue()
    closed, every = threading.Event(), max(1, num_steps // _FRAMES)

    def callback(step: TTTStep) -> None:
        if closed.is_set():
            raise _Closed
        if step.step % every == 0:
            seen.put(progress(step.step, step.state_dict(0)))

    def fit() -> None:
        try:
            adapted = adapt(
                apm.bare_model, pixel_values, target, config=config, trigger_column=column, callback=callback
            )
            if adapted.diverged.any():
                raise ValueError("The fit diverged: please take fewer steps or another photo.")
            seen.put(progress(num_steps, adapted.state_dict(0)))
            seen.put(None)
        except BaseException as error:  # raised again where it is waited for
            seen.put(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    try:
        while (update := seen.get()) is not None:
            if isinstance(update, BaseException):
                raise update
            yield update
    finally:
        closed.set()
        thread.join()


def curve_picture(progress: Progress, num_steps: int) -> Picture:
    """How close the student has come to its teacher, step by step."""
    steps, cosines = zip(*progress.cosines, strict=True)
    figure = new_figure(5.2, 3.1, dpi=150)
    axes = figure.add_axes((0.13, 0.19, 0.84, 0.76))
    axes.axhline(1, color=_GREY, linestyle=(0, (4, 3)), linewidth=1)
    axes.annotate("the teacher's embedding", (0.99, 1), xycoords=("axes fraction", "data"), xytext=(0, -4),
                  textcoords="offset points", ha="right", va="top", color=_GREY, fontsize=11)  # fmt: skip
    axes.plot(steps, cosines, color=_ORANGE, linewidth=2.5, marker="o", markersize=5, clip_on=False)
    axes.set(xlim=(0, num_steps), ylim=(min(0.0, min(cosines)), 1.04))
    axes.set_xlabel("step", fontsize=12, color=_GREY)
    axes.set_ylabel("cosine to the target", fontsize=12, color=_GREY)
    axes.tick_params(labelsize=11, colors=_GREY)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_GREY)
    note = f"cosine to the teacher's embedding {cosines[0]:.2f} before, {cosines[-1]:.2f} after {progress.step} steps"
    return Picture("Adaptation", Image.fromarray(figure_pixels(figure, transparent=True)), note)


class _Closed(Exception):
    """Nobody waits for the rest of the fit."""


def _check_teacher(teacher: Teacher | None, labels: Sequence[str]) -> Teacher:
    if teacher is None or not (teacher.has_text or teacher.class_names):
        raise ValueError(
            "Labels need a teacher that reads: please start the app with --teacher and a CLIP-like model."
        )
    if not teacher.has_text:
        others = [label for label in labels if label not in (teacher.class_names or ())]
        if others:
            raise ValueError(
                f"This teacher is a classifier and knows its own labels alone, which “{others[0]}” is not."
            )
    return teacher
