"""Agreement of neighbours and of distant locations, and the signs of collapse, against naive references."""

import math

import numpy as np
import pytest
import torch

from apm_hf.islands import (
    agreement,
    collapse,
    distant_agreement,
    effective_rank,
    mean_pairwise_cosine,
    neighbour_agreement,
)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(first, second):
    first, second = first.double(), second.double()
    norms = first.norm() * second.norm()
    return float(first @ second / norms) if norms > 0 else 0.0


def naive_neighbours(features, mean, distance):
    rows, cols = features.shape[:2]
    centred = features - mean
    cosines = []
    for row in range(rows):
        for col in range(cols):
            for other in ((row + distance, col), (row, col + distance)):
                if other[0] < rows and other[1] < cols:
                    cosines.append(cosine(centred[row, col], centred[other]))
    return np.mean(cosines)


@pytest.fixture(params=[2, 7, 10**6], ids=["chunks of 2", "chunks of 7", "one chunk"], autouse=True)
def chunk_size(request, monkeypatch):
    """Answers do not depend on it."""
    monkeypatch.setattr(agreement, "CHUNK_LOCATIONS", request.param)


@pytest.mark.parametrize("distance", [1, 2, 4])
@pytest.mark.parametrize("with_mean", [False, True])
def test_neighbours_are_those_counted_one_by_one(distance, with_mean):
    maps = random(2, 3, 4, 6, 5) + 1  # (B, N, rows, cols, F); no two rows are 4 apart
    mean = maps.mean(dim=(0, 1, 2, 3)) if with_mean else None
    found = neighbour_agreement(maps, mean, distance=distance)
    assert found.shape == (2, 3) and found.dtype == torch.float32
    for image in range(2):
        for level in range(3):
            expected = naive_neighbours(maps[image, level], mean if with_mean else 0, distance)
            assert float(found[image, level]) == pytest.approx(expected, abs=1e-6)


def test_a_shared_mean_is_no_agreement():
    maps = random(1, 16, 16, 8) + 20
    assert float(neighbour_agreement(maps)) > 0.99
    assert abs(float(neighbour_agreement(maps, maps.mean(dim=(0, 1, 2))))) < 0.05


@pytest.mark.parametrize("measure", [neighbour_agreement, distant_agreement])
def test_features_equal_to_the_mean_have_no_direction(measure):
    maps = torch.full((3, 4, 5), 0.1)
    # The mean of float32 numbers is off by rounding, which must not count as agreement.
    for mean in (torch.full((5,), 0.1), torch.full((5,), 0.1) * (1 + 2e-7)):
        assert float(measure(maps, mean)) == 0
    assert float(measure(torch.zeros(3, 4, 5))) == 0
    assert float(measure(maps)) == pytest.approx(1)


@pytest.mark.parametrize("measure", [neighbour_agreement, distant_agreement])
def test_half_precision_is_only_less_precise(measure):
    maps = random(3, 8, 8, 16) + 0.5
    mean = maps.mean(dim=(0, 1, 2))
    for dtype in (torch.bfloat16, torch.float16):
        rounded = maps.to(dtype)
        torch.testing.assert_close(measure(rounded, mean), measure(rounded.float(), mean))
    torch.testing.assert_close(measure(maps.half() * 1000), measure(maps), rtol=0, atol=2e-3)  # 65504 is near


def test_smooth_maps_agree_nearby_and_not_far_away():
    y, x = torch.meshgrid(torch.linspace(0, 6.28, 32), torch.linspace(0, 6.28, 32), indexing="ij")
    maps = torch.stack([y.sin(), y.cos(), x.sin(), x.cos()], dim=-1)  # (32, 32, 4), of mean 0
    near = [float(neighbour_agreement(maps, distance=distance)) for distance in (1, 2, 4, 8)]
    assert near == sorted(near, reverse=True) and near[0] > 0.95
    assert float(distant_agreement(maps)) < 0.5 < near[1]


def test_distant_agreement_is_the_mean_over_pairs_that_far_apart():
    maps = random(2, 5, 7, 6) + 0.7
    found = distant_agreement(maps, min_distance=3, num_pairs=40_000, seed=1)
    assert found.shape == (2,)
    for image in range(2):
        cosines = [
            cosine(maps[image, y, x], maps[image, v, u])
            for y, x in np.ndindex(5, 7)
            for v, u in np.ndindex(5, 7)
            if max(abs(y - v), abs(x - u)) >= 3
        ]
        assert float(found[image]) == pytest.approx(np.mean(cosines), abs=4 * np.std(cosines) / 200)
        near = naive_neighbours(maps[image], 0, 1)
        assert abs(np.mean(cosines) - near) > 4 * np.std(cosines) / 200  # so the distance matters here


