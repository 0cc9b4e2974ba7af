"""Summarise the results of jobs on one data set as means, intervals and comparisons, ready for JSON.

Every interval is 95 %, from the percentile bootstrap over images; repetitions of an image are averaged first. A
probe's IoU per class sums over images before it divides, so its resamples draw images and sum again.

Legend: n images, K classes, R resamples.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ..statistics import Interval, mean_interval, paired_interval
from .datasets import MaskedImages
from .methods import OF_DENSE
from .probing import PROBES

MEASURES = {"ari": "ARI", "nmi": "NMI", "miou": "matched mIoU", "boundary_f": "boundary F"}
REFERENCE = "teacher"  # row that others are compared with
NEAR = "linear near boundaries"  # the linear probe's accuracy near boundaries, per image
CONTROLS = ("image_shuffled", "position_only")  # rows whose ARI the APM's is divided by
COMPARED = ("teacher_moved", *OF_DENSE, "apm", "apm_ttt", "apm_ttt_alone")  # compared rows, besides the levels
NUM_RESAMPLES = 1000


def summarise(
    data: MaskedImages, titles: Mapping[str, str], done: Sequence[Mapping[str, Any]], *, seed: int
) -> dict[str, Any]:
    """Summarise one data set.

    Args:
        titles: row -> title, in order.
        done: results of every job.
        seed: random seed of the resamples.

    Returns:
        `images`, `map_size`, `levels` (facts about their masks), `num_classes`, `rows` (scores and probes by row),
        `comparisons` (paired differences to the teacher, ratios to controls) and `agreement`.
    """
    scores = _by_image([row for found in done for row in found["scores"]])
    probes = {row: kinds for found in done for row, kinds in found["probes"].items()}
    rows = {}
    for name, title in titles.items():
        entry: dict[str, Any] = {"title": title}
        for level in data.levels:
            values = {measure: scores.get((name, level, measure)) for measure in MEASURES}
            entry[level] = {measure: asdict(_mean(x, seed)) for measure, x in values.items() if x}
            if entry[level]:
                entry[level]["num_found"] = float(np.mean([*scores[name, level, "num_found"].values()]))
        for kind, repeats in probes.get(name, {}).items():
            estimate, draws = _mean_iou(repeats, seed)
            entry[kind] = asdict(_interval(estimate, draws)) | {"accuracy": _accuracy(repeats)}
            if kind == "linear" and (near := _near(repeats)):
                entry[NEAR] = asdict(_mean(near, seed))
        rows[name] = entry
    return {
        "images": len(data),
        "map_size": data.map_size,
        "levels": {
            level: {
                "column": data.mask_columns[level],
                "scored_images": sum(count > 1 for count in counts),
                "mean_segments": float(np.mean([count for count in counts if count > 1])),
            }
            for level, counts in data.num_segments.items()
        },
        "num_classes": None if data.class_names is None else len(data.class_names),
        "rows": rows,
        "comparisons": _comparisons(data, titles, scores, probes, seed),
        "agreement": [_agreement(found, seed) for found in done if found["agreement"] is not None],
    }


Scores = Mapping[tuple[str, str, str], Mapping[int, float]]


def _by_image(rows: Sequence[Mapping[str, Any]]) -> Scores:
    """Average repetitions: (row, level, measure) -> image -> score."""
    found: defaultdict[tuple[str, str, str], defaultdict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for measure in (*MEASURES, "num_found"):
            found[row["row"], row["level"], measure][row["image"]].append(row[measure])
    return {key: {image: float(np.mean(x)) for image, x in by_image.items()} for key, by_image in found.items()}


def _mean(by_image: Mapping[int, float], seed: int) -> Interval:
    # One stratum: without it, scores that happen to be all 0 or 1 would be taken for 0/1 predictions.
    return mean_interval([*by_image.values()], strata=np.zeros(len(by_image)), seed=seed)


def _comparisons(
    data: MaskedImages, titles: Mapping[str, str], scores: Scores, probes: Mapping[str, Mapping], seed: int
) -> dict[str, Any]:
    found = {}
    for name in titles:
        if name not in COMPARED and not name.startswith("apm_level_"):
            continue
        entry: dict[str, Any] = {
            "differences": _differences(data, name, REFERENCE, scores, probes, seed),
            "ratios": {},
        }
        if name == "apm" and "ridge" in titles:
            entry["above_ridge"] = _differences(data, name, "ridge", scores, probes, seed)
        for level in data.levels:
            for control in CONTROLS:
                ours, theirs = scores.get((name, level, "ari")), scores.get((control, level, "ari"))
                # A ratio to a score no better than chance is meaningless.
                if ours and theirs and (least := np.mean([*theirs.values()])) > 0.01:
                    entry["ratios"][f"{level} ari to {control}"] = float(np.mean([*ours.values()]) / least)
        found[name] = entry
    return found


def _differences(
    data: MaskedImages, name: str, reference: str, scores: Scores, probes: Mapping[str, Mapping], seed: int
) -> dict[str, Any]:
    """Return how much one row lies above another, paired by image, by measure."""
    found = {}
    for level in data.levels:
        for measure in MEASURES:
            ours, theirs = scores.get((name, level, measure)), scores.get((reference, level, measure))
            if ours and theirs:
                found[f"{level} {measure}"] = _paired(ours, theirs, seed)
    for kind in PROBES:
        if kind in probes.get(name, {}) and kind in probes.get(reference, {}):
            estimate, draws = _mean_iou(probes[name][kind], seed)
            theirs_estimate, theirs_draws = _mean_iou(probes[reference][kind], seed)
            found[kind] = asdict(_interval(estimate - theirs_estimate, draws - theirs_draws))
            if kind == "linear" and (near := _near(probes[name][kind])):
                found[NEAR] = _paired(near, _near(probes[reference][kind]), seed)
    return found


def _paired(ours: Mapping[int, float], theirs: Mapping[int, float], seed: int) -> dict[str, float]:
    pairs = np.array([(ours[image], theirs[image]) for image in ours])
    return asdict(paired_interval(pairs[:, 0], pairs[:, 1], seed=seed))


def _near(repeats: Sequence[Sequence[Mapping[str, Any]]]) -> dict[int, float]:
    """Return the share of correct pixels near boundaries, by image that has any, averaged over repetitions."""
    found: defaultdict[int, list[float]] = defaultdict(list)
    for counts in repeats:
        for image in counts:
            if image["near"]:
                found[image["image"]].append(image["near_hits"] / image["near"])
    return {image: float(np.mean(shares)) for image, shares in found.items()}


def _mean_iou(repeats: Sequence[Sequence[Mapping[str, Any]]], seed: int) -> tuple[float, np.ndarray]:
    """Return the mean IoU over the classes in the ground truth, averaged over repetitions, and R resamples `(R,)`.

    Equal seeds draw equal images, so that the resamples of two methods are pairs.
    """
    estimates, draws = [], []
    for counts in repeats:
        columns = [[image[name] for name in ("hits", "truth", "predicted")] for image in counts]
        table = np.array(columns, dtype=np.float64)  # (n, 3, K)
        times = np.random.default_rng(seed).multinomial(len(table), np.full(len(table), 1 / len(table)), NUM_RESAMPLES)
        estimates.append(_iou(table.sum(axis=0)[None])[0])
        draws.append(_iou(np.tensordot(times, table, axes=1)))  # (R, n) x (n, 3, K) -> (R, 3, K)
    return float(np.mean(estimates)), np.mean(draws, axis=0)


def _iou(table: np.ndarray) -> np.ndarray:
    """Return the mean IoU `(R,)` from hits, pixels in the truth and predicted pixels, `(R, 3, K)`."""
    hits, truth, predicted = table[:, 0], table[:, 1], table[:, 2]
    present = truth > 0
    per_class = np.where(present, hits / np.maximum(truth + predicted - hits, 1), 0)
    return per_class.sum(axis=1) / present.sum(axis=1)


def _accuracy(repeats: Sequence[Sequence[Mapping[str, Any]]]) -> float:
    """Return the share of correct pixels."""
    shares = [
        sum(sum(image["hits"]) for image in counts) / sum(sum(image["truth"]) for image in counts)
        for counts in repeats
    ]
    return float(np.mean(shares))


def _interval(estimate: float, draws: np.ndarray) -> Interval:
    # Resamples lack some of the rare, hard classes, which raises all of them: only their spread is used.
    low, high = np.quantile(draws - draws.mean() + estimate, (0.025, 0.975))
    return Interval(estimate, float(low), float(high))


def _agreement(found: Mapping[str, Any], seed: int) -> dict[str, Any]:
    model, level = found["subject"]
    values = {
        name: asdict(_mean(dict(enumerate(value)), seed)) if isinstance(value, list) else value
        for name, value in found["agreement"].items()
    }
    return {"whose": model, "level": level} | values
