"""Send a command's result to standard output, and remarks and progress to standard error."""

import argparse
import contextlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO


@contextlib.contextmanager
def console(options: argparse.Namespace) -> Iterator[TextIO]:
    """Set logging and progress as `--json`, `--quiet` and `--verbose` say; give the stream for the result.

    Afterwards all is as before.
    """
    logger, stdout = logging.getLogger("apm_hf"), sys.stdout
    with contextlib.ExitStack() as stack:
        stack.callback(logger.setLevel, logger.level)
        beside = os.environ.get("LOCAL_RANK", "0") != "0"  # another process of this computer says the same
        quiet = options.quiet or (beside and not options.verbose)
        logger.setLevel(logging.WARNING if quiet else logging.DEBUG if options.verbose else logging.INFO)
        if not logger.hasHandlers():  # at the root it would repeat what libraries write with handlers of their own
            handler = logging.StreamHandler()
            handler.setFormatter(_Printable())
            logger.addHandler(handler)
            stack.callback(logger.removeHandler, handler)
        if options.quiet or not sys.stderr.isatty():
            stack.enter_context(_no_progress_bars())
        if options.verbose:
            stack.enter_context(_talkative_libraries())
        if options.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield stdout


def printable(text: str, *, keep: str = "") -> str:
    """Escape control characters, which a terminal would obey, as `\\x1b`; newlines too, so that a line stays one.

    Args:
        keep: characters that are left as they are.
    """
    return "".join(one if one.isprintable() or one in keep else one.encode("unicode_escape").decode() for one in text)


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


def as_json(result: Mapping[str, Any]) -> str:
    """One line; paths are strings, and numbers that are not finite null."""
    return json.dumps(_plain(result), allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    was_active, datasets = transformers_logging.is_progress_bar_enabled(), sys.modules.get("datasets")
    transformers_logging.disable_progress_bar()
    if datasets is None:  # takes long to load, and reads this when it is
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    elif datasets_bars := not datasets.are_progress_bars_disabled():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if was_active:
            transformers_logging.enable_progress_bar()
        if datasets is not None and datasets_bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _talkative_libraries() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
