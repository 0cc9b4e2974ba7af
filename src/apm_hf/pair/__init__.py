"""The pair: a student with its image processor and its teacher."""

from .apm import APM, Islands

__all__ = ["APM", "Islands"]
