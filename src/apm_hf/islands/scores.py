"""Score segments against annotated ones, independent of label values: ARI, NMI, matched mIoU and boundary F.

The first three are computed from one contingency table, so that a mask of 400 x 600 pixels costs milliseconds; the
fourth compares the positions of the boundaries (Martin et al. 2004, 10.1109/TPAMI.2004.1273918; Arbelaez et al. 2011,
10.1109/TPAMI.2010.161). Theirs pairs boundary pixels one to one; here a boundary pixel is correct if any one of the
other map lies within the tolerance. That is never stricter, so the two scores are not comparable.

Legend: (H, W) pixels, T true segments, P predicted ones.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

BOUNDARY_TOLERANCE = 0.0075  # share of the image's diagonal: the BSDS benchmark's `maxDist`
_WIDEST_TABLE = 2**16  # labels with a wider range are numbered by sorting


@dataclass(frozen=True)
class SegmentationScores:
    """Hold scores of segments against the true ones; higher is better, 1 is best.

    Attributes:
        ari: adjusted Rand index, 0 for random segments, may be negative.
        nmi: mutual information over the arithmetic mean of the entropies, in [0, 1].
        miou: intersection over union after the best one-to-one matching, averaged over the true segments, in [0, 1].
        boundary_f: harmonic mean of the boundaries' precision and recall, in [0, 1].
    """

    ari: float
    nmi: float
    miou: float
    boundary_f: float


def segmentation_scores(
    predicted: ArrayLike,
    truth: ArrayLike,
    *,
    ignore: int | tuple[int, ...] | None = None,
    tolerance: float = BOUNDARY_TOLERANCE,
) -> SegmentationScores:
    """Compare two segmentations of one image, independent of label values.

    If truth and prediction are both a single segment, all scores are 1. If only one of them is, ARI, NMI and boundary
    F are 0, and mIoU is the largest true segment's share of the pixels over T (one predicted segment), or the largest
    predicted segment's share (one true segment). A true segment without a partner counts 0 in mIoU.

    Args:
        predicted: `(H, W)`, integers.
        truth: `(H, W)`, integers.
        ignore: labels of the truth whose pixels, and boundaries next to them, are ignored.
        tolerance: maximum distance between boundaries, as a share of the diagonal of (H, W).

    Raises:
        ValueError: for other shapes or types, a negative tolerance, or no pixel left to score.
        ImportError: SciPy is not installed.
    """
    predicted, truth = np.asarray(predicted), np.asarray(truth)
    if predicted.ndim != 2 or predicted.shape != truth.shape:
        raise ValueError(f"expected two label maps of one shape (H, W), got {predicted.shape} and {truth.shape}")
    for name, labels in (("predicted", predicted), ("truth", truth)):
        if labels.dtype.kind not in "iub":
            raise ValueError(f"{name}: expected integers, got {labels.dtype}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance: expected a part of the diagonal, at least 0, got {tolerance}")
    valid = ~np.isin(truth, [] if ignore is None else ignore)
    if not valid.any():
        raise ValueError(
            f"expected at least one pixel to score, got none: ignore={ignore} leaves out all {valid.size}"
        )
    table = contingency_table(truth[valid], predicted[valid])
    return SegmentationScores(
        ari=adjusted_rand_index(table),
        nmi=normalised_mutual_information(table),
        miou=matched_iou(table),
        boundary_f=boundary_f(predicted, truth, valid=valid, tolerance=tolerance),
    )


def contingency_table(truth: NDArray, predicted: NDArray) -> NDArray[np.int64]:
    """Count the pixels `(T, P)` that pairs of segments share, for labels `(N,)` of both; no row or column is empty."""
    (rows, num_rows), (cols, num_cols) = _numbered(truth), _numbered(predicted)
    return np.bincount(rows * num_cols + cols, minlength=num_rows * num_cols).reshape(num_rows, num_cols)


def adjusted_rand_index(table: NDArray[np.int64]) -> float:
    """Return the adjusted Rand index: agreement on pairs of pixels, corrected for chance (Hubert & Arabie 1985)."""
    together, in_truth, in_predicted, num_pairs = (
        sum(count * (count - 1) // 2 for count in counts.ravel().tolist())  # Python's integers: products exceed 2**63
        for counts in (table, table.sum(axis=1), table.sum(axis=0), table.sum())
    )
    if together == in_truth == in_predicted:
        return 1.0
    # (together - expected) / ((in_truth + in_predicted) / 2 - expected), both sides times 2 num_pairs
    expected = 2 * in_truth * in_predicted
    return (2 * together * num_pairs - expected) / ((in_truth + in_predicted) * num_pairs - expected)


def normalised_mutual_information(table: NDArray[np.int64]) -> float:
    """Return mutual information over the arithmetic mean of the two entropies; 1 if both are one segment."""
    in_truth, in_predicted, joint = (_entropy(counts) for counts in (table.sum(axis=1), table.sum(axis=0), table))
    mean = (in_truth + in_predicted) / 2
    return 1.0 if mean == 0 else float(np.clip((in_truth + in_predicted - joint) / mean, 0, 1))


def matched_iou(table: NDArray[np.int64]) -> float:
    """Return the mean IoU of T true segments and their partners in the best one-to-one matching."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('scoring segments needs SciPy: pip install "apm_hf[eval]"') from error
    iou = table / (table.sum(axis=1, keepdims=True) + table.sum(axis=0, keepdims=True) - table)
    return float(iou[linear_sum_assignment(iou, maximize=True)].sum() / len(table))


