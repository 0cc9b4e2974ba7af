"""Return the rank of this process, the number of processes, and the command line."""

import re
import shlex
from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def on_cpu() -> bool:
    """Return whether there is no accelerator, or none is wanted (`ACCELERATE_USE_CPU`)."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def process_state() -> PartialState:
    """Return which of how many processes this is, as `torchrun` or `accelerate launch` set it.

    Left to itself, `PartialState()` takes every process on a CPU for the only one, so that all do all the work.
    """
    return PartialState(cpu=on_cpu())


def command_line(program: str, arguments: Sequence[str]) -> str:
    """Return the command line for cards and reports, with only the last part of absolute paths."""
    return f"{program} " + shlex.join(re.sub(r"(^|=)/(?:[^/]+/)*", r"\1", argument) for argument in arguments)
