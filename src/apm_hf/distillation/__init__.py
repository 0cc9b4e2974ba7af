"""Distillation: many images, one student, through Accelerate."""

from ..teachers.matching import matching_image_processor, same_view
from .loop import distill
from .settings import DistillationConfig, DistillationResult

__all__ = ["DistillationConfig", "DistillationResult", "distill", "matching_image_processor", "same_view"]
