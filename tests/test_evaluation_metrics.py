"""Accuracy and calibration against naive references; as metrics of `evaluate` without a network or files."""

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from apm_hf.evaluation.metrics import (
    ExpectedCalibrationError,
    TopKAccuracy,
    bin_numbers,
    expected_calibration_error,
    rank_classes,
    top_k_accuracy,
)


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def scored(generator) -> tuple[np.ndarray, np.ndarray]:
    """Scores of 200 images for 10 classes that know something of the labels."""
    labels = generator.integers(10, size=200)
    scores = generator.standard_normal((200, 10))
    scores[np.arange(200), labels] += 1.5
    return scores, labels


def naive_top_k(ranked, labels, k):
    return sum(label in list(classes)[:k] for classes, label in zip(ranked, labels, strict=True)) / len(labels)


def naive_ece(confidence, correct, num_bins):
    """Guo et al., Eq. 3, bin by bin: I_m = ((m - 1) / M, m / M], and 0 in the first."""
    total = 0.0
    for number in range(1, num_bins + 1):
        low, high = np.linspace(0, 1, num_bins + 1)[[number - 1, number]]
        inside = [i for i, x in enumerate(confidence) if low < x <= high or (x == 0 and number == 1)]
        if inside:
            gap = np.mean([correct[i] for i in inside]) - np.mean([confidence[i] for i in inside])
            total += len(inside) / len(confidence) * abs(gap)
    return total


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_top_k_accuracy_is_what_counting_and_scikit_learn_find(scored, k):
    scores, labels = scored
    ranked = rank_classes(scores)
    assert top_k_accuracy(ranked, labels, k=k) == pytest.approx(naive_top_k(ranked, labels, k))
    assert top_k_accuracy(ranked, labels, k=k) == pytest.approx(top_k_accuracy_score(labels, scores, k=k))
    assert top_k_accuracy(ranked[:, :5], labels, k=k) == pytest.approx(naive_top_k(ranked[:, :5], labels, k))


