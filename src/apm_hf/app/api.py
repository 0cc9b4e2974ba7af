"""Offer endpoints to programs: to `gradio_client`, plain HTTP and, where the package `mcp` is installed, MCP.

Their docstrings and type hints are what "Use via API" at the foot of the page shows, and what MCP clients read.

Legend: F feature width, K labels, (rows, cols) a map of locations, row-major.
"""

import functools
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

import gradio as gr
import numpy as np
from PIL import Image

from ..islands.panels import draw_regions
from ..islands.tree import tree_colours
from .labels_tab import adaptation
from .models import AppModels
from .pictures import from_colours
from .uploads import Uploads, check_labels

MAX_STEPS = 200  # gradient steps, as on the page


class IslandMaps(TypedDict):
    """Hold islands as numbers.

    Args:
        heights: numbers of regions, ascending.
        regions: `(3, rows, cols)`, the region of every location at every height, counted from 0.
    """

    heights: list[int]
    regions: list[list[list[int]]]


class Scores(TypedDict):
    """Hold the probabilities of K labels.

    Args:
        labels: K.
        teacher: `(K,)`, the teacher's.
        student_before: `(K,)`, the student's before it adapts to the photo.
        student: `(K,)`, the student's afterwards.
        cosine: between the adapted student's pooled feature and the teacher's embedding.
    """

    labels: list[str]
    teacher: list[float]
    student_before: list[float]
    student: list[float]
    cosine: float


def add_endpoints(models: AppModels, uploads: Uploads) -> None:
    """Add `/islands`, `/classify` and `/encode` to the `gr.Blocks` that is being built."""

    def islands(
        image: gr.FileData, wholes: int = 2, parts: int = 6, sub_parts: int = 20
    ) -> tuple[gr.FileData, IslandMaps]:
        """Find the islands of agreement of a photo, regions whose features agree, at three heights.

        Args:
            image: The photo, JPEG, PNG or WebP.
            wholes: Number of regions at the first height.
            parts: Number of regions at the second height, more than wholes.
            sub_parts: Number of regions at the third height, more than parts.

        Returns:
            A PNG with the regions drawn, the three heights side by side, and the region of every location.
        """
        heights = [wholes, parts, sub_parts]
        if not all(isinstance(height, int) for height in heights):
            raise ValueError("wholes, parts, sub_parts: expected whole numbers.")
        photo = _read(uploads, image)
        regions = models.apm.islands(photo, heights=heights).regions.numpy()
        drawn = [
            np.asarray(from_colours(draw_regions(np.asarray(photo), cut, fill), photo))
            for cut, fill in zip(regions, tree_colours(list(regions)), strict=True)
        ]
        path = Path(uploads.folder) / secrets.token_hex(32) / "islands.png"  # a name that nobody else can guess
        path.parent.mkdir(parents=True)
        Image.fromarray(np.concatenate(drawn, axis=1)).save(path)
        return gr.FileData(path=str(path)).model_dump(), {"heights": heights, "regions": regions.tolist()}

    def classify(image: gr.FileData, labels: list[str], num_steps: int = 60, start: str = "random") -> Scores:
        """Classify a photo: the teacher's scores beside those of a student that adapts to this photo.

        A student that is fitted to the end repeats its teacher, mistakes included.

        Args:
            image: The photo, JPEG, PNG or WebP.
            labels: Two to thirty labels.
            num_steps: Gradient steps of the adaptation, 1 to 200.
            start: What adapts: "model", the distilled student, which must not be dense, or "random", one with random
                weights.

        Returns:
            Probabilities of each label from the teacher, the student before it adapts, and the adapted student.
        """
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise ValueError("labels: expected a list of texts.")
        if not isinstance(num_steps, int) or not 1 <= num_steps <= MAX_STEPS:
            raise ValueError(f"num_steps: expected a whole number from 1 to {MAX_STEPS}.")
        if start not in ("model", "random"):
            raise ValueError('start: expected "model" or "random".')
        names = check_labels(labels)
        *_, last = adaptation(models, _read(uploads, image), names, start=start, num_steps=num_steps)
        return {
            "labels": names,
            "teacher": last.teacher,
            "student_before": last.before,
            "student": last.now,
            "cosine": last.cosines[-1][1],
        }

    def encode(image: gr.FileData) -> list[float]:
        """Encode a photo as one vector, in the space of the teacher's image embeddings.

        Args:
            image: The photo, JPEG, PNG or WebP.

        Returns:
            As many numbers as the features are wide: the student's pooled feature or, of a dense student, which has
            none of its own, the teacher's embedding.
        """
        return models.apm.encode(_read(uploads, image))[0].tolist()  # (1, F) -> (F,)

    for endpoint in (islands, classify, encode):
        gr.api(_explaining(endpoint), api_name=endpoint.__name__)


def _read(uploads: Uploads, image: Any) -> Image.Image:
    path = image.get("path") if isinstance(image, dict) else None
    return uploads.read(path if isinstance(path, str) else None)


def _explaining(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return the endpoint with ValueErrors that the caller reads; of other errors Gradio reports nothing."""

    @functools.wraps(endpoint)
    def explaining(*values: Any) -> Any:
        try:
            return endpoint(*values)
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    return explaining
