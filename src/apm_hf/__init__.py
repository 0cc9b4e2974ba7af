"""The Asynchronous Perception Machine (arXiv:2410.20535) for Hugging Face.

Importing this package registers `apm` with transformers' Auto classes, and a pipeline.
"""

import transformers
from transformers import AutoConfig

# At its top level transformers 5.17 refuses this class without torchvision.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from .configuration_apm import APMConfig
from .image_processing_apm import APMImageProcessor
from .image_processing_pil_apm import APMImageProcessorPil
from .modeling_apm import (
    AUTO_CLASSES,
    APMForImageClassification,
    APMForSemanticSegmentation,
    APMForZeroShotImageClassification,
    APMModel,
    APMModelOutput,
    APMPreTrainedModel,
)

AutoConfig.register("apm", APMConfig, exist_ok=True)
for _name, _model_class in AUTO_CLASSES.items():
    getattr(transformers, _name).register(APMConfig, _model_class, exist_ok=True)
AutoImageProcessor.register(
    APMConfig,
    image_processor_classes={"torchvision": APMImageProcessor, "pil": APMImageProcessorPil},
    exist_ok=True,
)

from .pair import APM  # noqa: E402
from .pair.pipeline import TestTimeTrainingPipeline  # noqa: E402
from .teachers import Teacher, TeacherOutput, load_teacher  # noqa: E402
from .ttt import Adapted, TTTConfig, adapt  # noqa: E402

__version__ = "0.2.0"

__all__ = [
    "APM",
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
