"""The machine and the teacher that the app asks, and the control that stands beside them."""

import argparse
from dataclasses import dataclass

from PIL import Image

from ..assets import DEMO_MODEL
from ..commands.models import Machine, load_machine
from ..data.part_shapes import CLASS_NAMES
from ..data.scenes import make_scene
from ..modeling_apm import APMModel
from ..teachers import Teacher
from ..ttt.photos import random_machine

# Held out from the embedded model and its teacher, which learnt other streams of scenes.
_EXAMPLES_SEED, _EXAMPLES = 20_410, (3, 7, 2, 9, 1, 10)


@dataclass(frozen=True)
class Machines:
    """What is asked about every photo.

    Args:
        machine: the APM with its image processor and its teacher, if there is one.
        control: an APM of the same architecture with random weights.
        is_embedded: whether they are the ones in this package.
    """

    machine: Machine
    control: APMModel
    is_embedded: bool

    @property
    def model(self) -> APMModel:
        return self.machine.model

    @property
    def teacher(self) -> Teacher | None:
        return self.machine.teacher

    @property
    def default_labels(self) -> list[str]:
        """Class names to begin with: those that the embedded teacher knows, or the first of a classifier's own."""
        if self.is_embedded:
            return list(CLASS_NAMES)
        names = None if self.teacher is None else self.teacher.class_names
        return list(names or ())[:10]


def load_machines(model: str | None = None, teacher: str | None = None) -> Machines:
    """Load a model and its teacher by name or folder; the embedded ones where neither is named.

    Raises:
        ValueError: for a model that is no APM or has another width than the teacher; for a teacher without a model.
    """
    if model is None and teacher is not None:
        raise ValueError(f"--model: expected an APM distilled from the teacher {teacher}, got none")
    machine = load_machine(argparse.Namespace(model=model, teacher=teacher, fresh=False, seed=0))
    control = random_machine(machine.model.config, seed=0).to(machine.model.device)
    return Machines(machine, control, is_embedded=model in (None, DEMO_MODEL))


def example_scenes() -> list[Image.Image]:
    """Drawn scenes to try the app with."""
    return [make_scene(index, seed=_EXAMPLES_SEED, image_size=384).image for index in _EXAMPLES]
