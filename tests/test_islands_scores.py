"""Scores of segments against scikit-learn, brute force and loops over pixels; edge cases as they are documented."""

from itertools import permutations

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from apm_hf.islands.scores import boundaries, near_boundaries, resize_labels, segmentation_scores


def blocks(generator, rows, cols, num_labels, *, cell=4):
    """`(rows * cell, cols * cell)`: random labels on a grid of square cells."""
    return generator.integers(num_labels, size=(rows, cols)).repeat(cell, axis=0).repeat(cell, axis=1)


@pytest.fixture(params=range(4))
def maps(request):
    """A truth, and a prediction that agrees with it less with every parameter."""
    generator = np.random.default_rng(request.param)
    truth = blocks(generator, 5, 6, 5)
    noise = blocks(generator, 10, 12, 7, cell=2)
    return np.where(
        generator.random(truth.shape) < 0.3 * request.param, noise, np.roll(truth, request.param, 1)
    ), truth


def naive_matched_iou(predicted, truth):
    """The best of all one-to-one assignments."""
    names, others = np.unique(truth).tolist(), np.unique(predicted).tolist()
    others += [None] * max(0, len(names) - len(others))

    def iou(name, other):
        first, second = truth == name, predicted == (other if other is not None else np.nan)
        return (first & second).sum() / (first | second).sum()

    table = [[iou(name, other) for other in others] for name in names]
    assignments = permutations(range(len(others)), len(names))
    return max(sum(table[row][col] for row, col in enumerate(cols)) for cols in assignments) / len(names)


def naive_boundary_f(predicted, truth, reach):
    def edge_points(labels):
        rows, cols = labels.shape
        neighbours = ((0, 1), (1, 0), (1, 1))
        return [
            (r, c)
            for r in range(rows)
            for c in range(cols)
            if any(r + i < rows and c + j < cols and labels[r + i, c + j] != labels[r, c] for i, j in neighbours)
        ]

    def share(points, others):
        near = [min(np.hypot(r - y, c - x) for y, x in others) <= reach for r, c in points]
        return sum(near) / len(near)

    precision, recall = (share(*pair) for pair in permutations([edge_points(predicted), edge_points(truth)]))
    return 2 * precision * recall / (precision + recall)


def test_ari_and_nmi_are_scikit_learns(maps):
    predicted, truth = maps
    scores = segmentation_scores(predicted, truth)
    assert scores.ari == pytest.approx(adjusted_rand_score(truth.ravel(), predicted.ravel()), abs=1e-12)
    assert scores.nmi == pytest.approx(normalized_mutual_info_score(truth.ravel(), predicted.ravel()), abs=1e-12)


