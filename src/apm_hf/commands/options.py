"""Options that several commands have, under the same name, with the same placeholder and the same meaning."""

import argparse
from typing import Any

NUMBER: dict[Any, str] = {int: "N", float: "NUMBER"}

# Option -> what `add_argument` is told. `add` puts what is particular to a command behind the help.
SHARED: dict[str, dict[str, Any]] = {
    "--teacher": {"metavar": "NAME", "help": "teacher, a Hub name or a folder"},
    "--model": {"metavar": "NAME", "help": "APM, a Hub name or a folder"},
    "--dataset": {"metavar": "NAME", "help": "images, a Hub dataset, a folder, parquet or tar files"},
    "--output_dir": {"metavar": "FOLDER", "help": "folder of what is made"},
    "--batch_size": {"type": int, "metavar": "N", "help": "images at a time"},
    "--steps": {"type": int, "metavar": "N", "help": "gradient steps of the fit"},
    "--max_steps": {"type": int, "metavar": "N", "help": "optimiser steps of the distillation"},
    "--max_images": {"type": int, "metavar": "N", "help": "use so many images"},
    "--max_bad_images": {
        "type": int,
        "metavar": "N",
        "help": "unreadable images that are skipped and listed before the run stops",
    },
    "--split": {"metavar": "NAME", "help": "split of the data"},
    "--image_column": {"metavar": "NAME", "help": "column of the images, by default found"},
    "--preset": {"metavar": None, "help": "ready-made settings"},
    "--size": {"type": int, "metavar": "N", "help": "locations along the longer side"},
    "--seed": {"type": int, "metavar": "N", "help": "of everything that is drawn"},
    "--port": {"type": int, "metavar": "N", "help": "port to listen on"},
}


def add(parser: Any, name: str, more: str = "", **settings: Any) -> None:
    """Add a shared option to a parser or a group; `more` goes behind its help."""
    shared = SHARED[name]
    help_text = f"{shared['help']}; {more}" if more else shared["help"]
    parser.add_argument(name, **{**shared, **settings, "help": help_text})


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """What every command takes; their defaults are set where the command line is parsed."""
    group = parser.add_argument_group("output")
    flag: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
    group.add_argument("--json", help="print the result as one JSON object, and all else to standard error", **flag)
    group.add_argument("-q", "--quiet", help="no progress and no remarks, only errors", **flag)
    group.add_argument("-v", "--verbose", help="what the libraries below say, too", **flag)
    group.add_argument("--debug", help="tracebacks of errors, as with APM_DEBUG=1", **flag)
