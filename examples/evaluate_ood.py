"""What an APM is worth, beside its teacher and other label-free methods, on shifted images.

    python examples/evaluate_ood.py --suite smoke --output_dir runs/smoke
    torchrun --nproc_per_node 8 examples/evaluate_ood.py --suite ood --teachers openai/clip-vit-base-patch16 \\
        --output_dir runs/ood

The first needs no network. A run that was interrupted goes on when it is started again, and gives the same
`results.jsonl`, as any number of processes does; `report.md` has the tables and plots.
"""

import logging
import sys
from dataclasses import asdict, dataclass, field

from transformers import HfArgumentParser

from apm_hf.evaluation.labels.suites import evaluate
from apm_hf.runs.processes import command_line, process_state


@dataclass(frozen=True, kw_only=True)
class ScriptConfig:
    """Which suite, on what, with which teachers."""

    suite: str = field(metadata={"help": "smoke, photos, ood, fine_grained, or custom for what the options say"})
    output_dir: str = field(metadata={"help": "of results and report; an interrupted run goes on there"})
    data: list[str] = field(default_factory=list, metadata={"help": "benchmarks, folders, or NAME=FOLDER"})
    teachers: list[str] = field(default_factory=list, metadata={"help": "names or folders"})
    model: str | None = field(default=None, metadata={"help": "a distilled APM, as wide as the teacher"})
    methods: list[str] = field(default_factory=list, metadata={"help": "those of the suite's to run"})
    corruptions: list[str] = field(default_factory=list, metadata={"help": "instead of the suite's"})
    severities: list[int] = field(default_factory=list, metadata={"help": "1 to 5, instead of the suite's"})
    seeds: list[int] = field(default_factory=list, metadata={"help": "instead of 0"})
    max_images: int | None = field(default=None, metadata={"help": "of every cell, instead of the suite's"})
    batch_size: int = 16
    num_views: int = field(default=16, metadata={"help": "of methods that look at several"})
    allow_chance: bool = field(default=False, metadata={"help": "even where labels look like another data set's"})


def run(config: ScriptConfig) -> None:
    folder = evaluate(**asdict(config), command=command_line("examples/evaluate_ood.py", sys.argv[1:]))
    if process_state().is_main_process:
        logging.getLogger("apm_hf").info(f"report: {folder / 'report.md'}")


def main() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("apm_hf").setLevel(logging.INFO)
    (config,) = HfArgumentParser(ScriptConfig).parse_args_into_dataclasses()
    run(config)


if __name__ == "__main__":
    main()