def test_of_equal_scores_the_first_class_wins():
    assert rank_classes([[1, 3, 3, 0], [0, 0, 0, 0]]).tolist() == [[1, 2, 0, 3], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("ranked", "labels", "k", "message"),
    [
        ([[0, 1]], [0, 1], 1, r"\(1, 2\) and \(2,\)"),
        ([], [], 1, "ranked classes"),
        ([[0.9, 0.1]], [0], 1, "ranked: expected class indices, integers, got float64"),
        ([[0, 1]], [0], 0, "k: expected at least 1, got 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(ranked, labels, k, message):
    with pytest.raises(ValueError, match=message):
        top_k_accuracy(ranked, labels, k=k)


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match="NaN or infinity"):
        rank_classes([[0.1, np.nan]])


@pytest.mark.parametrize("num_bins", [1, 10, 15])
def test_calibration_error_is_what_a_loop_over_bins_finds(generator, num_bins):
    confidence = np.concatenate([generator.random(300), np.linspace(0, 1, 31)])  # the latter lie on edges
    correct = generator.random(len(confidence)) < confidence**2
    expected = naive_ece(confidence, correct, num_bins)
    assert expected > 0.05
    assert expected_calibration_error(confidence, correct, num_bins=num_bins) == pytest.approx(expected)


def test_a_bin_holds_its_upper_edge():
    assert bin_numbers([0, 0.2, 0.2000001, 0.4, 1], num_bins=5).tolist() == [0, 0, 1, 1, 4]


def test_calibration_errors_by_hand():
    assert expected_calibration_error([1.0, 1.0], [True, True]) == 0
    assert expected_calibration_error([1.0, 1.0], [True, False]) == pytest.approx(0.5)
    # Too sure in one bin, not sure enough in another: the errors do not cancel.
    assert expected_calibration_error([0.9, 0.1], [0, 1]) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([0.5, 1.1], [0, 1], "probabilities"),
        ([0.5, np.nan], [0, 1], "probabilities"),
        ([0.5], [0, 1], r"\(1,\) and \(2,\)"),
        ([], [], r"\(0,\) and \(0,\)"),
        ([0.5], [7], "0 and 1 only"),
    ],
)
def test_what_has_no_calibration_is_refused(confidence, correct, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(confidence, correct)


def test_top_k_metric_takes_ranks_or_scores(scored, tmp_path):
    scores, labels = scored
    ranked = rank_classes(scores)
    expected = {f"top_{k}_accuracy": pytest.approx(naive_top_k(ranked, labels, k)) for k in (1, 3)}
    by_rank = TopKAccuracy(cache_dir=str(tmp_path))
    assert by_rank.compute(predictions=ranked[:, :5], references=labels, k=[1, 3]) == expected
    by_score = TopKAccuracy("scores", cache_dir=str(tmp_path))
    assert by_score.compute(predictions=scores, references=labels, k=[1, 3]) == expected


def test_batches_add_up_and_a_metric_can_be_used_again(scored, tmp_path):
    ranked, labels = rank_classes(scored[0])[:, :5].tolist(), scored[1].tolist()
    metric = TopKAccuracy(cache_dir=str(tmp_path))
    at_once = metric.compute(predictions=ranked, references=labels)
    for start in range(0, 200, 64):
        metric.add_batch(predictions=ranked[start : start + 64], references=labels[start : start + 64])
    assert (
        metric.compute()
        == at_once
        == {
            "top_1_accuracy": pytest.approx(naive_top_k(ranked, labels, 1)),
            "top_5_accuracy": pytest.approx(naive_top_k(ranked, labels, 5)),
        }
    )


def test_lists_of_ranks_may_have_different_lengths(tmp_path):
    metric = TopKAccuracy(cache_dir=str(tmp_path))
    scores = metric.compute(predictions=[[3, 1, 2], [0], [4, 2]], references=[2, 0, 9])
    assert scores == {"top_1_accuracy": pytest.approx(1 / 3), "top_5_accuracy": pytest.approx(2 / 3)}


def test_scores_are_not_taken_for_ranks(tmp_path):
    with pytest.raises(ValueError, match=r'TopKAccuracy\("scores"\), got \[0.9, 0.1\]'):
        TopKAccuracy(cache_dir=str(tmp_path)).compute(predictions=[[0.9, 0.1]], references=[0])
    with pytest.raises(ValueError, match="config_name: expected None or 'scores', got 'logits'"):
        TopKAccuracy("logits", cache_dir=str(tmp_path))


def test_calibration_metric_is_its_function(generator, tmp_path):
    confidence = generator.random(100)
    correct = generator.random(100) < 0.5
    metric = ExpectedCalibrationError(cache_dir=str(tmp_path))
    for bins in (15, 4):
        score = metric.compute(predictions=confidence, references=correct, num_bins=bins)
        assert score == {"expected_calibration_error": pytest.approx(naive_ece(confidence, correct, bins))}


def test_metrics_at_work_at_once_share_no_file(tmp_path):
    """As in several processes with one cache folder, which the library's own metrics would lock."""
    metrics = [TopKAccuracy(cache_dir=str(tmp_path)) for _ in range(2)]
    for label in range(4):
        for number, metric in enumerate(metrics):
            metric.add_batch(predictions=[[number]], references=[label * number])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert [metric.compute()["top_1_accuracy"] for metric in metrics] == [1, 0.25]


def test_nothing_to_score_is_refused(tmp_path):
    metric = ExpectedCalibrationError(cache_dir=str(tmp_path))
    metric.compute(predictions=[0.5], references=[1])
    with pytest.raises(ValueError, match="expected_calibration_error: expected predictions and references, got none"):
        metric.compute()


def test_scoring_leaves_the_global_generator_alone(tmp_path):
    before = np.random.get_state()[1].copy()
    TopKAccuracy(cache_dir=str(tmp_path)).compute(predictions=[[0]], references=[0])
    assert (np.random.get_state()[1] == before).all()
