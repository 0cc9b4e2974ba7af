"""Draw with matplotlib without its global state, importing it only when a figure is made."""

import io
from typing import Any

import numpy as np
from PIL import Image


def load_matplotlib() -> tuple[Any, Any]:
    """Import and return the modules `matplotlib`, with its lines and styles, and `matplotlib.figure`.

    Raises:
        ImportError: if matplotlib is missing; the message says what to install.
    """
    try:
        import matplotlib.lines
        import matplotlib.style
        from matplotlib import figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "apm_hf[viz]"') from error
    return matplotlib, figure


def new_figure(width: float, height: float, *, dpi: int) -> Any:
    """Return a blank figure of this size in inches."""
    return load_matplotlib()[1].Figure(figsize=(width, height), dpi=dpi)


def place(figure: Any, left: float, top: float, width: float, height: float) -> Any:
    """Add axes without ticks at a position in inches from the figure's upper left corner, for exact layouts."""
    total_width, total_height = figure.get_size_inches()
    box = (left / total_width, 1 - (top + height) / total_height, width / total_width, height / total_height)
    axes = figure.add_axes(box)
    axes.set(xticks=[], yticks=[])
    return axes


def png_bytes(drawn: Any) -> bytes:
    """Encode a figure, or pixels `(H, W, 3)` in [0, 1], as PNG: equal bytes for equal pictures and versions."""
    file = io.BytesIO()
    if isinstance(drawn, np.ndarray):
        Image.fromarray((drawn.clip(0, 1) * 255).round().astype(np.uint8)).save(file, "PNG")
    else:
        drawn.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def figure_pixels(figure: Any, *, transparent: bool = False) -> np.ndarray:
    """Render a figure as a movie frame `(H, W, 3)`, uint8; or, without its ground, as `(H, W, 4)`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if transparent:
        for part in (figure, *figure.axes):
            part.patch.set_alpha(0)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., : 4 if transparent else 3].copy()
