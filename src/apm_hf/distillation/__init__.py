"""Distillation: many images, one student, through Accelerate."""

from ..teachers.matching import matching_image_processor, same_view
from .dense import DenseConfig, DensePairs, distill_dense
from .loop import distill
from .settings import DistillationConfig, DistillationResult

__all__ = [
    "DenseConfig",
    "DensePairs",
    "DistillationConfig",
    "DistillationResult",
    "distill",
    "distill_dense",
    "matching_image_processor",
    "same_view",
]
