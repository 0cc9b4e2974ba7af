"""Classify zero-shot: image embeddings and class embeddings in, logits and labels out.

A class is an embedding, of a prompt such as "a photo of a {}." or of a classifier's weights
([`Teacher.encode_text`]); an image belongs to the class whose embedding has the most similar direction
(CLIP, arXiv:2103.00020, Sec. 3.1.2). Averaging several prompts per class helps (Sec. 3.1.4).

Shapes: B images, K classes, F width of the shared space.
"""

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..runs.files import read_text
from . import DEFAULT_LOGIT_SCALE, DEFAULT_TEMPLATES, Teacher, first_five

# Generic prompts in the style of CLIP's ensembles (arXiv:2103.00020, Sec. 3.1.4): they vary how well and how closely
# the object is visible, not what it is.
ENSEMBLE_TEMPLATES = (
    *DEFAULT_TEMPLATES,
    "a blurry picture of a {}.",
    "a {} seen from close by.",
    "a {} in the distance.",
    "a cropped snapshot of a {}.",
    "a drawing of a {}.",
    "a dark photo showing a {}.",
)

SAME = 1e-6  # of 1 - cosine, which batches of other sizes change by less


@dataclass(frozen=True)
class Prediction:
    """Hold a class name and its probability, in [0, 1]."""

    label: str
    score: float


def class_embeds(teacher: Teacher, class_names: Sequence[str], templates: Sequence[str] = DEFAULT_TEMPLATES) -> Tensor:
    """Return `(K, F)` of [`Teacher.encode_text`]; names may repeat, as in ImageNet, and then have equal rows."""
    unique = list(dict.fromkeys(class_names))
    return teacher.encode_text(unique, templates)[[unique.index(name) for name in class_names]]


def same_words(text_embeds: Tensor, class_names: Sequence[str]) -> list[list[str]]:
    """Return groups of classes whose embeddings have the same direction: no image can tell such classes apart.

    Names that differ only where a tokenizer cuts, or in case for one that ignores it, are such classes.

    Args:
        text_embeds: `(K, F)`.
        class_names: K names.
    """
    unit, groups, grouped = _unit_rows(text_embeds, "text_embeds"), [], set[int]()
    for row in range(len(unit)):
        if row not in grouped:
            same = (unit[row:] @ unit[row] > 1 - SAME).nonzero().flatten() + row
            grouped.update(same.tolist())
            groups.append([class_names[other] for other in same.tolist()])
    return [group for group in groups if len(group) > 1]


def classify(image_embeds: Tensor, text_embeds: Tensor, *, logit_scale: float = DEFAULT_LOGIT_SCALE) -> Tensor:
    """Score every image against every class by cosine similarity.

    Args:
        image_embeds: `(B, F)`, of any norm and floating type; gradients flow.
        text_embeds: `(K, F)`, likewise.
        logit_scale: Factor on the cosines, e.g. [`Teacher.logit_scale`]: the inverse temperature of the softmax.

    Returns:
        `(B, K)` logits in float32, from -logit_scale to logit_scale.

    Raises:
        ValueError: Widths that differ; rows (named by index) that are zero or not finite.
    """
    if image_embeds.ndim != 2 or text_embeds.ndim != 2 or image_embeds.shape[1] != text_embeds.shape[1]:
        raise ValueError(
            "Expected image_embeds (B, F) and text_embeds (K, F) of the same width F, "
            f"got {tuple(image_embeds.shape)} and {tuple(text_embeds.shape)}."
        )
    return logit_scale * _unit_rows(image_embeds, "image_embeds") @ _unit_rows(text_embeds, "text_embeds").T


def _unit_rows(embeds: Tensor, what: str) -> Tensor:
    embeds = embeds.float()
    # Dividing by the largest entry first avoids underflow and overflow in the sum of squares.
    largest = embeds.detach().abs().amax(dim=1, keepdim=True)
    for bad, kind in ((~torch.isfinite(largest), "NaN or infinity"), (largest == 0, "only zeros")):
        if rows := bad.flatten().nonzero().flatten().tolist():
            raise ValueError(f"Expected {what} with a direction, got {kind} in row {first_five(rows)}.")
    embeds = embeds / largest
    return embeds / embeds.norm(dim=1, keepdim=True)


def topk(logits: Tensor, class_names: Sequence[str], k: int = 5) -> list[list[Prediction]]:
    """Return the most probable classes.

    Args:
        logits: `(B, K)`.
        class_names: K names, in the order of the logits.
        k: Number of classes, at least 1; capped at K.

    Returns:
        For each image its `min(k, K)` best classes with their softmax probabilities over all K, best first.

    Raises:
        ValueError: Another number of names than logits, k < 1, or logits that are not finite.
    """
    if logits.ndim != 2 or logits.shape[1] != len(class_names) or not class_names:
        raise ValueError(f"Expected logits (B, {len(class_names)}), one per class name, got {tuple(logits.shape)}.")
    if k < 1:
        raise ValueError(f"Expected k to be at least 1, got {k}.")
    if rows := (~torch.isfinite(logits)).any(dim=1).nonzero().flatten().tolist():
        raise ValueError(f"Expected finite logits, got NaN or infinity in row {first_five(rows)}.")
    scores, classes = logits.float().softmax(dim=1).topk(min(k, len(class_names)), dim=1)  # (B, K) -> (B, k)
    return [
        [Prediction(class_names[row], score) for row, score in zip(rows, row_scores, strict=True)]
        for rows, row_scores in zip(classes.tolist(), scores.tolist(), strict=True)
    ]


def read_labels(path: str | os.PathLike[str]) -> list[str]:
    """Read class names from a text file, one per line (UTF-8, blank lines skipped), or from a JSON list of strings.

    Raises:
        ValueError: No names, names that occur twice, text that is not UTF-8, a JSON list of other things, what is no
            file, more than two megabytes.
        OSError: The file cannot be read.
    """
    path, text = Path(path), read_text(path, "labels")
    if path.suffix.lower() == ".json" or text.lstrip().startswith("["):
        try:
            labels = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"Expected a JSON list of strings in {path}: {error}.") from error
        if not isinstance(labels, list) or not all(isinstance(label, str) and label.strip() for label in labels):
            raise ValueError(f"Expected a JSON list of strings, none of them blank, in {path}.")
    else:
        labels = text.split("\n")  # not splitlines(), which breaks at more than line ends
    labels = [label.strip() for label in labels if label.strip()]
    if not labels:
        raise ValueError(f"Expected at least one label in {path}, got none.")
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
        raise ValueError(f"Expected different labels in {path}, got more than once: {first_five(repeated)}.")
    return labels
