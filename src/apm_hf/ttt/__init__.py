"""Train one copy of an APM per image at test time, B copies in one batched computation."""

from .adaptation import adapt, bytes_per_image
from .adapted import Adapted, TTTStep
from .settings import PRESETS, TTTConfig
from .stacked import redraw
from .targets import TTTTargets

__all__ = ["PRESETS", "Adapted", "TTTConfig", "TTTStep", "TTTTargets", "adapt", "bytes_per_image", "redraw"]
