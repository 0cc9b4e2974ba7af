"""Choose device and precision where none is given."""

import torch


def default_device() -> str:
    """Return the first of CUDA, MPS and CPU that is there."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def default_precision() -> str:
    """Return the precision for training on the default device, in Accelerate's words."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