def boundary_f(predicted: NDArray, truth: NDArray, *, valid: NDArray[np.bool_], tolerance: float) -> float:
    """Return the F score of the boundaries of two maps `(H, W)`: 1 if neither has any, 0 if only one has."""
    try:
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise ImportError('scoring boundaries needs SciPy: pip install "apm_hf[eval]"') from error
    edges = [boundaries(labels, valid) for labels in (predicted, truth)]
    if not all(edge.any() for edge in edges):
        return float(not any(edge.any() for edge in edges))
    reach = tolerance * np.hypot(*truth.shape)
    near_predicted, near_truth = (distance_transform_edt(~edge) <= reach for edge in edges)
    precision, recall = near_truth[edges[0]].mean(), near_predicted[edges[1]].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def near_boundaries(labels: NDArray, valid: NDArray[np.bool_], reach: float) -> NDArray[np.bool_]:
    """Return `(H, W)` bool, true for valid pixels at most `reach` pixels from a boundary of a map `(H, W)`."""
    try:
        from scipy.ndimage import distance_transform_edt
    except ImportError as error:
        raise ImportError('scoring boundaries needs SciPy: pip install "apm_hf[eval]"') from error
    edges = boundaries(labels, valid)
    return valid & (distance_transform_edt(~edges) <= reach) if edges.any() else edges


def boundaries(labels: NDArray, valid: NDArray[np.bool_] | None = None) -> NDArray[np.bool_]:
    """Return `(H, W)` bool, true if the pixel to the right, below, or below to the right has another label.

    Args:
        labels: `(H, W)`.
        valid: `(H, W)`; a boundary is only between two valid pixels.
    """
    valid = np.ones(labels.shape, dtype=bool) if valid is None else valid
    edges = np.zeros(labels.shape, dtype=bool)
    rows, cols = labels.shape
    for down, right in ((0, 1), (1, 0), (1, 1)):
        here, there = np.s_[: rows - down, : cols - right], np.s_[down:, right:]
        edges[here] |= (labels[here] != labels[there]) & valid[here] & valid[there]
    return edges


def resize_labels(labels: ArrayLike, size: tuple[int, int]) -> NDArray:
    """Resize by nearest neighbour: each new cell gets the label of the old cell that contains its centre.

    Args:
        labels: `(H, W)` or `(H, W, ...)`.
        size: new (height, width).

    Raises:
        ValueError: for an empty map or size.
    """
    labels = np.asarray(labels)
    if labels.ndim < 2 or not labels.size or min(size) < 1:
        raise ValueError(f"expected a label map (H, W) and a positive size, got {labels.shape} and {size}")
    rows, cols = (
        (2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, labels.shape, strict=False)
    )  # integers: the centre (i + 1/2) * old / new without rounding
    return labels[rows[:, None], cols]


def _numbered(labels: NDArray) -> tuple[NDArray[np.int64], int]:
    """Renumber labels `(N,)` as 0, 1, ... in their order; return them and their number."""
    low, high = int(labels.min()), int(labels.max())
    if high - low >= _WIDEST_TABLE:
        names, numbers = np.unique(labels, return_inverse=True)
        return numbers, len(names)
    shifted = labels.astype(np.int64) - low
    present = np.bincount(shifted) > 0
    return (np.cumsum(present) - 1)[shifted], int(present.sum())


def _entropy(counts: NDArray[np.int64]) -> float:
    """Return the entropy in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


__all__ = ["BOUNDARY_TOLERANCE", "SegmentationScores", "resize_labels", "segmentation_scores"]
