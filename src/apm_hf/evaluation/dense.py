"""Measure how close features between a teacher's tokens come to those at twice the side (`apm evaluate --task dense`).

The reference is the teacher itself, run on the photo at twice the side. Every method reads one pass at the usual side
and the photo, except for the mean of several moved photos. The measure is R² in standardised units after the mean of
each position is removed: 0 is what the position alone predicts of the reference, 1 the reference itself.

Legend: N photos, F feature width, (rows, cols) the reference's grid, R resamples.
"""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ..data.loading import load_images
from ..distillation.dense import DensePairs, as_upsampler
from ..distillation.rivals import Upsampler, bicubic, bilinear, fitted_rivals
from ..pair import APM
from ..position_encoding import grid_coordinates
from ..runs import provenance
from ..runs.files import write_atomically
from ..runs.processes import process_state
from ..runs.run import Run
from ..teachers.dense_grids import encode_densely
from .plan import short_name
from .tables import NOTHING, facts_list, interval_cell, markdown_table

logger = logging.get_logger(__name__)

TITLES = {
    "mean": "mean feature of each position",
    "position_only": "dense student, position alone",
    "bilinear": "teacher, bilinear",
    "bicubic": "teacher, bicubic",
    "moved": "teacher on four moved photos, interlaced",
    "bilateral": "joint bilateral upsampling",
    "attention": "attention upsampler",
    "ridge": "ridge regression",
    "apm": "dense student",
}
MOVED = 2  # times as fine as the teacher's grid, in four passes
NUM_RESAMPLES = 1000
REPORT, RESULTS = "report.md", "results.json"


