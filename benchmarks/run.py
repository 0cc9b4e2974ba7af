"""Speed, memory and operations of APM against named rivals in the same run; docs/benchmarks.md is what it writes.

    python benchmarks/run.py --quick --output_dir /tmp/benchmarks    # about a minute: the tiny model alone
    make bench                                                       # about twelve minutes on two cores

It ends with an error where outputs differ, and with status 1 where a goal is missed: a slowed build does not pass.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch

from speed.figures import Figure, Settings, few_locations, full_grid, growth, products, training_step
from speed.page import write_page
from speed.resources import loading, memory, operations, start_up
from speed.timing import computer_facts

DOCS = Path(__file__).resolve().parents[1] / "docs"
TINY = Settings(
    preset="tiny",
    repeats=10,
    vision_transformers=False,
    peak_shapes=((144, 256, 256), (1024, 1024, 1024)),
    growth=(4096, 16384, 65536),
    training_locations=36,
    few_bound=None,  # calls cost it more than products, and it has 144 cells
    peak_goal=False,
)
MILLION = ("tiny", 2**20, "float32", False)
MANY = [MILLION, ("tiny", 2**20, "bfloat16", False)] + [
    ("dinov2-large", number, dtype, naive)
    for dtype, naive, numbers in (
        ("float32", False, (1024, 4096, 16384, 65536)),
        ("bfloat16", False, (1024, 65536)),
        ("float32", True, (1024, 4096, 16384)),
    )
    for number in numbers
]


def run(
    models: tuple[Settings, ...],
    *,
    many: list[tuple[str, int, str, bool]],
    counted: tuple[str, ...],
    loaded: str,
    devices: tuple[str, ...],
) -> dict[str, list[Figure]]:
    """Return figures by section of the page.

    Args:
        models: what is timed.
        many: the calls whose memory is measured, as `speed.resources.memory` takes them.
        counted: presets whose operations are counted.
        loaded: the preset that is loaded from disk.
        devices: `"cpu"`, `"cuda"`.
    """
    measures = {
        "Full grid": full_grid,
        "Few locations": few_locations,
        "Many locations": growth,
        "Training step": training_step,
    }
    sections: dict[str, list[Figure]] = {}
    for title, measure in measures.items():
        for device in devices:
            for settings in models:
                for dtype in (torch.float32, torch.bfloat16):
                    sections.setdefault(title, []).append(measure(settings, torch.device(device), dtype))
                    _progress(title, sections[title][-1])
    transformers_too = any(settings.vision_transformers for settings in models)
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16):
            for settings in models[1:]:  # the first is too small for its products to matter
                sections.setdefault("Products", []).append(products(settings, torch.device(device), dtype))
    sections["Memory"] = [memory(many, torch.device(device)) for device in devices]
    sections["Operations"] = [operations(counted, vision_transformers=transformers_too)]
    sections["Loading"] = [loading(loaded, 5), *filter(None, [start_up()])]
    for title in ("Products", "Memory", "Operations", "Loading"):
        for figure in sections.get(title, ()):
            _progress(title, figure)
    return sections


def _progress(title: str, figure: Figure) -> None:
    for table in figure.tables:
        print(f"\n{title}. {table.title}. {table.text[:200]}")
        for row in (table.columns, *table.rows):
            print("  " + "  ".join(f"{cell:>{44 if not i else 14}}" for i, cell in enumerate(row)), flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the tiny model only, few repeats")
    parser.add_argument("--output_dir", type=Path, default=DOCS, help="where benchmarks.md and its plots go")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    facts = computer_facts()
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if options.quick:
        sections = run((TINY,), many=[MILLION], counted=("tiny",), loaded="tiny", devices=devices)
    else:
        sections = run(
            (TINY, Settings()), many=MANY, counted=("clip-ttt", "dinov2-large"), loaded="dinov2-large", devices=devices
        )
    facts["load average at the end"] = f"{os.getloadavg()[0]:.1f}"
    command = "make bench" if not options.quick else shlex.join(["python", "benchmarks/run.py", "--quick"])
    print(f"\nwritten: {write_page(options.output_dir, command, facts, sections)}")
    goals = [goal for figures in sections.values() for figure in figures for goal in figure.goals]
    for goal in goals:
        sign = "<=" if goal.at_most else ">="
        print(f"{'met   ' if goal.met else 'MISSED'} {goal.name}: {goal.value:.3g} {sign} {goal.bound:.3g}")
    return 0 if all(goal.met for goal in goals) else 1


if __name__ == "__main__":
    sys.exit(main())
