"""Distil the student of DeiT-Tiny's pixels that travels with the package, on Caltech-101 alone.

    python scripts/make_student.py --teacher FOLDER --dataset FOLDER --work_dir students

Caltech-101 (Fei-Fei Li, Marco Andreetto, Marc'Aurelio Ranzato, Pietro Perona) is CC BY 4.0, the teacher Apache-2.0.
The teacher's features of three crops of every photo are cached in the work folder, then `apm distill` trains on them
with its defaults; both go on where they were interrupted. About 80 minutes on one core that multiplies bfloat16.
"""

import argparse
import json
import shutil
from pathlib import Path

from apm_hf import APMModel
from apm_hf.assets import STUDENT_MODEL
from apm_hf.commands.main import main as apm
from apm_hf.distillation.validation import card_figures
from apm_hf.publishing.cards import FACTS_FILE, CardFacts, write_card
from make_dense import DATASET, LICENSE, save_config

TEACHER = "facebook/deit-tiny-patch16-224"
CREDIT = "by Fei-Fei Li, Marco Andreetto, Marc'Aurelio Ranzato and Pietro Perona, CC BY 4.0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default=TEACHER, help="folder or Hub name of DeiT-Tiny")
    parser.add_argument("--dataset", required=True, help="folder or Hub name of Caltech-101")
    parser.add_argument("--work_dir", required=True, help="folder of the cache, 1.1 GB, and of the run")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--views", type=int, default=3)
    parser.add_argument("--output_dir", default=STUDENT_MODEL)
    options = parser.parse_args()
    work, folder = Path(options.work_dir), Path(options.output_dir)
    run, cache = work / "run", work / "features"
    shared = ["--teacher", options.teacher, "--teacher_dtype", "bfloat16", "--dataset", options.dataset]
    if not (run / "config.json").exists():
        status = apm(["cache-features", *shared, "--views", str(options.views), "--output_dir", str(cache)])
        words = ["distill", *shared, "--feature_cache", str(cache), "--output_dir", str(run), "--report_to", "none"]
        words += ["--max_steps", str(options.steps), "--validation_steps", "500", "--mixed_precision", "bf16"]
        words += ["--resume"] if (run / "checkpoints").is_dir() else []
        if status or apm(words):
            raise SystemExit("the student was not distilled; the same command goes on")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", "preprocessor_config.json", "metrics.json"):
        shutil.copyfile(run / name, folder / name)
    student = APMModel.from_pretrained(run)
    assert student.config.distilled_from is not None
    student.config.distilled_from[0] |= {"name": TEACHER, "license": LICENSE, "revision": None, "dataset": DATASET}
    save_config(student, str(folder))
    metrics = json.loads((folder / "metrics.json").read_text())[-1]
    facts = CardFacts(
        repo_id=folder.name,
        teacher=TEACHER,
        dataset=DATASET,
        command=f"python scripts/make_student.py --steps {options.steps} --views {options.views}",
        steps=options.steps,
        num_parameters=student.num_parameters(),
        **card_figures({name: value for name, value in metrics.items() if name != "step"}),
    )
    card = write_card(folder, facts)
    card.write_text(card.read_text().replace(f"| data | {DATASET} |", f"| data | {DATASET}, {CREDIT} |"))
    (folder / FACTS_FILE).unlink()  # of a run that goes on
    for path in folder.iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
