"""The Asynchronous Perception Machine (arXiv:2410.20535) for Hugging Face.

Importing this package registers `apm` with transformers' Auto classes, and a pipeline; that is its one side effect.
It loads neither torch nor transformers: names are loaded on first use, and so is what is registered.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .registration import register

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .configuration_apm import APMConfig
    from .image_processing_apm import APMImageProcessor
    from .image_processing_pil_apm import APMImageProcessorPil
    from .modeling_apm import APMModel, APMModelOutput, APMPreTrainedModel
    from .modeling_apm_heads import (
        APMForImageClassification,
        APMForSemanticSegmentation,
        APMForZeroShotImageClassification,
    )
    from .pipelines import TestTimeTrainingPipeline
    from .teachers import Teacher, TeacherOutput, load_teacher
    from .ttt import Adapted, TTTConfig, adapt
else:  # hidden from type checkers, which would otherwise take any name for one of ours
    # Public name -> the module that it is loaded from.
    _MODULES = {
        "APMConfig": "configuration_apm",
        "APMForImageClassification": "modeling_apm_heads",
        "APMForSemanticSegmentation": "modeling_apm_heads",
        "APMForZeroShotImageClassification": "modeling_apm_heads",
        "APMImageProcessor": "image_processing_apm",
        "APMImageProcessorPil": "image_processing_pil_apm",
        "APMModel": "modeling_apm",
        "APMModelOutput": "modeling_apm",
        "APMPreTrainedModel": "modeling_apm",
        "Adapted": "ttt",
        "TTTConfig": "ttt",
        "Teacher": "teachers",
        "TeacherOutput": "teachers",
        "TestTimeTrainingPipeline": "pipelines",
        "adapt": "ttt",
        "load_teacher": "teachers",
    }

    def __getattr__(name):
        if name in _MODULES:
            value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
            globals()[name] = value  # from now on found without this function
            return value
        if name in _MODULES.values():  # `apm_hf.modeling_apm`, without an import of its own
            return import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted(set(globals()) | set(_MODULES))


__all__ = [
    "APMConfig",
    "APMForImageClassification",
    "APMForSemanticSegmentation",
    "APMForZeroShotImageClassification",
    "APMImageProcessor",
    "APMImageProcessorPil",
    "APMModel",
    "APMModelOutput",
    "APMPreTrainedModel",
    "Adapted",
    "TTTConfig",
    "Teacher",
    "TeacherOutput",
    "TestTimeTrainingPipeline",
    "adapt",
    "load_teacher",
]

register()