def evaluate_features(
    *,
    output_dir: str | os.PathLike[str],
    data: str,
    teacher: str,
    model: str,
    methods: Sequence[str] = (),
    max_images: int | None = 200,
    split: str | None = None,
    image_column: str | None = None,
    seed: int = 0,
    command: str = "",
) -> Path:
    """Compare a dense student with its rivals on photos, and write `report.md` and `results.json`.

    Args:
        data: photos that nothing was fitted to, as [`load_images`] takes them.
        teacher: name or folder.
        model: a dense student; the rivals that lie in its folder are measured too.
        methods: rows of the table, by default all.
        max_images: random photos of the data.

    Returns:
        The folder.

    Raises:
        ValueError: for another kind of student, unknown methods, fewer than two photos, or an unreadable one.
    """
    apm = APM.load(model, teacher=teacher)
    student, source = apm.bare_model, apm.teacher
    assert source is not None
    if student.config.trigger_source != "tokens":
        raise ValueError(f"model: expected a dense student, which reads its teacher's tokens, got {model}")
    found = load_images(data, split=split, image_column=image_column, max_images=max_images, seed=seed)
    if len(found.dataset) < 2:
        raise ValueError(f"data: expected two photos or more, got {len(found.dataset)}")
    learnt = {origin.get("dataset") for origin in student.config.distilled_from or ()}
    if split is None and short_name(data) in learnt:
        logger.warning(f"{short_name(data)}: this student learnt from these photos; figures on others say more")
    pairs = DensePairs.build(found.photos(), source, shifted=False, description="teacher")
    upsamplers: dict[str, Upsampler] = {"bilinear": bilinear, "bicubic": bicubic, **fitted_rivals(model)}
    upsamplers["apm"] = as_upsampler(student.cpu())
    known = [name for name in TITLES if name in upsamplers or name in ("mean", "position_only", "moved")]
    if unknown := [name for name in methods if name not in known]:
        raise ValueError(f"methods: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    with Run(output_dir, process_state()).locked() as run:
        rows = _measure(pairs, upsamplers, source, [name for name in known if name in methods or not methods], seed)
        results = {
            "command": command,
            "commit": provenance.commit(),
            "computer": provenance.computer(),
            "versions": provenance.versions(),
            "teacher": short_name(source.name),
            "model": short_name(model),
            "data": short_name(data),
            "photos": len(pairs),
            "grid": list(pairs.targets.shape[2:4]),
            "seed": seed,
            "rows": rows,
        }
        table = _table(rows)
        write_atomically(run.folder / RESULTS, json.dumps(results, indent=1) + "\n")
        write_atomically(run.folder / REPORT, f"# Features between tokens\n\n{_facts(results)}\n{_ABOUT}\n{table}")
    logger.info(table)
    return run.folder


_ABOUT = """\
R² towards the teacher at twice the side, in standardised units, after the mean of each position is removed, with 95 %
intervals of the bootstrap over photos; differences to bilinear interpolation and to ridge regression are paired by
photo. Cost of one photo's whole grid, after the teacher's pass: products and convolutions in GFLOP, and seconds of
one process; of the moved photos, the teacher's four passes.
"""


def _measure(
    pairs: DensePairs, upsamplers: Mapping[str, Upsampler], teacher: Any, names: Sequence[str], seed: int
) -> dict[str, dict[str, Any]]:
    rows, cols = pairs.targets.shape[2:4]
    centres, (mean, std) = grid_coordinates(rows, cols)[None], pairs.statistics()
    reference = torch.zeros(rows * cols, len(mean))
    for photo in range(len(pairs)):
        reference += _standardised(pairs, photo, mean, std) / len(pairs)
    total = np.array(
        [float((_standardised(pairs, n, mean, std) - reference).square().sum()) for n in range(len(pairs))]
    )
    errors: dict[str, np.ndarray] = {"mean": total}
    costs: dict[str, dict[str, float]] = {}
    with tqdm(total=len(pairs) * len(set(names) - {"mean"}), desc="photos", unit="photo") as progress:
        for name in names:
            if name in errors:
                continue
            call = _moved(teacher) if name == "moved" else upsamplers["apm" if name == "position_only" else name]
            if name == "position_only":
                outputs = torch.stack([_output(call, pairs, n, centres) for n in range(len(pairs))]).half()
                whole = outputs.float().sum(dim=0)
            found = []
            for photo in range(len(pairs)):
                if name == "position_only":
                    output = (whole - outputs[photo].float()) / (len(pairs) - 1)
                else:
                    output = _output(call, pairs, photo, centres)
                wanted = _standardised(pairs, photo, mean, std)
                found.append(float(((output - mean) / std - wanted).square().sum()))
                progress.update()
            errors[name] = np.array(found)
            if name != "position_only":
                costs[name] = _cost(call, pairs, centres)
    draws = np.random.default_rng(seed).multinomial(len(total), np.full(len(total), 1 / len(total)), NUM_RESAMPLES)
    return {
        name: {
            "title": TITLES[name],
            "r2": _r2(errors[name], total, draws),
            "above": {
                other: _r2(errors[name], total, draws, beyond=errors[other])
                for other in ("bilinear", "ridge")
                if other in errors and other != name
            },
            **costs.get(name, {}),
        }
        for name in names
    }


@torch.inference_mode()
def _output(call: Upsampler, pairs: DensePairs, photo: int, centres: Tensor) -> Tensor:
    """Return `(rows * cols, F)`."""
    numbers = torch.tensor([photo])
    return call(pairs.tokens[numbers].float(), centres, pairs.pixel_values(numbers))[0].clone()


def _standardised(pairs: DensePairs, photo: int, mean: Tensor, std: Tensor) -> Tensor:
    return (pairs.targets[photo, 0].flatten(0, 1).float() - mean) / std


def _moved(teacher: Any) -> Upsampler:
    """Return the teacher on photos moved by half a patch, at half of `pixel_values`' side, as its own processor's."""

    def call(tokens: Tensor, coordinates: Tensor, pixel_values: Tensor) -> Tensor:
        half = torch.nn.functional.avg_pool2d(pixel_values, 2)
        features = encode_densely(teacher, half, MOVED).features
        assert features is not None
        return features.flatten(1, 2).float().cpu()

    return call


def _cost(call: Upsampler, pairs: DensePairs, centres: Tensor) -> dict[str, float]:
    """Return GFLOP and the smallest of three times in seconds."""
    with FlopCounterMode(display=False) as counter:
        _output(call, pairs, 0, centres)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        _output(call, pairs, 0, centres)
        seconds.append(time.perf_counter() - begin)
    return {"gflop": counter.get_total_flops() / 1e9, "seconds": min(seconds)}


def _r2(
    error: np.ndarray, total: np.ndarray, draws: np.ndarray, *, beyond: np.ndarray | None = None
) -> dict[str, float]:
    """Return R², or how much it lies above another's, with its interval: sums over photos before they are divided."""
    gained = total - error if beyond is None else beyond - error
    spread = (draws @ gained) / (draws @ total)
    low, high = np.quantile(spread, (0.025, 0.975))
    return {"mean": float(gained.sum() / total.sum()), "low": float(low), "high": float(high)}


def _table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        [
            row["title"],
            interval_cell(row["r2"]),
            *(interval_cell(row["above"].get(other), signed=True) for other in ("bilinear", "ridge")),
            f"{row['gflop']:.2f}" if "gflop" in row else NOTHING,
            f"{row['seconds']:.3f}" if "seconds" in row else NOTHING,
        ]
        for row in rows.values()
    ]
    return markdown_table(["", "R²", "above bilinear", "above ridge", "GFLOP", "seconds"], lines)


def _facts(results: Mapping[str, Any]) -> str:
    names = ("command", "commit", "computer", "teacher", "model", "data", "photos", "grid", "seed", "versions")
    return facts_list({name: results[name] for name in names})
