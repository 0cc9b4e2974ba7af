"""Intervals: against references, by their coverage on simulated data, and what must not change them."""

import numpy as np
import pytest
from scipy.stats import binomtest, norm

import apm_hf.evaluation.statistics as statistics
from apm_hf.evaluation.statistics import Interval, calibration_interval, mean_interval, paired_interval


@pytest.fixture
def generator() -> np.random.Generator:
    return np.random.default_rng(0)


def bounds(interval: Interval) -> tuple[float, float]:
    return interval.low, interval.high


def naive_bootstrap(values, groups, num_resamples, generator):
    """Draw images by index, one resample after the other, and take the mean of all their rows."""
    images = np.unique(groups)
    rows = {image: values[groups == image] for image in images}
    draws = []
    for _ in range(num_resamples):
        drawn = generator.choice(images, size=len(images))
        draws.append(np.concatenate([rows[image] for image in drawn]).mean())
    return np.quantile(draws, (0.025, 0.975))


@pytest.mark.parametrize(("successes", "total"), [(0, 20), (7, 20), (20, 20), (180, 200)])
def test_an_accuracy_gets_wilsons_interval(successes, total):
    values = np.arange(total) < successes
    expected = binomtest(successes, total).proportion_ci(0.9, method="wilson")
    interval = mean_interval(values, level=0.9, groups=np.arange(total)[::-1])
    assert interval.mean == pytest.approx(successes / total)
    assert bounds(interval) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert interval.low <= interval.mean <= interval.high


def test_the_bootstrap_is_that_of_drawing_images_one_by_one(generator):
    groups = generator.integers(40, size=300)  # images with different numbers of rows
    values = (generator.random(300) < 0.2 + 0.6 * (groups % 2)).astype(float)
    expected = naive_bootstrap(values, groups, 3000, generator)
    interval = mean_interval(values, groups=groups, num_resamples=20_000)
    assert interval.mean == pytest.approx(values.mean())
    assert bounds(interval) == pytest.approx(tuple(expected), abs=0.008)
    assert interval.high - interval.low > 0.15


def test_rows_of_one_image_count_as_one(generator):
    values = generator.random(50)
    once = mean_interval(values)
    copies = mean_interval(np.repeat(values, 8), groups=np.repeat(np.arange(50), 8))
    assert (copies.mean, *bounds(copies)) == pytest.approx((once.mean, *bounds(once)))
    as_rows = mean_interval(np.repeat(values, 8))  # what not knowing the images would claim
    assert as_rows.high - as_rows.low < 0.5 * (once.high - once.low)


def simulate(generator, repeats=300):
    """Means of 60 images with 5 rows each, which an image's difficulty ties together; the true mean is 0.1."""
    for _ in range(repeats):
        difficulty = generator.normal(0.1, 1.0, size=60)
        theirs = generator.normal(0, 1, size=(60, 5))
        ours = theirs + difficulty[:, None] + generator.normal(0, 0.5, size=(60, 5))
        yield ours.ravel(), theirs.ravel(), np.repeat(np.arange(60), 5)


def test_paired_intervals_cover_the_truth_as_often_as_they_say(generator):
    by_image = by_row = 0
    for number, (ours, theirs, groups) in enumerate(simulate(generator)):
        low, high = bounds(paired_interval(ours, theirs, groups=groups, num_resamples=300, seed=number))
        by_image += low <= 0.1 <= high
        low, high = bounds(paired_interval(ours, theirs, num_resamples=300, seed=number))
        by_row += low <= 0.1 <= high
    assert 0.90 <= by_image / 300 <= 0.98
    assert by_row / 300 < 0.75  # rows are not independent: the simulation can tell


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_intervals_of_accuracies_cover_the_truth(generator, rate):
    hits = 0
    for values in generator.random((2000, 100)) < rate:
        low, high = bounds(mean_interval(values))
        hits += low <= rate <= high
    assert 0.93 <= hits / 2000 <= 0.975


