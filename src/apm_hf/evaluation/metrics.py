"""Compute accuracy and calibration, as functions of arrays and as `evaluate.Metric`s that load without a network.

Calibration: the expected calibration error of Guo et al. (arXiv:1706.04599, Sec. 2): confidences in [0, 1] are put
into equal-width bins, each with its upper edge, and ECE is the mean over images of |accuracy - confidence| of the bin.

Legend: N images, K classes, M ranks, bins of confidence.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

try:
    import datasets
    import evaluate
except ImportError as error:
    raise ImportError('evaluation needs the packages `datasets` and `evaluate`: pip install "apm_hf[eval]"') from error

NUM_BINS = 15  # arXiv:1706.04599, Sec. 5
_PADDING = -1  # no class


def rank_classes(scores: ArrayLike) -> np.ndarray:
    """Rank classes: `(N, K)` scores -> `(N, K)` class indices, best first; ties go to the first class.

    Raises:
        ValueError: scores that are no such matrix, or not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ValueError(f"scores: expected finite numbers (N, K), got shape {scores.shape} or NaN or infinity")
    return np.argsort(-scores, axis=1, kind="stable")


def top_k_accuracy(ranked: ArrayLike, labels: ArrayLike, *, k: int = 1) -> float:
    """Return the share of the images whose label is among the first k classes.

    Args:
        ranked: `(N, M)`, class indices, best first; fewer than k if there are fewer classes.
        labels: `(N,)`, class indices.
        k: at least 1.

    Returns:
        In [0, 1].

    Raises:
        ValueError: no images, shapes that do not fit, class indices that are no integers, k < 1.
    """
    ranked, labels = np.asarray(ranked), np.asarray(labels)
    if ranked.ndim != 2 or not ranked.size or labels.shape != ranked.shape[:1]:
        raise ValueError(f"expected ranked classes (N, M) and labels (N,), got {ranked.shape} and {labels.shape}")
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    for name, classes in (("ranked", ranked), ("labels", labels)):
        if classes.dtype.kind not in "iu":
            raise ValueError(f"{name}: expected class indices, integers, got {classes.dtype}")
    return float((ranked[:, :k] == labels[:, None]).any(axis=1).mean())


def bin_numbers(confidence: ArrayLike, *, num_bins: int = NUM_BINS) -> np.ndarray:
    """Return bin indices of confidences: bin m holds (m / num_bins, (m + 1) / num_bins], the first also 0.

    Raises:
        ValueError: confidences outside [0, 1] or no numbers, num_bins < 1.
    """
    confidence = np.asarray(confidence, dtype=np.float64)
    if num_bins < 1:
        raise ValueError(f"num_bins: expected at least 1, got {num_bins}")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError("confidence: expected probabilities in [0, 1], got others or NaN")
    return np.searchsorted(np.linspace(0, 1, num_bins + 1)[1:-1], confidence, side="left")


def expected_calibration_error(confidence: ArrayLike, correct: ArrayLike, *, num_bins: int = NUM_BINS) -> float:
    """Return the mean distance between confidence and accuracy; biased upwards for few images.

    Args:
        confidence: `(N,)`, probability of the predicted class.
        correct: `(N,)`, whether the prediction is right.
        num_bins: number of bins, of equal width.

    Returns:
        In [0, 1]; 0 is calibrated.

    Raises:
        ValueError: no images, different lengths, confidences outside [0, 1], `correct` other than 0 and 1.
    """
    confidence, correct = np.asarray(confidence, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if confidence.ndim != 1 or not confidence.size or correct.shape != confidence.shape:
        raise ValueError(f"expected confidence (N,) and correct (N,), got {confidence.shape} and {correct.shape}")
    if not np.isin(correct, (0, 1)).all():
        raise ValueError("correct: expected 0 and 1 only, got others")
    gaps = np.bincount(bin_numbers(confidence, num_bins=num_bins), weights=correct - confidence)
    return float(np.abs(gaps).sum() / len(confidence))


class _Metric(evaluate.Metric):
    """Keep inputs in memory, so that any number of processes may share one cache folder.

    With `num_process` > 1 the library needs files: give each run its own `experiment_id`, as usual.
    """

    description, inputs, citation = "", "", ""

    def __init__(self, config_name: str | None = None, *, keep_in_memory: bool | None = None, **options: Any) -> None:
        in_memory = options.get("num_process", 1) == 1 if keep_in_memory is None else keep_in_memory
        super().__init__(config_name, keep_in_memory=in_memory, **options)

    def compute(self, **inputs: Any) -> dict[str, Any] | None:
        """Score added inputs together with those given here. Raises ValueError if there are none."""
        if self.writer is None and all(value is None for value in inputs.values()):
            raise ValueError(f"{self.name}: expected predictions and references, got none")
        return super().compute(**inputs)

    def _features(self) -> Mapping[str, Any]:
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation=self.citation,
            inputs_description=self.inputs,
            features=datasets.Features(self._features()),
        )


class TopKAccuracy(_Metric):
    """Compute the share of the images whose label is among the first k classes, in [0, 1].

    `TopKAccuracy()` takes ranked class indices, best first; `TopKAccuracy("scores")` takes a score per class.
    """

    inputs = """
    predictions: for every image its class indices, best first; or, in the configuration "scores", its K scores.
    references: class indices.
    k: list of ranks to report; default (1, 5).
Returns: {"top_1_accuracy": ..., "top_5_accuracy": ...}, in [0, 1].
"""

    def _features(self) -> Mapping[str, Any]:
        if self.config_name not in ("default", "scores"):
            raise ValueError(f"config_name: expected None or 'scores', got {self.config_name!r}")
        # Ranks are floats too: with integers the library would accept scores and truncate them.
        number = datasets.Value("float64")
        return {"predictions": datasets.Sequence(number), "references": datasets.Value("int64")}

    def _compute(
        self, *, predictions: Sequence[Sequence[float]], references: Sequence[int], k: Sequence[int] = (1, 5)
    ) -> dict[str, float]:
        ranked = rank_classes(predictions) if self.config_name == "scores" else _padded(predictions)
        return {f"top_{rank}_accuracy": top_k_accuracy(ranked, references, k=rank) for rank in k}


class ExpectedCalibrationError(_Metric):
    """Compute the mean distance between confidence and accuracy over equal-width bins, in [0, 1]."""

    citation = "Guo et al., On Calibration of Modern Neural Networks, arXiv:1706.04599"
    inputs = """
    predictions: for every image the probability of the class that was predicted.
    references: whether that class was right.
    num_bins: default 15.
Returns: {"expected_calibration_error": ...}, in [0, 1].
"""

    def _features(self) -> Mapping[str, Any]:
        return {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}

    def _compute(
        self, *, predictions: Sequence[float], references: Sequence[int], num_bins: int = NUM_BINS
    ) -> dict[str, float]:
        error = expected_calibration_error(predictions, references, num_bins=num_bins)
        return {"expected_calibration_error": error}


def _padded(ranked: Sequence[Sequence[float]]) -> np.ndarray:
    """Pad ranked lists of any lengths to `(N, longest)`, integers."""
    padded = np.full((len(ranked), max(map(len, ranked))), _PADDING, dtype=np.int64)
    for row, classes in zip(padded, ranked, strict=True):
        row[: len(classes)] = classes
        if (row[: len(classes)] != classes).any():
            raise ValueError(f'expected ranked class indices, or TopKAccuracy("scores"), got {list(classes)[:5]}')
    return padded
