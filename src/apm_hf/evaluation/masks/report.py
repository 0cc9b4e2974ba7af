"""Write `report.md`, `results.json` and a figure per data set from summaries; equal inputs give equal bytes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...islands.figures import load_matplotlib, png_bytes
from ...runs.files import write_atomically
from ..plots import COLOURS
from ..tables import NOTHING, facts_list, interval_cell, markdown_table
from .datasets import LEVELS
from .probing import BOUNDARY, PROBES
from .summary import CONTROLS, MEASURES, NEAR

REPORT, RESULTS = "report.md", "results.json"
_PALE = ("apm_random", "image_shuffled", "position_only", "shuffled_masks", "random")  # controls, drawn pale
_PROTOCOL = """\
Every method gives a map of features (superpixels and random segments: of labels) over the complete image, resized to
a square; the teacher gets the same square, and its grid is interpolated bilinearly. K-means on directions divides the
map into {segments}, the same number for every method; SLIC gives the fewest superpixels that are at least as many.
Segments are resized to the mask's resolution and compared there. Void pixels are ignored, and so are images whose
mask is a single segment. Scores are means over images, with 95 % intervals from the bootstrap over images.

Controls: *image shuffled*, the APM's output for another image (mean of {shuffles} orders); *position only*, the mean
of its outputs for all other images at each location, which varies with position only (no upper bound: image shuffled
may score higher); *masks shuffled*, its segments against another image's mask (as image shuffled, except that the
number of segments is that of the input image); *random segments*, Voronoi cells of random points (mean of {shuffles}
draws).
"""


def write_report(folder: Path, results: Mapping[str, Any]) -> str:
    """Write all files of the report into a folder.

    Args:
        results: facts about the run, its settings, and `data`: name -> what `summarise` returned.

    Returns:
        The tables, for logging.

    Raises:
        ImportError: without matplotlib.
    """
    settings = results["settings"]
    segments = settings["num_segments"]
    protocol = _PROTOCOL.format(
        segments="as many segments as the image's mask has" if segments is None else f"{segments} segments",
        shuffles=settings["num_shuffles"],
    )
    text, logged = f"# Islands of agreement\n\n{_facts(results)}\n{protocol}", ""
    for name, summary in results["data"].items():
        tables = _section(name, summary, settings)
        picture = f"ari_{name}.png"
        write_atomically(folder / picture, draw_bars(f"{name}, {summary['images']} images", summary))
        text += f"\n{tables}\n![ARI of every method on {name}]({picture})\n"
        logged += f"\n{tables}"
    write_atomically(folder / RESULTS, json.dumps(results, indent=1) + "\n")
    write_atomically(folder / REPORT, text)
    return logged


def draw_bars(title: str, summary: Mapping[str, Any]) -> bytes:
    """Draw the ARI of every row at every level, with intervals, as PNG bytes; controls are pale."""
    matplotlib, figure_module = load_matplotlib()
    rows, levels = summary["rows"], [level for level in LEVELS if level in summary["levels"]]
    with matplotlib.style.context("default", after_reset=True):
        size = (2.6 + 2.9 * len(levels), 0.9 + 0.27 * len(rows))
        figure = figure_module.Figure(figsize=size, layout="constrained", dpi=110)
        panels = figure.subplots(1, len(levels), squeeze=False, sharex=True, sharey=True)[0]
        for axes, level, colour in zip(panels, levels, COLOURS, strict=False):
            for place, (name, row) in enumerate(rows.items()):
                if "ari" not in row.get(level, {}):
                    continue
                ari = row[level]["ari"]
                spread = [[ari["mean"] - ari["low"]], [ari["high"] - ari["mean"]]]
                axes.barh(place, ari["mean"], color=colour, alpha=0.35 if name in _PALE else 0.9, height=0.72)
                axes.errorbar(ari["mean"], place, xerr=spread, color="black", linewidth=0.9, capsize=2)
            axes.axvline(0, color="black", linewidth=0.8)
            axes.set_title(f"{level}: {summary['levels'][level]['mean_segments']:.1f} segments", fontsize=9)
            axes.set_xlabel("adjusted Rand index")
            axes.grid(axis="x", alpha=0.25, linewidth=0.6)
            axes.set_axisbelow(True)
        panels[0].set_yticks(range(len(rows)), [row["title"] for row in rows.values()], fontsize=8)
        panels[0].invert_yaxis()  # for all panels: they share the axis
        figure.suptitle(title, fontsize=10)
        return png_bytes(figure)


def _facts(results: Mapping[str, Any]) -> str:
    ttt = {name: value for name, value in results["settings"]["ttt"].items() if value is not None and name != "start"}
    facts = {name: results[name] for name in ("command", "commit", "computer", "teacher", "model", "versions")}
    facts["TTT"] = f"targets {results['ttt_factor']} x the teacher's grid, " + ", ".join(
        f"{name}={value}" for name, value in ttt.items()
    )
    facts["seed"] = results["settings"]["seed"]
    facts["skipped, unreadable"] = results["skipped_images"] or None
    return facts_list(facts)


def _section(name: str, summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    side = settings["map_size"] or summary["map_size"]
    text = f"## {name}: {summary['images']} images, maps of {side} x {side}\n"
    for level in (level for level in LEVELS if level in summary["levels"]):
        facts = summary["levels"][level]
        text += (
            f"\nSegments at the {level} level (`{facts['column']}`), {facts['scored_images']} images, "
            f"{facts['mean_segments']:.1f} segments on average:\n\n{_scores(summary, level)}"
        )
    if any(kind in row for row in summary["rows"].values() for kind in PROBES):
        train = summary["images"] // 2
        text += (
            f"\nProbes for the {summary['num_classes']} classes of the part masks, fitted to at most "
            f"{settings['num_train_pixels']:,} pixels of the first {train} images, the same for every method, and "
            f"scored on the other {summary['images'] - train}: the linear probe at every pixel, its logits "
            f"interpolated to the mask's resolution, the k-NN probe at {settings['num_query_pixels']:,} pixels an "
            f"image. mIoU is over the classes that these masks have:\n\n{_probes(summary)}"
        )
    if summary["comparisons"]:
        text += (
            "\nDifference to the teacher's upsampled grid, paired by image, and the ratio to a control's ARI, if the "
            f"control is above chance:\n\n{_comparisons(summary)}"
        )
    if summary["agreement"]:
        text += (
            "\nAgreement: mean cosine of features minus their mean over all images, of neighbours one patch of the "
            "teacher apart, of locations at least a quarter of the side apart, and of neighbours on the fine map ("
            "teacher interpolated). Collapse: effective rank and its maximum, and mean cosine of all "
            f"pairs of unchanged features:\n\n{_agreement(summary)}"
        )
    return text


def _scores(summary: Mapping[str, Any], level: str) -> str:
    rows = [
        [row["title"], *(interval_cell(row[level][measure]) for measure in MEASURES), f"{row[level]['num_found']:.1f}"]
        for row in summary["rows"].values()
        if row.get(level)
    ]
    return markdown_table(["", *MEASURES.values(), "segments found"], rows)


def _probes(summary: Mapping[str, Any]) -> str:
    rows = [
        [
            row["title"],
            *(text for kind in PROBES for text in (interval_cell(row.get(kind)), _accuracy(row.get(kind)))),
            interval_cell(row.get(NEAR)),
        ]
        for row in summary["rows"].values()
        if any(kind in row for kind in PROBES)
    ]
    header = [f"{title}, {what}" for title in PROBES.values() for what in ("mIoU", "pixel accuracy")]
    return markdown_table(["", *header, f"linear probe, accuracy within {BOUNDARY} pixels of a boundary"], rows)


def _comparisons(summary: Mapping[str, Any]) -> str:
    levels = [level for level in LEVELS if level in summary["levels"]]
    differences = {f"{level} {measure}": f"{level}: {MEASURES[measure]}" for level in levels for measure in MEASURES}
    differences |= {kind: f"{title}: mIoU" for kind, title in PROBES.items()}
    differences[NEAR] = "linear probe: accuracy near boundaries"
    ratios = {
        f"{level} ari to {control}": f"{level}: times the ARI of {control.replace('_', ' ')}"
        for level in levels
        for control in CONTROLS
    }
    compared = summary["comparisons"]
    rows = [
        [title, *(interval_cell(found["differences"].get(key), signed=True) for found in compared.values())]
        for key, title in differences.items()
    ]
    for key, title in ratios.items():
        multiples = [found["ratios"].get(key) for found in compared.values()]
        rows.append([title, *(NOTHING if multiple is None else f"{multiple:.2f}" for multiple in multiples)])
    known = [row for row in rows if set(row[1:]) != {NOTHING}]
    table = markdown_table(["", *(summary["rows"][name]["title"] for name in compared)], known)
    if not (above := compared.get("apm", {}).get("above_ridge")):
        return table
    rows = [[title, interval_cell(above[key], signed=True)] for key, title in differences.items() if key in above]
    return f"{table}\nThe APM above the ridge regression:\n\n{markdown_table(['', 'APM above ridge'], rows)}"


def _agreement(summary: Mapping[str, Any]) -> str:
    header = ["", "neighbours", "distant", "neighbours, fine", "effective rank", "mean cosine"]
    rows = [
        [
            f"{found['whose']}, {found['level']}",
            *(interval_cell(found[name]) for name in ("neighbours", "distant", "neighbours_fine")),
            f"{found['effective_rank']:.1f} / {found['max_effective_rank']:.0f}",
            f"{found['mean_pairwise_cosine']:.3f}",
        ]
        for found in summary["agreement"]
    ]
    return markdown_table(header, rows)


def _accuracy(found: Mapping[str, float] | None) -> str:
    return NOTHING if found is None else f"{found['accuracy']:.3f}"
