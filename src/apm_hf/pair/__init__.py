"""The pair: a student with its image processor and its teacher."""

from .apm import APM, EMBEDDED_NOTE, Islands

__all__ = ["APM", "EMBEDDED_NOTE", "Islands"]
