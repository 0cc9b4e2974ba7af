"""Options that several commands have, under the same name, with the same placeholder and the same meaning."""

import argparse
from typing import Any

NUMBER: dict[Any, str] = {int: "N", float: "NUMBER"}

# Option -> what `add_argument` is told. `add` puts what is particular to a command behind the help.
SHARED: dict[str, dict[str, Any]] = {
    "--teacher": {"metavar": "NAME", "help": "teacher, a Hub name or a folder"},
    "--model": {"metavar": "NAME", "help": "APM, a Hub name or a folder"},
    "--dataset": {"metavar": "NAME", "help": "images, a Hub dataset, a folder, parquet or tar files"},
    "--output_dir": {"metavar": "FOLDER", "help": "output folder"},
    "--batch_size": {"type": int, "metavar": "N", "help": "images per batch"},
    "--steps": {"type": int, "metavar": "N", "help": "gradient steps"},
    "--max_steps": {"type": int, "metavar": "N", "help": "optimiser steps"},
    "--max_images": {"type": int, "metavar": "N", "help": "use at most this many images"},
    "--max_unreadable_images": {
        "type": int,
        "metavar": "N",
        "help": "unreadable images to skip and list before stopping with an error",
    },
    "--split": {"metavar": "NAME", "help": "split of the data set"},
    "--image_column": {"metavar": "NAME", "help": "column that holds the images, found by default"},
    "--preset": {"metavar": None, "help": "ready-made settings"},
    "--size": {"type": int, "metavar": "N", "help": "locations along the longer side"},
    "--seed": {"type": int, "metavar": "N", "help": "random seed"},
    "--card_images": {"metavar": "PHOTO", "help": "photos for the card that may be published"},
    "--config": {"metavar": "FILE", "help": "YAML file with options and their values; the command line overrides it"},
    "--port": {"type": int, "metavar": "N", "help": "port to listen on"},
}


def add(parser: Any, name: str, more: str = "", **settings: Any) -> None:
    """Add a shared option to a parser or a group; `more` goes behind its help."""
    shared = SHARED[name]
    help_text = f"{shared['help']}; {more}" if more else shared["help"]
    parser.add_argument(name, **{**shared, **settings, "help": help_text})


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that every command has; their defaults are set where the command line is parsed."""
    group = parser.add_argument_group("output")
    flag: dict[str, Any] = {"action": "store_true", "default": argparse.SUPPRESS}
    group.add_argument("--json", help="print the result as one JSON object, and all else to standard error", **flag)
    group.add_argument("-q", "--quiet", help="print errors only", **flag)
    group.add_argument("-v", "--verbose", help="print messages of transformers and datasets too", **flag)
    group.add_argument("--debug", help="tracebacks of errors, as with APM_DEBUG=1", **flag)