def test_matched_iou_is_that_of_the_best_assignment(maps):
    predicted, truth = maps
    for other in (predicted, predicted % 3, predicted // 6):  # more and fewer segments than the truth has
        assert segmentation_scores(other, truth).miou == pytest.approx(naive_matched_iou(other, truth), abs=1e-12)


@pytest.mark.parametrize("tolerance", [0.0, 0.04, 0.08])
def test_boundary_f_is_what_a_loop_over_boundary_pixels_finds(maps, tolerance):
    predicted, truth = maps
    expected = naive_boundary_f(predicted, truth, tolerance * np.hypot(*truth.shape))
    assert segmentation_scores(predicted, truth, tolerance=tolerance).boundary_f == pytest.approx(expected, abs=1e-12)


def test_numbers_of_segments_play_no_role(maps):
    predicted, truth = maps
    expected = segmentation_scores(predicted, truth)
    for renamed in (predicted * -3 - 1, predicted * 10**12, predicted.astype(np.uint8), predicted + 2**40):
        assert vars(segmentation_scores(renamed, truth + 200)) == pytest.approx(vars(expected), abs=1e-12)
    assert segmentation_scores(truth * -7, truth) == segmentation_scores(truth, truth)
    assert vars(segmentation_scores(truth * -7, truth)) == {"ari": 1, "nmi": 1, "miou": 1, "boundary_f": 1}


def test_counts_of_large_masks_do_not_overflow():
    truth = np.zeros((2000, 3000), dtype=np.uint8)
    truth[:, 1500:] = 1
    predicted = truth.copy()
    predicted[:1000] = 2
    scores = segmentation_scores(predicted, truth)
    n = truth.size  # cells of the table: twice n/4 in the common segment, n/4 in each own one
    together, in_truth, in_predicted = (4 * (n / 4) ** 2, 2 * (n / 2) ** 2, (n / 2) ** 2 + 2 * (n / 4) ** 2)
    expected = in_truth * in_predicted / n**2
    assert scores.ari == pytest.approx((together - expected) / ((in_truth + in_predicted) / 2 - expected), rel=1e-5)
    assert scores.miou == 0.5  # each true half is matched with its own quarter


def test_segments_drawn_by_chance_score_nothing():
    generator = np.random.default_rng(0)
    truth, predicted = generator.integers(4, size=(2, 60, 80))
    scores = segmentation_scores(predicted, truth)
    assert abs(scores.ari) < 0.005 and scores.nmi < 0.01


def test_single_segments_score_as_documented():
    one = np.zeros((8, 10), dtype=int)
    thirds = one.copy()
    thirds[:, :6], thirds[:2, 6:] = 1, 2  # 48, 8 and 24 of 80 pixels
    assert vars(segmentation_scores(one, one)) == {"ari": 1, "nmi": 1, "miou": 1, "boundary_f": 1}
    split = segmentation_scores(thirds, one)
    assert (split.ari, split.nmi, split.boundary_f) == (0, 0, 0) and split.miou == pytest.approx(48 / 80)
    merged = segmentation_scores(one, thirds)
    assert (merged.ari, merged.nmi, merged.boundary_f) == (0, 0, 0) and merged.miou == pytest.approx(48 / 80 / 3)


def test_boundaries_count_within_the_tolerance_and_not_beyond():
    truth = np.zeros((60, 80), dtype=int)  # the diagonal is 100
    truth[:, 40:] = 1
    for shift, expected in ((-3, 1.0), (3, 1.0), (4, 0.0)):
        moved = np.zeros_like(truth)
        moved[:, 40 + shift :] = 1
        assert segmentation_scores(moved, truth, tolerance=0.03).boundary_f == expected


def test_boundaries_are_one_pixel_wide():
    labels = np.zeros((5, 6), dtype=int)
    labels[2:, 3:] = 1
    expected = np.zeros((5, 6), dtype=bool)
    expected[1, 2:] = expected[1:, 2] = True
    np.testing.assert_array_equal(boundaries(labels), expected)


def test_ignored_pixels_have_no_influence(maps):
    predicted, truth = maps
    hidden = np.zeros(truth.shape, dtype=bool)
    hidden[3:9, 4:12] = True
    with_holes = np.where(hidden, 255, truth)
    scores = segmentation_scores(predicted, with_holes, ignore=255)
    assert scores == segmentation_scores(np.where(hidden, 99, predicted), with_holes, ignore=255)
    assert scores == segmentation_scores(
        predicted, np.where(hidden & (predicted > 2), 254, with_holes), ignore=(255, 254)
    )
    assert scores != segmentation_scores(predicted, with_holes)
    kept = ~hidden
    assert scores.ari == pytest.approx(adjusted_rand_score(truth[kept], predicted[kept]))
    flat = np.where(hidden, 255, 0)  # its only boundary is that of the hole
    assert segmentation_scores(np.zeros_like(flat), flat, ignore=255).boundary_f == 1.0


@pytest.mark.parametrize(
    ("predicted", "truth", "options", "message"),
    [
        (np.zeros((3, 4), int), np.zeros((4, 3), int), {}, r"one shape \(H, W\), got \(3, 4\) and \(4, 3\)"),
        (np.zeros(4, int), np.zeros(4, int), {}, r"got \(4,\) and \(4,\)"),
        (np.zeros((3, 4)), np.zeros((3, 4), int), {}, "predicted: expected integers, got float64"),
        (np.zeros((3, 4), int), np.zeros((3, 4)), {}, "truth: expected integers, got float64"),
        (np.zeros((3, 4), int), np.zeros((3, 4), int), {"ignore": 0}, "at least one pixel to score, got none"),
        (np.zeros((0, 4), int), np.zeros((0, 4), int), {}, "at least one pixel to score, got none"),
        (np.zeros((3, 4), int), np.zeros((3, 4), int), {"tolerance": -0.1}, "tolerance: .*got -0.1"),
    ],
)
def test_what_cannot_be_scored_is_refused(predicted, truth, options, message):
    with pytest.raises(ValueError, match=message):
        segmentation_scores(predicted, truth, **options)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (5, 7), (10, 14), (17, 4)])
def test_resized_labels_are_those_under_the_new_cells_centres(size):
    labels = np.arange(35).reshape(5, 7)
    resized = resize_labels(labels, size)
    assert resized.shape == size and resized.dtype == labels.dtype
    for row in range(size[0]):
        for col in range(size[1]):
            assert resized[row, col] == labels[int((row + 0.5) / size[0] * 5), int((col + 0.5) / size[1] * 7)]


def test_resizing_to_multiples_and_back_changes_nothing():
    labels = np.random.default_rng(0).integers(9, size=(4, 6))
    larger = resize_labels(labels, (12, 30))
    np.testing.assert_array_equal(larger, labels.repeat(3, axis=0).repeat(5, axis=1))
    np.testing.assert_array_equal(resize_labels(larger, (4, 6)), labels)
    for bad in ((labels, (0, 3)), (np.zeros((0, 3), int), (2, 2)), (np.zeros(3, int), (2, 2))):
        with pytest.raises(ValueError, match="expected a label map"):
            resize_labels(*bad)


def test_pixels_near_boundaries_are_within_reach_and_valid():
    labels, valid = np.zeros((5, 20), dtype=int), np.ones((5, 20), dtype=bool)
    labels[:, 10:] = 1  # the boundary is column 9
    valid[0] = False
    near = near_boundaries(labels, valid, 3)
    assert near[1:].any(axis=0).nonzero()[0].tolist() == [*range(6, 13)] and not near[0].any()
    assert not near_boundaries(np.zeros((5, 20), dtype=int), valid, 3).any()
