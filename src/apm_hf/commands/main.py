"""The `apm` command; `apm COMMAND --help` and docs/command_line.md say what there is.

apm demo                                                   # distil, adapt, look: no network, two minutes
apm distill --teacher TEACHER --dataset FOLDER --output_dir DIR
apm cache-features --teacher TEACHER --dataset FOLDER --output_dir DIR
apm embed FOLDER --model MODEL --output vectors.parquet
apm classify PHOTO --teacher openai/clip-vit-large-patch14 --labels FILE
apm islands PHOTO --teacher openai/clip-vit-large-patch14 --output_dir DIR --movie
apm evaluate --suite smoke --output_dir DIR                # every method on drawn scenes: no network
"""

import logging
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from .. import __version__
from ..runs.stopping import EXIT_STOPPED, RunStopped
from . import (
    app,
    cache_features,
    classify,
    completion,
    convert,
    demo,
    distill,
    embed,
    env,
    evaluate,
    export,
    interpolate,
    islands,
    push,
    upsample,
)
from .console import as_json, console
from .errors import explain
from .parsing import parse

logger = logging.getLogger("apm_hf")

COMMANDS = {
    "demo": demo,
    "distill": distill,
    "cache-features": cache_features,
    "embed": embed,
    "classify": classify,
    "islands": islands,
    "interpolate": interpolate,
    "upsample": upsample,
    "evaluate": evaluate,
    "convert": convert,
    "export": export,
    "push": push,
    "app": app,
    "env": env,
    "completion": completion,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0; 1 where something failed; 75 where a run was stopped and can go on; 130
        after Ctrl-C; 141 where nobody read the output to its end.

    Raises:
        SystemExit: 2 for wrong usage, 0 after `--help` and `--version`.
    """
    try:
        options = parse(COMMANDS, sys.argv[1:] if arguments is None else arguments, version=__version__)
    except ImportError as error:  # of what a command's options are made of
        print(f"apm: {explain(error)}", file=sys.stderr)
        return 1
    command, name = COMMANDS[options.command], f"apm {options.command}"
    with console(options) as stdout:
        try:
            result = command.run(options)
            if options.json and result is not None:
                print(as_json(result), file=stdout)
            stdout.flush()
            return 1 if result and result.get("errors") else 0
        except RunStopped as stopped:
            logger.error(f"{name}: {stopped}; {command.INTERRUPTED}")
            return EXIT_STOPPED
        except KeyboardInterrupt:
            logger.error(f"{name}: interrupted; {command.INTERRUPTED}")
            return 130
        except BrokenPipeError:
            return _without_reader(stdout)
        except Exception as error:
            line = explain(error, smaller=command.SMALLER)
            if line is None or options.debug or os.environ.get("APM_DEBUG", "0") not in ("", "0"):
                raise
            logger.error(f"{name}: {line}")
            return 1


def _without_reader(stdout: TextIO) -> int:
    """End like a program that SIGPIPE ended, for `apm ... | head`; Python's flush at the end must not fail again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout.fileno())
    except (OSError, ValueError):  # no file
        pass
    return 141


if __name__ == "__main__":
    sys.exit(main())
