"""Compute confidence intervals for accuracies, paired differences and calibration errors.

A plain accuracy, one 0/1 value per image, gets Wilson's score interval: it needs no resampling and does not shrink to
nothing at 0 and 1. Every other mean gets the percentile bootstrap over images (Efron & Tibshirani, An Introduction to
the Bootstrap, 1993, ch. 13): an image with several corruptions or several seeds is drawn with all its
rows, since they are not independent.

Images with the same contribution are interchangeable, so drawing G images with replacement is one multinomial draw
over the distinct contributions: exact, and cheap, as sums of 0/1 values take few values.

Legend: N rows, G images, C columns, R resamples.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

from .metrics import NUM_BINS, bin_numbers, expected_calibration_error

NUM_RESAMPLES = 5000
_CHUNK = 2**22  # multinomial counts in memory at a time: 32 MiB


@dataclass(frozen=True)
class Interval:
    """Hold a mean and the bounds of its confidence interval, in the units of the values."""

    mean: float
    low: float
    high: float


def mean_interval(
    values: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the mean of values and its confidence interval.

    Wilson's interval for values 0 and 1, one per image, without strata; else the percentile bootstrap over images.

    Args:
        values: `(N,)`.
        groups: `(N,)`, the image that a row belongs to; None: each row is an image.
        strata: `(N,)`, e.g. the benchmark that a row belongs to. The mean is then that of the strata's means, and
            images are drawn within each stratum.
        level: confidence level, in (0, 1).
        num_resamples: R.
        seed: random seed of the resamples.

    Raises:
        ValueError: no values, values that are not finite, lengths that differ, a level or number out of range.
    """
    values = _checked(values, level, num_resamples)
    one_each = groups is None or len(np.unique(np.asarray(groups))) == len(values)
    if strata is None and one_each and np.isin(values, (0, 1)).all():
        return _wilson(values, level)
    return _bootstrap(values, groups, strata, level, num_resamples, seed)


def paired_interval(
    ours: ArrayLike,
    theirs: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the mean of `ours - theirs`, row by row, and its percentile bootstrap interval over images.

    Args:
        ours, theirs: `(N,)`, two methods' values for the same rows.
        groups, strata, level, num_resamples, seed: as for [`mean_interval`].

    Raises:
        ValueError: as for [`mean_interval`].
    """
    ours, theirs = _checked(ours, level, num_resamples), _checked(theirs, level, num_resamples)
    if len(ours) != len(theirs):
        raise ValueError(f"expected as many of ours as of theirs, got {len(ours)} and {len(theirs)}")
    return _bootstrap(ours - theirs, groups, strata, level, num_resamples, seed)


def calibration_interval(
    confidence: ArrayLike,
    correct: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_bins: int = NUM_BINS,
    level: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Return the expected calibration error and its bootstrap interval over images.

    A sum of absolute values grows when noise is added to it, and a resample is noisier than the sample. So the bounds
    mirror the draws' at the estimate (the "basic" bootstrap), and the lower one is 0 if noise alone, the resamples'
    deviation from the sample, would give as large an error. The estimate's upward bias at few images remains.

    Args:
        confidence, correct: `(N,)`, as for [`~apm_hf.evaluation.metrics.expected_calibration_error`].
        groups, level, num_resamples, seed: as for [`mean_interval`].
        num_bins: number of bins, of equal width.

    Raises:
        ValueError: as for `expected_calibration_error` and [`mean_interval`].
    """
    confidence, correct = _checked(confidence, level, num_resamples), np.asarray(correct, dtype=np.float64)
    estimate = expected_calibration_error(confidence, correct, num_bins=num_bins)
    gaps = np.zeros((len(correct), num_bins))
    gaps[np.arange(len(correct)), bin_numbers(confidence, num_bins=num_bins)] = correct - confidence
    columns = _per_group(np.column_stack([gaps, np.ones(len(correct))]), groups)  # (N, C) -> (G, C)
    sums = _resampled_sums(columns, num_resamples, np.random.default_rng(seed))
    draws = sums[:, :-1] / sums[:, -1:]  # (R, bins)
    least, most = _bounds(np.abs(draws).sum(axis=1), level)
    noise = np.abs(draws - gaps.mean(axis=0)).sum(axis=1)
    low = 0.0 if estimate <= np.quantile(noise, level) else min(max(2 * estimate - most, 0.0), estimate)
    return Interval(estimate, low, min(max(2 * estimate - least, estimate), 1.0))


def _wilson(values: np.ndarray, level: float) -> Interval:
    # Wilson, Probable Inference, the Law of Succession, and Statistical Inference, JASA 22 (1927).
    count, mean, z = len(values), float(values.mean()), NormalDist().inv_cdf((1 + level) / 2)
    centre = (mean + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (mean * (1 - mean) / count + z**2 / (4 * count**2)) ** 0.5
    # Rounding must not put the bounds on the wrong side of a mean of 0 or 1.
    return Interval(mean, min(max(centre - half, 0.0), mean), max(min(centre + half, 1.0), mean))


def _bootstrap(
    values: np.ndarray,
    groups: ArrayLike | None,
    strata: ArrayLike | None,
    level: float,
    num_resamples: int,
    seed: int,
) -> Interval:
    generator = np.random.default_rng(seed)
    strata = np.zeros(len(values), dtype=np.int64) if strata is None else np.asarray(strata)
    groups = np.arange(len(values)) if groups is None else np.asarray(groups)
    for name, column in (("groups", groups), ("strata", strata)):
        if column.shape != values.shape:
            raise ValueError(f"{name}: expected one per value, {values.shape}, got {column.shape}")
    means, draws = [], []
    for stratum in np.unique(strata):
        chosen = strata == stratum
        columns = np.column_stack([values[chosen], np.ones(chosen.sum())])
        sums = _resampled_sums(_per_group(columns, groups[chosen]), num_resamples, generator)
        means.append(values[chosen].mean())
        draws.append(sums[:, 0] / sums[:, 1])
    return Interval(float(np.mean(means)), *_bounds(np.mean(draws, axis=0), level))


def _per_group(columns: np.ndarray, groups: ArrayLike | None) -> np.ndarray:
    """Sum over the rows of each image: `(N, C)` -> `(G, C)`."""
    if groups is None:
        return columns
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.stack([np.bincount(index, weights=column) for column in columns.T], axis=1)


def _resampled_sums(columns: np.ndarray, num_resamples: int, generator: np.random.Generator) -> np.ndarray:
    """Return column sums over G images drawn with replacement, R times: `(G, C)` -> `(R, C)`."""
    distinct, counts = np.unique(columns, axis=0, return_counts=True)
    size = max(1, _CHUNK // len(distinct))
    chunks = [min(size, num_resamples - start) for start in range(0, num_resamples, size)]
    shares = counts / len(columns)
    return np.concatenate([generator.multinomial(len(columns), shares, size=chunk) @ distinct for chunk in chunks])


def _bounds(draws: np.ndarray, level: float) -> tuple[float, float]:
    low, high = np.quantile(draws, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


def _checked(values: ArrayLike, level: float, num_resamples: int) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"values: expected finite numbers (N,), at least one, got shape {values.shape} or NaN")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a share between 0 and 1, got {level}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples: expected at least 1, got {num_resamples}")
    return values
