"""The Asynchronous Perception Machine (arXiv:2410.20535) for Hugging Face.

Importing this package registers `apm` with transformers' Auto classes, and a pipeline; that is its one side effect.
"""

from importlib import import_module
from typing import Any

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSemanticSegmentation,
    AutoModelForZeroShotImageClassification,
)

# At its top level transformers 5.17 refuses this class without torchvision, though the PIL backend works.
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_apm import APMConfig
from .demo_assets import DEMO_MODEL
from .image_processing_apm import APMImageProcessor
from .image_processing_pil_apm import APMImageProcessorPil
from .modeling_apm import APMModel, APMModelOutput, APMPreTrainedModel
from .modeling_apm_heads import (
    APMForImageClassification,
    APMForSemanticSegmentation,
    APMForZeroShotImageClassification,
)
from .pipelines import TestTimeTrainingPipeline

__version__ = "0.1.0"

# Loaded on first use: none of them is needed to load and run a model.
_LAZY = {
    "Adapted": "ttt",
    "TTTConfig": "ttt",
    "Teacher": "teachers",
    "TeacherOutput": "teachers",
    "adapt": "ttt",
    "load_teacher": "teachers",
}

AutoConfig.register("apm", APMConfig, exist_ok=True)
AutoModel.register(APMConfig, APMModel, exist_ok=True)
AutoModelForImageClassification.register(APMConfig, APMForImageClassification, exist_ok=True)
AutoModelForSemanticSegmentation.register(APMConfig, APMForSemanticSegmentation, exist_ok=True)
AutoModelForZeroShotImageClassification.register(APMConfig, APMForZeroShotImageClassification, exist_ok=True)
AutoImageProcessor.register(
    APMConfig,
    image_processor_classes={"torchvision": APMImageProcessor, "pil": APMImageProcessorPil},
    exist_ok=True,
)
# Unlike those of other tasks, the segmentation pipeline looks here, and would else say that it knows no such model.
MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES["apm"] = APMForSemanticSegmentation.__name__
# What is saved takes its code along, for those who load it with `trust_remote_code=True`.
for _travelling in (APMConfig, APMImageProcessor, APMImageProcessorPil):
    _travelling.register_for_auto_class()
PIPELINE_REGISTRY.register_pipeline(
    "apm-zero-shot-image-classification",
    TestTimeTrainingPipeline,
    pt_model=AutoModel,
    default={"model": (DEMO_MODEL, "main")},
    type="multimodal",
)
# Saved with a model, this entry would make `transformers.pipeline` ask for remote code, which is not there.
del TestTimeTrainingPipeline._registered_impl


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))


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
