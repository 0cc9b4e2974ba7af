"""What is known of the running program: which of how many processes it is, and how it was called."""

import re
import shlex
from collections.abc import Sequence

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def on_cpu() -> bool:
    """Whether there is no accelerator, or none that is wanted (`ACCELERATE_USE_CPU`)."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def process_state() -> PartialState:
    """What `torchrun` or `accelerate launch` said.

    Left to itself, `PartialState()` takes every process on a CPU for the only one, so that all do all the work.
    """
    return PartialState(cpu=on_cpu())


def command_line(program: str, arguments: Sequence[str]) -> str:
    """For cards and reports. Of absolute paths only the last part: they say nothing of the computer."""
    return f"{program} " + shlex.join(re.sub(r"(^|=)/(?:[^/]+/)*", r"\1", argument) for argument in arguments)
