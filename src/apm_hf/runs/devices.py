"""Device and precision where none is asked for."""

import torch


def default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_precision() -> str:
    """Of training, as Accelerate calls it."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
