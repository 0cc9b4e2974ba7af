"""Load the pair that the app shows, and the control that stands beside it."""

from dataclasses import dataclass

from PIL import Image

from ..data.scenes import make_scene
from ..modeling_apm import APMModel
from ..pair import APM
from ..teachers import Teacher

# Held out from the embedded model and its teacher, which learnt other streams of scenes.
_EXAMPLES_SEED, _EXAMPLES = 20_410, (3, 7, 2, 9, 1, 10)


@dataclass(frozen=True)
class AppModels:
    """The models that the app runs on every photo.

    Args:
        apm: the student with its image processor and its teacher, if there is one.
        control: a student of the same architecture with random weights.
    """

    apm: APM
    control: APMModel

    @property
    def model(self) -> APMModel:
        """The student without a head."""
        return self.apm.bare_model

    @property
    def teacher(self) -> Teacher | None:
        """The student's teacher, if there is one."""
        return self.apm.teacher


def load_models(model: str | None = None, teacher: str | None = None) -> AppModels:
    """Load a model and its teacher by name or folder; the embedded ones where neither is named.

    Raises:
        ValueError: for a model that is no APM or has another width than the teacher; for a teacher without a model.
    """
    if model is None and teacher is not None:
        raise ValueError(f"--model: expected an APM distilled from the teacher {teacher}, got none")
    apm = APM.load(model, teacher=teacher)
    return AppModels(apm, apm.control().bare_model)


def example_scenes() -> list[Image.Image]:
    """Draw scenes to try the app with."""
    return [make_scene(index, seed=_EXAMPLES_SEED, image_size=384).image for index in _EXAMPLES]
