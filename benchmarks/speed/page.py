"""Write docs/benchmarks.md and its plots from the figures of a run."""

from pathlib import Path

from .figures import Figure
from .timing import Goal, Table

INTRODUCTION = """# Benchmarks

Written by `{command}`; do not edit. Every figure is a ratio inside one run: repeats are interleaved and the smallest
time of each counts, outputs are compared before anything is timed (relative error at most 1e-5 in float32, 5e-2 in
bfloat16), and rivals run in the same dtype, on the same threads, at their best chunk. Weights are random: no figure
depends on what a model learnt. The *naive* form writes every query out, [trigger ; position], one row a location; it
is given the position codes of the grid, and computes those of other places, which depend on the call; it checks no
inputs, and returns a `ModelOutput`, as a model does. The *release's* does so 16 locations at a time, as observing it
shows (its source was not read). The *matmul peak* is the highest rate of a product in PyTorch's public operations,
over several shapes. The command ends with status 1 where a goal is missed.
"""


BUSY = (
    "**This computer was busy with other work.** What memory bounds (few locations, shares of a peak that fits the "
    "cache, outputs larger than it) then looks slower than what arithmetic bounds: run it again on an idle one."
)

NOTES = """
## What the query path does, and does not

* The first layer over [trigger ; position] is a sum of Linears and is never written out: one row per image, and one
  per row and column of the grid. Nothing is kept between calls.
* Every layer is a plain `nn.Linear`. *Products* above shows what other forms of the product would give.
* Chunks of locations are as long as keeps the widest activation at 8 MiB on a CPU, and at 2^24 elements elsewhere:
  `CACHED_BYTES`, `CHUNK_ELEMENTS` in `modeling_apm.py`.
* Mean pooling alone (`APMModel.pooled_features`) decodes neither colours nor levels.
* The fixed cost of a call, checks of its inputs included, is what a very small model spends its time on.
* On a GPU, for many calls of the same shape, `torch.compile(model, mode="reduce-overhead")` captures CUDA graphs and
  so removes the calls' cost.
"""


def write_page(folder: Path, command: str, facts: dict[str, str], sections: dict[str, list[Figure]]) -> Path:
    """Write `folder/benchmarks.md`, which is returned, and `folder/benchmarks/*.png`."""
    lines = [INTRODUCTION.format(command=command), "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in facts.items()]
    if float(facts["load average at the start"]) > 1:
        lines += ["", BUSY]
    goals = [goal for figures in sections.values() for figure in figures for goal in figure.goals]
    lines += ["", "## Goals", "", *_goals(goals)]
    for title, figures in sections.items():
        lines += ["", f"## {title}"]
        for figure in figures:
            for table in figure.tables:
                lines += ["", *_table(table)]
        picture = _plot(folder / "benchmarks", title, figures)
        if picture is not None:
            lines += ["", f"![{title}](benchmarks/{picture.name})"]
    if facts["GPU"] == "none":
        lines += [
            "",
            "## On a GPU",
            "",
            "Not measured: no GPU in this computer. All figures above are of the CPU alone.",
        ]
    lines.append(NOTES.rstrip())
    path = folder / "benchmarks.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _goals(goals: list[Goal]) -> list[str]:
    rows = ["| goal | asked | measured | |", "| --- | ---: | ---: | --- |"]
    for goal in goals:
        asked = f"{'<=' if goal.at_most else '>='} {goal.bound:.3g}"
        rows.append(f"| {goal.name} | {asked} | {goal.value:.3g} | {'met' if goal.met else '**missed**'} |")
    return rows


def _table(table: Table) -> list[str]:
    lines = [f"### {table.title}", ""]
    if table.text:
        lines += [table.text, ""]
    lines.append(f"| {' | '.join(table.columns)} |")
    lines.append(f"| --- |{' ---: |' * (len(table.columns) - 1)}")
    return lines + [f"| {' | '.join(row)} |" for row in table.rows]


# Of a section's plot: what its series are.
AXES = {"Few locations": "time, share of the whole grid's", "Operations": "GFLOPs", "Memory": "MiB beyond the outputs"}


def _plot(folder: Path, title: str, figures: list[Figure]) -> Path | None:
    """Plot the section's series against the number of locations, on logarithmic axes; None where it has none."""
    series = {name: points for figure in figures for name, points in figure.series.items() if len(points) > 1}
    if not series or title not in AXES:
        return None
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(6, 3.6), dpi=110, layout="constrained")
    axes = canvas.add_subplot()
    for name, points in series.items():
        axes.plot(list(points), list(points.values()), marker=".", label=name)
    if title == "Few locations":
        numbers = sorted({number for points in series.values() for number in points})
        axes.plot(numbers, [n / numbers[-1] for n in numbers], ":", color="grey", label="in proportion")
    axes.set(xscale="log", yscale="log", xlabel="locations", ylabel=AXES[title])
    axes.legend(fontsize=7)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{title.lower().replace(' ', '_')}.png"
    canvas.savefig(path)
    return path
