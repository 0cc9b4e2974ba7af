"""Which of how many processes this one is, on GPUs and on CPUs alike."""

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
