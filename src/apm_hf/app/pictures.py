"""Pictures and figures as HTML: in columns that a phone stacks, each with what is seen in it as caption and text.

Legend: (rows, cols) a map of locations, row-major.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from PIL import Image

from ..ttt.photos import map_size

_LONGEST = 480  # pixels of the longer side


@dataclass(frozen=True, eq=False)
class Picture:
    """Hold an image that the page shows with a caption.

    Args:
        title: in one or two words.
        image: RGB, or RGBA: a drawing without a ground of its own, for light and dark pages.
        note: what is seen.
        is_control: whether it is there to be compared with.
    """

    title: str
    image: Image.Image
    note: str = ""
    is_control: bool = False


def from_colours(colours: np.ndarray, photo: Image.Image) -> Image.Image:
    """A picture in the photo's shape, smoothly enlarged, of colours `(rows, cols, 3)` in [0, 1]."""
    image = Image.fromarray((colours.clip(0, 1) * 255).round().astype(np.uint8))
    height, width = map_size(photo, _LONGEST)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def figures_html(pictures: Sequence[Picture], heading: str = "", *, columns: int = 4) -> str:
    """Figures side by side, `columns` in a row where there is room; on a phone two."""
    figures = "".join(
        f'<figure class="{"apm-control" if picture.is_control else ""}">'
        f'<img src="{_data_uri(picture.image)}" alt="{escape(f"{picture.title}: {picture.note}")}"'
        f' width="{picture.image.width}" height="{picture.image.height}">'
        f"<figcaption><b>{escape(picture.title)}</b> {escape(picture.note)}</figcaption></figure>"
        for picture in pictures
    )
    title = f"<h3>{escape(heading)}</h3>" if heading else ""
    return f'<section class="apm">{title}<div class="apm-figures apm-{columns}">{figures}</div></section>'


def scores_html(names: Sequence[str], columns: Sequence[tuple[str, Sequence[float]]], caption: str) -> str:
    """A table of probabilities with bars: a row a name, a column `(title, probabilities)` each."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title, _ in columns)
    best = [max(range(len(names)), key=lambda row, scores=scores: scores[row]) for _, scores in columns]  # type: ignore[misc]
    rows = []
    for row, name in enumerate(names):
        cells = "".join(
            f'<td class="{"apm-best" if row == best[column] else ""}"><span class="apm-bar" '
            f'style="width: {100 * scores[row]:.1f}%"></span><span>{100 * scores[row]:.1f} %</span></td>'
            for column, (_, scores) in enumerate(columns)
        )
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        f'<section class="apm"><table class="apm-scores"><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col">label</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></section>'
    )


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, format="WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
