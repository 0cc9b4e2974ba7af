"""The `apm` command.

apm demo                                                   # distil, adapt, look: no network, two minutes
apm classify PHOTO --teacher openai/clip-vit-large-patch14 --labels FILE
apm islands PHOTO --teacher openai/clip-vit-large-patch14 --output_dir DIR --movie
apm interpolate PHOTO PHOTO --teacher openai/clip-vit-large-patch14 --output_dir DIR
apm evaluate --suite smoke --output_dir DIR                # every method on drawn scenes: no network
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from .commands import classify, convert, demo, evaluate, export, interpolate, islands

logger = logging.getLogger("apm_hf")

COMMANDS = {
    "demo": demo,
    "classify": classify,
    "islands": islands,
    "interpolate": interpolate,
    "evaluate": evaluate,
    "convert": convert,
    "export": export,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, 1 where something failed, 2 for wrong usage."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    arguments = sys.argv[1:] if arguments is None else arguments
    parsed = _parser().parse_args(arguments, argparse.Namespace(arguments=arguments))
    try:
        result = parsed.run(parsed)
        return result if isinstance(result, int) else 0
    except (ValueError, OSError, ImportError) as error:
        # What the user can mend is one line; anything else is a defect of ours and keeps its traceback.
        logger.error(f"apm {parsed.command}: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="apm", description="The Asynchronous Perception Machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        options = commands.add_parser(name, help=command.HELP)
        command.add_options(options)
        options.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
