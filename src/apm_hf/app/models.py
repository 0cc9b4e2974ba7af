"""Load the pair that the app shows, and the control that stands beside it."""

from dataclasses import dataclass

from PIL import Image

from ..assets import DEMO_TEACHER
from ..configuration_apm import APMConfig
from ..data.sample_photos import sample_photos
from ..data.scenes import make_scene
from ..modeling_apm import APMModel
from ..pair import APM
from ..teachers import Teacher
from ..teachers.matching import matching_image_processor
from ..teachers.zero_shot import classify, topk
from ..ttt.photos import random_model
from .uploads import MAX_LABELS

# What the sample photos show, and what they do not.
SAMPLE_LABELS = ("person", "cat", "cup", "rocket", "palace", "flower", "dog", "car", "chair", "airplane")
# Held out from the embedded model and its teacher, which learnt other streams of scenes.
_EXAMPLES_SEED, _EXAMPLES = 20_410, (3, 7, 2, 9, 1, 10)


@dataclass(frozen=True)
class AppModels:
    """The models that the app runs on every photo.

    Args:
        apm: the student with its image processor and its teacher, if there is one.
        control: a student of the same architecture with random weights.
        adaptable: the pair whose student is adapted to photos: `apm`, or a fresh student where that one is dense.
    """

    apm: APM
    control: APMModel
    adaptable: APM

    @property
    def model(self) -> APMModel:
        """The student without a head."""
        return self.apm.bare_model

    @property
    def teacher(self) -> Teacher | None:
        """The student's teacher, if there is one."""
        return self.apm.teacher

    @property
    def knows_scenes(self) -> bool:
        """Return whether the teacher is that of the demo, which has seen drawn scenes alone."""
        return self.teacher is not None and self.teacher.name == DEMO_TEACHER

    def examples(self) -> list[Image.Image]:
        """Return six pictures to try the app with: sample photos, or drawn scenes for the demo's models."""
        if not self.knows_scenes:
            return list(sample_photos().values())
        return [make_scene(index, seed=_EXAMPLES_SEED, image_size=384).image for index in _EXAMPLES]

    def example_labels(self) -> list[str]:
        """Return labels to begin with: all classes of the teacher or, of too many, those it finds in the examples.

        To a teacher that reads they are the names of what the examples show.
        """
        names, teacher = self.apm.default_labels, self.teacher
        if teacher is None or 2 <= len(names) <= MAX_LABELS:
            return names
        if teacher.has_text:
            return list(SAMPLE_LABELS)
        if not names:
            return []
        embeds = teacher.encode_images(self.examples()).image_embeds
        assert embeds is not None
        found = topk(classify(embeds, teacher.encode_text(names), logit_scale=teacher.logit_scale), names, 3)
        labels = dict.fromkeys(one.label for photo in found for one in photo)
        return [label for label in labels if "," not in label]  # which separates labels on the page


def load_models(model: str | None = None, teacher: str | None = None) -> AppModels:
    """Load a model and its teacher by name or folder; the embedded ones where neither is named.

    A teacher alone is shown with its dense student in the package.

    Raises:
        ValueError: for a model that is no APM or has another width than the teacher; for a teacher without a model,
            of which the package has no dense student.
    """
    apm = APM.load(model, teacher=teacher)
    if apm.model is None:
        dense = apm.with_dense_student()
        if dense is None:
            raise ValueError(f"--model: expected an APM distilled from the teacher {teacher}, got none")
        apm = dense
    return AppModels(apm, apm.control().bare_model, _adaptable(apm))


def _adaptable(apm: APM) -> APM:
    if not apm.is_dense or apm.teacher is None:
        return apm
    model = random_model(APMConfig.preset("clip-ttt", feature_size=apm.feature_size), seed=0).to(apm.teacher.device)
    return APM(model, matching_image_processor(apm.teacher, model.config.image_size), apm.teacher, is_fitted=False)
