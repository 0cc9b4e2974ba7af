"""Which machine and which teacher a command asks, by its options `--model` and `--teacher`."""

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..assets import DEMO_MODEL, DEMO_TEACHER
from .options import add

if TYPE_CHECKING:
    from pathlib import Path

    from PIL import Image
    from torch import Tensor

    from ..modeling_apm import APMModel
    from ..teachers import Teacher

logger = logging.getLogger("apm_hf")

# What `apm islands` and `apm interpolate` tell of the machine, for their RESULT.
TOLD = {
    "files": "pictures, and films where there are any",
    "model": "as given; null is the demo's, or a fresh one",
    "teacher": "as given; null is the demo's, or none",
    "num_parameters": "of the APM",
    "fitted": "whether the APM was fitted to what it is shown",
}


def tell(options: argparse.Namespace, files: "Sequence[Path]", machine: "Machine", *, fitted: bool) -> dict[str, Any]:
    """The result that `TOLD` describes."""
    logger.info("pictures: " + ", ".join(map(str, files)))
    return {
        "files": list(files),
        "model": options.model,
        "teacher": options.teacher,
        "num_parameters": machine.model.num_parameters(),
        "fitted": fitted,
    }


@dataclass(frozen=True)
class Machine:
    """A machine with what it takes to show it photos.

    Args:
        model: loaded, or fresh with random weights.
        image_processor: the machine's.
        teacher: None where only a model was named.
        is_fresh: whether it still has to be fitted.
    """

    model: "APMModel"
    image_processor: Any
    teacher: "Teacher | None"
    is_fresh: bool

    def pixel_values(self, photos: "Sequence[Image.Image]") -> "Tensor":
        """`(B, C, S, S)`, whole photos squeezed into the machine's square, on its device."""
        from ..ttt.photos import whole_photos

        side = self.model.config.image_size
        return whole_photos(self.image_processor, photos, (side, side)).to(self.model.device)

    def trigger_column(self, photos: "Sequence[Image.Image]") -> "Tensor | None":
        """`(B, D)`, the teacher's embeddings, where the machine takes its trigger columns from them."""
        if self.model.config.trigger_source == "conv":
            return None
        if self.teacher is None:
            raise ValueError(
                "--teacher: expected one, since this machine's trigger columns are a teacher's embeddings"
            )
        return self.teacher.encode_images(list(photos)).image_embeds


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    add(parser, "--model", "distilled; by default, without --teacher, the demo's")
    add(parser, "--teacher", "alone, a fresh APM is fitted to its answers on the spot")
    parser.add_argument("--fresh", action="store_true", help="fit a fresh APM, to the demo's teacher if need be")


def load_machine(options: argparse.Namespace, *, local_patch: bool = True) -> Machine:
    """As the options say.

    Args:
        local_patch: whether a fresh machine sees the pixels around each location.

    Raises:
        ValueError: for a model that is no APM, or has another width than the teacher.
    """
    from transformers import AutoModel
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    from ..modeling_apm import APMModel
    from ..teachers import load_teacher
    from ..ttt.photos import photo_image_processor, photo_machine

    model_name, teacher_name = options.model, options.teacher
    if options.fresh and model_name is not None:
        raise ValueError("--fresh: expected no --model beside it")
    if model_name is None and teacher_name is None:
        model_name, teacher_name = DEMO_MODEL, DEMO_TEACHER
        logger.info(
            "no --teacher and no --model: the demo's own, which are in this package and know drawn scenes only"
        )
    is_fresh = options.fresh or model_name is None
    teacher = None if teacher_name is None else load_teacher(teacher_name)
    if is_fresh:
        assert teacher is not None
        model = photo_machine(teacher.feature_size, local_patch=local_patch, seed=options.seed).to(teacher.device)
        return Machine(model, photo_image_processor(model), teacher, is_fresh)
    model = AutoModel.from_pretrained(model_name)
    if not isinstance(model, APMModel):
        raise ValueError(f"--model: expected an APM, got {type(model).__name__}")
    if teacher is not None and teacher.feature_size != model.config.feature_size:
        raise ValueError(
            f"--model: expected features as wide as the teacher's, {teacher.feature_size}, "
            f"got {model.config.feature_size}"
        )
    model = model.eval() if teacher is None else model.eval().to(teacher.device)
    return Machine(model, AutoImageProcessor.from_pretrained(model_name), teacher, is_fresh)


def read_photo(path: str) -> "Image.Image":
    """An upright 8-bit RGB photo.

    Raises:
        ValueError: for a file that cannot be read.
    """
    from ..data.images import decode_image, eight_bit_rgb

    try:
        return eight_bit_rgb(decode_image(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def describe(machine: Machine, what: str) -> str:
    """For below a picture: how large the machine is, `what` was done with it, and who its teacher is."""
    size = f"{machine.model.num_parameters() / 1e6:.1f} M parameters"
    teacher = machine.teacher
    if teacher is None:
        return f"APM, {size}, {what}"
    name = "the demo's" if teacher.name == DEMO_TEACHER else teacher.name.rstrip("/").rpartition("/")[2]
    return f"APM, {size}, {what}; teacher: {name}"
