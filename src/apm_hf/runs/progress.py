"""Progress bars: none for what takes no time."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def no_loading_bars() -> Iterator[None]:
    """Load or save models without transformers' bars, which show nothing but local copying."""
    active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if active:
            logging.enable_progress_bar()
