"""Distil the dense student of `facebook/deit-tiny-patch16-224` that travels with the package, on Caltech-101 alone.

    python scripts/make_dense.py --teacher FOLDER --dataset FOLDER --max_images 40 --steps 20 --output_dir /tmp/dense
    python scripts/make_dense.py --teacher FOLDER --dataset FOLDER
    python scripts/make_dense.py --teacher FOLDER --name_teacher

The last names the teacher in the configuration of the student that is there, so that it answers from pixels alone,
and leaves its weights as they are.

Caltech-101 (Fei-Fei Li, Marco Andreetto, Marc'Aurelio Ranzato, Pietro Perona) is CC BY 4.0, the teacher Apache-2.0.
About 20 minutes on two cores, most of them the teacher's; every tenth photo is held out, and what is explained of
them is in `metrics.json`.
"""

import argparse
import json
import logging
from pathlib import Path

from apm_hf import APMModel, load_teacher
from apm_hf.assets import DENSE_MODEL
from apm_hf.data.loading import train_and_validation
from apm_hf.distillation import DenseConfig, DensePairs, distill_dense
from apm_hf.publishing.cards import CardFacts, write_card

TEACHER, LICENSE, DATASET = "facebook/deit-tiny-patch16-224", "apache-2.0", "caltech101"


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("apm_hf").setLevel(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default=TEACHER, help="folder or Hub name of this teacher (default: %(default)s)")
    parser.add_argument("--dataset", help="folder or Hub name of Caltech-101")
    parser.add_argument("--max_images", type=int, default=3000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default=DENSE_MODEL)
    parser.add_argument("--name_teacher", action="store_true", help="train nothing")
    options = parser.parse_args()
    teacher = load_teacher(options.teacher)
    if options.name_teacher:
        student = APMModel.from_pretrained(options.output_dir)
        student.set_teacher(teacher.tower, name=TEACHER)
        save_config(student, options.output_dir)
        return
    if options.dataset is None:
        parser.error("--dataset: expected a folder or Hub name of Caltech-101")
    parts = train_and_validation(
        options.dataset, validation_fraction=0.1, max_images=options.max_images, max_validation_images=256, seed=0
    )
    photos = [part.photos() for part in parts]
    train = DensePairs.build(photos[0], teacher, seed=options.seed, description="teacher")
    held_out = DensePairs.build(photos[1], teacher, shifted=False, description="teacher, held out")
    teacher.name = TEACHER  # wherever it was loaded from
    config = DenseConfig(output_dir=options.output_dir, max_steps=options.steps, seed=options.seed, overwrite=True)
    result = distill_dense(teacher, train, held_out, config, dataset=DATASET)
    write_facts(result.student, options.output_dir, result.metrics, options)


def save_config(student: APMModel, folder: str) -> None:
    """Write the configuration without code, which the package has."""
    student.config.save_pretrained(folder)
    for path in Path(folder).glob("*.py"):
        path.unlink()
    for name in ("config.json", "preprocessor_config.json"):
        path = Path(folder) / name
        fields = {key: value for key, value in json.loads(path.read_text()).items() if key != "auto_map"}
        path.write_text(json.dumps(fields, indent=2) + "\n")


def write_facts(student: APMModel, folder: str, metrics: dict[str, float], options: argparse.Namespace) -> None:
    """Write the licence, which the teacher's folder may not tell, into the configuration, and the card."""
    student.config.distilled_from = [{"name": TEACHER, "license": LICENSE, "revision": None, "dataset": DATASET}]
    save_config(student, folder)
    command = f"python scripts/make_dense.py --max_images {options.max_images} --steps {options.steps}"
    facts = CardFacts(
        repo_id="apm-dense-deit-tiny",
        teacher=TEACHER,
        dataset=DATASET,
        command=f"{command} --seed {options.seed}",
        steps=options.steps,
        num_parameters=student.num_parameters(only_trainable=True),
        metrics=metrics,
    )
    write_card(folder, facts)
    print(metrics)


if __name__ == "__main__":
    main()