def test_pairs_are_the_same_for_a_seed_and_others_for_another_and_leave_the_global_state_alone():
    maps = random(6, 9, 4)
    state = torch.get_rng_state()
    first, again, other = (float(distant_agreement(maps, num_pairs=50, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    torch.testing.assert_close(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x: neighbour_agreement(x, distance=7), "distance: expected 1 to 6 cells on this map, got 7"),
        (lambda x: neighbour_agreement(x, distance=0), "distance: expected 1 to 6 cells on this map, got 0"),
        (lambda x: neighbour_agreement(x[0]), "features: expected shape"),
        (lambda x: neighbour_agreement(x[:1, :1]), "distance: expected 1 to 0 cells"),
        (lambda x: neighbour_agreement(x, torch.zeros(7, 4)), r"mean: expected shape \(4,\), got \(7, 4\)"),
        (lambda x: distant_agreement(x, min_distance=7), "min_distance: expected 1 to 6 cells on this map, got 7"),
        (lambda x: distant_agreement(x, num_pairs=0), "num_pairs: expected a positive number, got 0"),
        (lambda x: effective_rank(x[0, :1]), "features: expected at least two"),
        (lambda x: mean_pairwise_cosine(x[0, :1]), "features: expected at least two"),
    ],
)
def test_maps_and_distances_that_do_not_fit_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act(random(5, 7, 4))


def test_mean_pairwise_cosine_is_the_mean_over_all_pairs():
    data = random(3, 5, 6) + 0.4
    data[1, 2] = 0
    flat = data.flatten(0, 1)
    cosines = [cosine(flat[i], flat[j]) for i in range(15) for j in range(15) if i != j]
    assert mean_pairwise_cosine(data) == pytest.approx(np.mean(cosines), abs=1e-9)
    assert mean_pairwise_cosine(flat.bfloat16()) == mean_pairwise_cosine(flat.bfloat16().float())


def test_mean_pairwise_cosine_tells_nearly_from_fully_collapsed():
    # 1 - 1e-8: less than float32 can say.
    direction = random(64, seed=1).double()
    across = random(1000, 64).double()
    across -= (across @ direction)[:, None] * direction / direction.square().sum()
    data = direction / direction.norm() + 1e-4 * torch.nn.functional.normalize(across, dim=-1)
    spread = across / across.norm(dim=1, keepdim=True)
    off_diagonal = (float(spread.sum(dim=0).square().sum()) - 1000) / (1000 * 999)
    expected = (1 + 1e-8 * off_diagonal) / (1 + 1e-8)
    assert mean_pairwise_cosine(data) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(40, 6), (5, 12), (3, 7, 4)], ids=["more locations", "fewer locations", "maps"])
def test_the_effective_rank_is_the_entropy_of_the_singular_values(shape):
    data = random(*shape) * torch.logspace(0, -2, shape[-1]) + 3
    flat = data.reshape(-1, shape[-1]).double().numpy()
    values = np.linalg.svd(flat - flat.mean(axis=0), compute_uv=False)
    shares = values / values.sum()
    shares = shares[shares > 1e-12]
    assert effective_rank(data) == pytest.approx(math.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_the_effective_rank_counts_equal_directions_however_scaled_shifted_or_turned():
    signs = torch.cat([torch.eye(8), -torch.eye(8)])  # 8 directions of equal variance
    turned = signs @ torch.linalg.qr(random(8, 8))[0]
    for data in (signs, 1e-3 * signs, signs + 10, turned):
        assert effective_rank(data) == pytest.approx(8, rel=1e-4)
    assert effective_rank(signs[:, :3] @ random(3, 20)) <= 3
    assert effective_rank(torch.outer(random(30), random(9))) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_features_that_do_not_vary_have_no_rank(value, dtype):
    assert effective_rank(torch.full((50, 7), value, dtype=dtype)) == 0


def test_collapse_tells_alike_features_from_features_that_differ():
    healthy = random(4, 6, 6, 16)
    collapsed = random(16, seed=3) + 0.05 * torch.outer(random(144), random(16, seed=4)).reshape(4, 6, 6, 16)
    first, second = collapse(healthy), collapse(collapsed)
    assert first.keys() == second.keys() == {"effective_rank", "max_effective_rank", "mean_pairwise_cosine"}
    assert first["effective_rank"] > 14 and abs(first["mean_pairwise_cosine"]) < 0.02
    assert second["effective_rank"] < 1.1 and second["mean_pairwise_cosine"] > 0.9
    assert first["max_effective_rank"] == 16 and collapse(healthy[0, :1])["max_effective_rank"] == 5
