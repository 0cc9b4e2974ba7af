"""Train at test time: fit an APM to the teacher's embedding of one image, B images at once."""

from .adaptation import adapt, bytes_per_image
from .adapted import Adapted, TTTStep
from .settings import PRESETS, TTTConfig
from .stacked import redraw
from .targets import TTTTargets

__all__ = ["PRESETS", "Adapted", "TTTConfig", "TTTStep", "TTTTargets", "adapt", "bytes_per_image", "redraw"]
