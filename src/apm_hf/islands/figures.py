"""Drawing: matplotlib without its global state, loaded where a picture is made."""

import io
from typing import Any

import numpy as np


def load_matplotlib() -> tuple[Any, Any]:
    """The modules `matplotlib`, with its lines and styles, and `matplotlib.figure`.

    Raises:
        ImportError: where matplotlib is missing; says what to install.
    """
    try:
        import matplotlib.lines
        import matplotlib.style
        from matplotlib import figure
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "apm_hf[viz]"') from error
    return matplotlib, figure


def new_figure(width: float, height: float, *, dpi: int) -> Any:
    """A blank figure of this size in inches."""
    return load_matplotlib()[1].Figure(figsize=(width, height), dpi=dpi)


def place(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Axes without ticks at a place in inches from the figure's upper left corner: layouts that leave no margins."""
    total_width, total_height = figure.get_size_inches()
    box = (left / total_width, 1 - (top + height) / total_height, width / total_width, height / total_height)
    axes = figure.add_axes(box)
    axes.set(xticks=[], yticks=[])
    return axes


def png_bytes(figure: Any) -> bytes:
    """A figure as PNG: the same bytes for the same figure and matplotlib."""
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def figure_pixels(figure: Any) -> np.ndarray:
    """A figure as `(H, W, 3)`, uint8: a frame of a movie."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
