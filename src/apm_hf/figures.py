"""Drawing: matplotlib without its global state, loaded where a picture is made."""

from typing import Any


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
