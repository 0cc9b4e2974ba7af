"""Features become colours and clusters: the same ones everywhere, and comparable between images."""

import sys

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from apm_hf.islands import PCAColours, cluster
from apm_hf.islands.colours import CLIPPED


def features(*shape, seed=0):
    """With three directions of clearly different variance, so that components are determined."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    values[..., 0] *= 9
    values[..., 1] *= 5
    values[..., 2] *= 3
    mix = torch.linalg.qr(torch.randn(shape[-1], shape[-1], generator=torch.Generator().manual_seed(99)))[0]
    return values @ mix + 2


def test_colours_are_the_first_three_principal_components_stretched_without_the_extremes():
    data = features(3, 50, 8)
    colours = PCAColours.fit(data)(data)
    assert colours.shape == (3, 50, 3) and colours.dtype == np.float32
    projected = PCA(3).fit_transform(data.flatten(0, 1).double().numpy())
    low, high = np.quantile(projected, [CLIPPED, 1 - CLIPPED], axis=0)
    expected = ((projected - low) / (high - low)).clip(0, 1).reshape(3, 50, 3)
    for channel in range(3):
        # A principal component's sign is arbitrary: up, or upside down.
        same = np.abs(colours[..., channel] - expected[..., channel]).max()
        flipped = np.abs(colours[..., channel] - (1 - expected[..., channel])).max()
        assert min(same, flipped) < 1e-5


def test_signs_do_not_depend_on_the_order_of_the_locations():
    data = features(200, 6)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    first, second = PCAColours.fit(data), PCAColours.fit(data[order])
    torch.testing.assert_close(first.directions, second.directions)
    largest = first.directions.abs().argmax(dim=0)
    assert (first.directions[largest, range(3)] > 0).all()
    np.testing.assert_allclose(first(data)[order], second(data[order]), atol=1e-5)


def test_other_features_get_the_colours_of_those_the_fit_was_made_on():
    teacher, student = features(40, 6), features(40, 6, seed=1)
    colours = PCAColours.fit(teacher)
    np.testing.assert_array_equal(colours(torch.cat([student, teacher]))[40:], colours(teacher))
    assert np.abs(colours(student) - PCAColours.fit(student)(student)).max() > 0.02
    assert colours(student * 100).min() == 0 and colours(student * 100).max() == 1


def test_equal_features_give_finite_colours():
    data = torch.ones(2, 9, 4)
    assert np.isfinite(PCAColours.fit(data)(data)).all()


@pytest.mark.parametrize("shape", [(2, 8), (1, 8), (40, 2)], ids=["two locations", "one location", "width two"])
def test_there_are_three_colours_however_few_features(shape):
    data = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    colours = PCAColours.fit(data)(data)
    assert colours.shape == (shape[0], 3) and np.isfinite(colours).all()


def test_half_precision_and_gradients_are_no_obstacle():
    data = features(30, 6).bfloat16().requires_grad_()
    np.testing.assert_allclose(
        PCAColours.fit(data)(data), PCAColours.fit(data.detach().double())(data.detach().double()), atol=1e-6
    )


def test_clusters_are_of_directions_not_of_lengths():
    directions = torch.eye(3).repeat_interleave(5, dim=0)  # (15, 3)
    lengths = torch.rand(15, 1, generator=torch.Generator().manual_seed(0)) * 100 + 0.1
    noise = 0.01 * torch.randn(15, 3, generator=torch.Generator().manual_seed(1))
    found = cluster((directions + noise) * lengths, 3)
    assert found.shape == (15,)
    groups = [set(found[start : start + 5].tolist()) for start in (0, 5, 10)]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 3
    np.testing.assert_array_equal(found, cluster((directions + noise) * lengths, 3))


@pytest.mark.parametrize("num_clusters", [0, -1, 16])
def test_there_are_not_more_clusters_than_locations(num_clusters):
    with pytest.raises(ValueError, match=f"num_clusters: expected 1 to 15.*got {num_clusters}"):
        cluster(torch.randn(15, 4), num_clusters)


def test_clustering_without_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"apm_hf\[viz\]"):
        cluster(torch.randn(15, 4), 2)