def test_a_method_equal_to_its_baseline_is_no_better_for_sure(generator):
    values = generator.random(30) < 0.5
    assert paired_interval(values, values, groups=np.arange(30) // 3) == Interval(0, 0, 0)


def test_pairs_tell_more_than_two_means(generator):
    theirs = generator.random(400) < 0.5
    ours = theirs | (generator.random(400) < 0.05)
    paired = paired_interval(ours, theirs)
    assert 0 < paired.low < paired.mean < paired.high
    assert mean_interval(ours).low < mean_interval(theirs).high
    turned = paired_interval(theirs, ours)
    assert (turned.mean, turned.low, turned.high) == pytest.approx(
        (-paired.mean, -paired.high, -paired.low), abs=0.005
    )


def test_intervals_depend_on_the_seed_and_on_nothing_else(generator, monkeypatch):
    values, groups = generator.integers(9, size=120) / 8, np.repeat(np.arange(40), 3)
    interval = mean_interval(values, groups=groups, seed=3)
    order = generator.permutation(120)
    again = mean_interval(values[order], groups=1000 - groups[order], seed=3)
    assert again == interval
    monkeypatch.setattr(statistics, "_CHUNK", 50)
    assert mean_interval(values, groups=groups, seed=3) == interval
    assert mean_interval(values, groups=groups, seed=4) != interval
    state = np.random.get_state()[1].copy()
    mean_interval(values)
    assert (np.random.get_state()[1] == state).all()


def test_more_confidence_is_wider(generator):
    values = generator.random(100)
    narrow, wide = mean_interval(values, level=0.8), mean_interval(values, level=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_strata_count_alike_whatever_their_size(generator):
    large, small = generator.normal(0, 1, size=900), generator.normal(1, 1, size=100)
    strata = np.repeat(["large", "small"], [900, 100])
    interval = mean_interval(np.concatenate([large, small]), strata=strata)
    assert interval.mean == pytest.approx((large.mean() + small.mean()) / 2)
    half = norm.ppf(0.975) / 2 * np.sqrt(large.var() / 900 + small.var() / 100)
    assert bounds(interval) == pytest.approx((interval.mean - half, interval.mean + half), abs=0.01)
    # The same image number in two benchmarks is not the same image.
    both = mean_interval(np.concatenate([large, small]), groups=np.r_[:900, :100], strata=strata)
    assert bounds(both) == pytest.approx(bounds(interval))


def calibration(generator, shift):
    confidence = generator.beta(4, 2, size=300)
    return confidence, generator.random(300) < np.clip(confidence - shift, 0, 1)


@pytest.mark.parametrize("shift", [0, 0.15])
def test_calibration_intervals_cover_the_truth(generator, shift):
    hits = 0
    for number in range(100):
        confidence, correct = calibration(generator, shift)
        interval = calibration_interval(confidence, correct, num_resamples=300, seed=number)
        assert interval.low <= interval.mean <= interval.high
        hits += interval.low <= shift <= interval.high
    assert hits >= 85


def test_calibration_error_of_the_sure_and_wrong_is_told_from_noise(generator):
    assert calibration_interval(*calibration(generator, 0.3)).low > 0.2
    confidence, correct = calibration(generator, 0.1)
    once = calibration_interval(confidence, correct)
    groups = np.repeat(np.arange(300), 4)
    copies = calibration_interval(np.repeat(confidence, 4), np.repeat(correct, 4), groups=groups)
    assert (copies.mean, *bounds(copies)) == pytest.approx((once.mean, *bounds(once)), abs=1e-9)


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "at least one"),
        ([0.1, np.nan], {}, "finite"),
        ([[0.1, 0.2]], {}, r"shape \(1, 2\)"),
        ([0.1, 0.2], {"level": 95}, "level: expected a share between 0 and 1, got 95"),
        ([0.1, 0.2], {"num_resamples": 0}, "num_resamples: expected at least 1, got 0"),
        ([0.1, 0.2], {"groups": [1]}, r"groups: expected one per value, \(2,\), got \(1,\)"),
        ([0, 1], {"groups": [1]}, r"groups: expected one per value, \(2,\), got \(1,\)"),
        ([0.1, 0.2], {"strata": [1, 1, 2]}, r"strata: expected one per value, \(2,\), got \(3,\)"),
    ],
)
def test_what_has_no_interval_is_refused(values, options, message):
    with pytest.raises(ValueError, match=message):
        mean_interval(values, **options)


def test_pairs_must_be_as_many():
    with pytest.raises(ValueError, match="as many of ours as of theirs, got 2 and 3"):
        paired_interval([1, 0], [1, 0, 1])
