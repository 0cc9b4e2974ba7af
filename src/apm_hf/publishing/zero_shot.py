"""Save a student with its teacher's words: a folder for zero-shot classification without the teacher.

    save_with_text(student, teacher, image_processor, "runs/photos")
    pipeline("zero-shot-image-classification", model="runs/photos", trust_remote_code=True)

The folder holds the student without colours and levels, the teacher's text tower and tokenizer, and the image
processor.
"""

import os
from typing import Any

from ..configuration_apm import APMConfig
from ..modeling_apm import APMForZeroShotImageClassification, APMModel
from ..runs.processes import process_state
from ..runs.progress import no_loading_bars
from ..runs.run import Run
from ..teachers import Teacher
from ..teachers.families import DUAL_ENCODERS


def check_text(teacher: Teacher, config: APMConfig) -> None:
    """Refuse a student and a teacher that make no zero-shot classifier; before anything is distilled.

    Raises:
        ValueError: for a teacher without a text tower, one whose texts the pipeline prepares in another way, or a
            student that reads its teacher.
    """
    family = DUAL_ENCODERS.get(teacher.model.config.model_type)
    if family is None or teacher.tokenizer is None:
        raise ValueError(f"with_text: expected a teacher with a text tower, such as CLIP, got {teacher.name}")
    if family.tokenizer_options.get("padding") == "max_length":
        raise ValueError(
            f"with_text: expected a text tower that ignores padding, such as CLIP's, got {teacher.name}: it reads "
            "padding that transformers' pipeline leaves out for an APM"
        )
    if not config.folds_pixels:
        raise ValueError(
            f"with_text: expected a student that folds pixels, got trigger_source {config.trigger_source!r}"
        )


def save_with_text(
    student: APMModel, teacher: Teacher, image_processor: Any, folder: str | os.PathLike[str]
) -> APMForZeroShotImageClassification:
    """Save a student joined with its teacher's text tower; files of a saved model in the folder are replaced.

    Args:
        student: distilled from `teacher`.
        image_processor: the student's.
        folder: other files in it stay.

    Returns:
        The joined model, in evaluation mode.

    Raises:
        ValueError: as [`check_text`] does, and for widths that differ.
    """
    check_text(teacher, student.config)
    model = APMForZeroShotImageClassification.from_dual_encoder(student, teacher.model)
    assert teacher.tokenizer is not None
    with Run(folder, process_state()).finished_files(last="config.json", keep=True) as beside:
        with no_loading_bars():
            model.save_pretrained(beside)
        image_processor.save_pretrained(beside)
        teacher.tokenizer.save_pretrained(beside)
    return model


__all__ = ["check_text", "save_with_text"]
