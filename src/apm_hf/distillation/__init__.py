"""Distillation: many images, one student, through Accelerate."""

from .loop import distill
from .settings import DistillationConfig, DistillationResult
from .views import matching_image_processor, same_view

__all__ = ["DistillationConfig", "DistillationResult", "distill", "matching_image_processor", "same_view"]
