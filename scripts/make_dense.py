"""Distil a dense student that travels with the package, on Caltech-101 alone.

    python scripts/make_dense.py --student photo --dataset FOLDER --max_images 40 --steps 20 --output_dir /tmp/dense
    python scripts/make_dense.py --student photo --dataset FOLDER
    python scripts/make_dense.py --teacher FOLDER --dataset FOLDER
    python scripts/make_dense.py --student efficientnet-lite0 --dataset FOLDER --max_images 2000
    python scripts/make_dense.py --teacher FOLDER --name_teacher

Students are of DeiT-Tiny, the photo teacher, and EfficientNet-Lite0 (efficientnet_lite0.py says what to install).
The last command names the teacher in the configuration of the student of DeiT-Tiny that is there, so that it answers
from pixels alone, and leaves its weights as they are.

Caltech-101 (Fei-Fei Li, Marco Andreetto, Marc'Aurelio Ranzato, Pietro Perona) is CC BY 4.0, the teachers Apache-2.0.
Every tenth photo is held out; for the photo teacher, those that it was tested with itself, from which
nothing has learnt. What is explained of 256 of them is in `metrics.json`. About 20 minutes on two cores for DeiT-Tiny,
most of them the teacher's; some 10 for the photo teacher, whose photos are small.
"""

import argparse
import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from apm_hf import APMModel, load_teacher
from apm_hf.assets import DENSE_MODEL, EFFICIENTNET_MODEL, PHOTO_MODEL, PHOTO_TEACHER
from apm_hf.data.images import decode_image, eight_bit_rgb
from apm_hf.data.loading import train_and_validation
from apm_hf.distillation import DenseConfig, DensePairs, distill_dense
from apm_hf.distillation.validation import card_figures
from apm_hf.publishing.cards import FACTS_FILE, CardFacts, write_card
from apm_hf.runs.run import MANIFEST
from make_photo_teacher import load_parts

LICENSE, DATASET, HELD_OUT = "apache-2.0", "caltech101", 256
# Student -> what its teacher is called in public, where that is loaded from by default, and the student's folder.
STUDENTS = {
    "deit-tiny": ("facebook/deit-tiny-patch16-224", "facebook/deit-tiny-patch16-224", DENSE_MODEL),
    "photo": ("apm_hf's photo teacher", PHOTO_TEACHER, PHOTO_MODEL),
    "efficientnet-lite0": ("efficientnet-lite0", None, EFFICIENTNET_MODEL),  # by efficientnet_lite0.py
}
# Student -> how its card loads it, where that is not by the names of both.
LOADED = {
    "photo": "APM.load()  # this one and its teacher, both in the package",
    "efficientnet-lite0": "APM.load(teacher=load_efficientnet_lite0()).with_dense_student()  # efficientnet_lite0.py",
}


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("apm_hf").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", choices=list(STUDENTS), default="deit-tiny")
    parser.add_argument("--teacher", help="folder or Hub name of this student's teacher")
    parser.add_argument("--dataset", help="folder or Hub name of Caltech-101")
    parser.add_argument("--max_images", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir")
    parser.add_argument("--name_teacher", action="store_true", help="train nothing")
    options = parser.parse_args()
    public_name, loaded_from, folder = STUDENTS[options.student]
    options.output_dir = options.output_dir or folder
    if options.student == "efficientnet-lite0":
        from efficientnet_lite0 import load_efficientnet_lite0

        teacher = load_efficientnet_lite0()
    else:
        teacher = load_teacher(options.teacher or loaded_from)
    teacher.name = public_name  # wherever it was loaded from
    if options.name_teacher:
        if options.student != "deit-tiny":
            parser.error("--name_teacher: expected the student of deit-tiny, whose teacher is on the Hub")
        student = APMModel.from_pretrained(options.output_dir)
        student.set_teacher(teacher.tower, name=public_name)
        save_config(student, options.output_dir)
        return
    if options.dataset is None:
        parser.error("--dataset: expected a folder or Hub name of Caltech-101")
    photos, held = load_photos(options)
    train = DensePairs.build(photos, teacher, seed=options.seed, description="teacher")
    held_out = DensePairs.build(held, teacher, shifted=False, description="teacher, held out")
    config = DenseConfig(output_dir=options.output_dir, max_steps=options.steps, seed=options.seed, overwrite=True)
    result = distill_dense(teacher, train, held_out, config, dataset=DATASET)
    write_facts(result.student, options.output_dir, result.metrics, options, teacher.name)


def load_photos(options: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    """Return the photos to learn from and those that are held out, each of which is decoded when it is called."""
    if options.student != "photo":
        parts = train_and_validation(
            options.dataset,
            validation_fraction=0.1,
            max_images=options.max_images,
            max_validation_images=HELD_OUT,
            seed=0,
        )
        return parts[0].photos(), parts[1].photos()
    split = load_parts(options.dataset)
    # By their SHA-256, so of all classes.
    return _decoding(split["train"].files[: options.max_images]), _decoding(split["test"].files[:HELD_OUT])


def _decoding(files: list[bytes]) -> list[Callable[[], Any]]:
    return [partial(_decoded, file) for file in files]


def _decoded(file: bytes) -> Any:
    return eight_bit_rgb(decode_image(file))


def save_config(student: APMModel, folder: str) -> None:
    """Write the configuration without code, which the package has."""
    student.config.save_pretrained(folder)
    for path in Path(folder).glob("*.py"):
        path.unlink()
    for name in ("config.json", "preprocessor_config.json"):
        path = Path(folder) / name
        fields = {key: value for key, value in json.loads(path.read_text()).items() if key != "auto_map"}
        path.write_text(json.dumps(fields, indent=2) + "\n")


def write_facts(
    student: APMModel, folder: str, metrics: dict[str, float], options: argparse.Namespace, teacher: str
) -> None:
    """Write the licence, which the teacher's folder may not tell, into the configuration, and the card."""
    assert student.config.distilled_from is not None
    student.config.distilled_from[0] |= {"license": LICENSE, "revision": None}
    save_config(student, folder)
    command = f"python scripts/make_dense.py --student {options.student}"
    facts = CardFacts(
        repo_id=Path(folder).name,
        teacher=teacher,
        dataset=DATASET,
        command=f"{command} --max_images {options.max_images} --steps {options.steps} --seed {options.seed}",
        steps=options.steps,
        num_parameters=student.num_parameters(only_trainable=True),
        **card_figures(metrics),
    )
    card = write_card(folder, facts)
    named = f'APM.load("{facts.repo_id}", teacher="{teacher}")'
    if found := LOADED.get(options.student):  # neither is on a Hub
        card.write_text(card.read_text().replace(named, found))
    for name in (".lock", FACTS_FILE, MANIFEST):  # of a run that goes on, and of what is published from its folder
        (Path(folder) / name).unlink(missing_ok=True)
    for path in Path(folder).iterdir():
        path.chmod(0o644)
    print(metrics)


if __name__ == "__main__":
    main()
