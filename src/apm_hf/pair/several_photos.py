"""Fit one student to several photos."""

import copy
import tempfile
from typing import Any

from torch import Tensor

from ..modeling_apm import APMModel
from ..teachers.targets import TargetCache
from ..ttt.photos import FIT_LEARNING_RATE, FIT_LOCATIONS, FIT_STEPS


def fit_photos(
    model: APMModel,
    pixel_values: Tensor,
    features: Tensor,
    image_processor: Any,
    *,
    steps: int = FIT_STEPS,
    seed: int = 0,
) -> APMModel:
    """Distil a copy of the model on several photos alone, so that their trigger columns tell them apart.

    Args:
        pixel_values: `(B, C, S, S)`.
        features: `(B, rows, cols, F)`, the teacher's.
        image_processor: the student's; says how colours were normalised.

    Raises:
        ImportError: without accelerate, which distils; says what to install.
    """
    try:
        from ..distillation import DistillationConfig, distill
    except ImportError as error:
        raise ImportError('one student for several photos needs accelerate: pip install "apm_hf[train]"') from error
    embeds = features.mean(dim=(1, 2))  # of weight 0
    with tempfile.TemporaryDirectory() as folder:
        config = DistillationConfig(
            output_dir=folder,
            max_steps=steps,
            batch_size=len(pixel_values),
            learning_rate=FIT_LEARNING_RATE,
            warmup_steps=min(10, steps // 10),
            num_locations=FIT_LOCATIONS,
            cls_weight=0.0,
            rgb_weight=10.0,
            checkpoint_steps=0,
            report_to="none",
            seed=seed,
        )
        data = TargetCache(pixel_values.cpu(), embeds.cpu(), features.cpu())
        student = distill(copy.deepcopy(model), data, config=config, image_processor=image_processor).student
    return student.to(model.device).eval()
