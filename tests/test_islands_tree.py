"""Region trees: connected regions, cuts that nest, colours that show it; and the graph of a label map."""

import sys

import networkx
import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster
from scipy.cluster.hierarchy import linkage as scipy_linkage
from skimage.color import deltaE_cie76, rgb2lab
from skimage.measure import label as connected_components
from torch.nn import functional as F

from apm_hf.islands import RegionTree, region_graph, tree_colours, upsample_labels
from apm_hf.islands.tree import LINKAGES
from apm_hf.position_encoding import grid_coordinates

# How people without one kind of cone see linear RGB: Machado et al., IEEE TVCG 2009, table 1, severity 1.
COLOUR_BLINDNESS = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def smooth(rows=9, cols=13, width=6, *, seed=0):
    """Features that vary slowly, and a little everywhere."""
    generator = torch.Generator().manual_seed(seed)
    coarse = F.interpolate(torch.randn(1, width, 4, 5, generator=generator), size=(rows, cols), mode="bilinear")
    return coarse[0].movedim(0, -1) + 0.05 * torch.randn(rows, cols, width, generator=generator)


def same_partition(first, second):
    pairs = np.unique(np.stack([first.ravel(), second.ravel()]), axis=1).shape[1]
    return pairs == len(np.unique(first)) == len(np.unique(second))


@pytest.mark.parametrize("linkage", LINKAGES)
def test_regions_are_connected_numbered_by_size_and_nested(linkage):
    tree = RegionTree.fit(smooth(), linkage=linkage)
    numbers = [1, 2, 3, 6, 20, 21, 116, 117]
    cuts = tree.cuts(numbers)
    for number, labels in zip(numbers, cuts, strict=True):
        assert labels.shape == (9, 13)
        sizes = np.bincount(labels.ravel(), minlength=number)
        assert len(sizes) == number and sizes.min() >= 1 and (np.diff(sizes) <= 0).all()
        assert connected_components(labels, connectivity=1, background=-1).max() == number
    for coarse, coarse_labels in zip(numbers, cuts, strict=True):
        for fine, fine_labels in zip(numbers, cuts, strict=True):
            if coarse <= fine:
                np.testing.assert_array_equal(tree.parents(coarse, fine)[fine_labels], coarse_labels)


@pytest.mark.parametrize("linkage", ["ward", "single"])
def test_on_a_single_row_of_growing_steps_the_tree_is_scipys(linkage):
    # Along a line of unit vectors whose order is that of their angles, the closest regions are neighbours anyway.
    angles = torch.rand(12, generator=torch.Generator().manual_seed(2)).sort().values
    data = torch.stack([angles.cos(), angles.sin()], dim=-1)
    tree = RegionTree.fit(data[None] * 7, linkage=linkage)
    expected = scipy_linkage(data.double().numpy(), method=linkage)
    np.testing.assert_allclose(tree.merge_heights, expected[:, 2], rtol=1e-4, atol=1e-6)
    for number in range(1, 13):
        assert same_partition(tree.cut(number), fcluster(expected, number, "maxclust")[None])


def test_a_cut_at_a_height_takes_all_merges_up_to_it():
    tree = RegionTree.fit(smooth())
    assert (np.diff(tree.merge_heights) >= 0).all()
    heights = [tree.height(number) for number in range(1, 118)]
    assert heights == sorted(heights, reverse=True) and heights[-1] == 0
    for height in heights[:-1]:  # merges of the same height cannot be told apart by it
        fewest = 1 + next(index for index, other in enumerate(heights) if other <= height)
        np.testing.assert_array_equal(tree.cut_at(height), tree.cut(fewest))
        more = 1 + next(index for index, other in enumerate(heights) if other < height)
        np.testing.assert_array_equal(tree.cut_at(np.nextafter(height, 0)), tree.cut(more))
    assert len(set(heights)) > 90
    assert tree.cut_at(-1.0).max() == 116 and tree.cut_at(1e9).max() == 0


def test_two_wholes_with_two_parts_each_are_found_at_their_heights():
    whole, part = torch.zeros(8, 8, dtype=torch.long), torch.zeros(8, 8, dtype=torch.long)
    whole[:, 4:] = 1
    part[:, 4:] = 2
    part[3:] += 1
    generator = torch.Generator().manual_seed(0)
    wholes, parts = torch.randn(2, 16, generator=generator), torch.randn(4, 16, generator=generator)
    data = wholes[whole] + 0.3 * parts[part] + 0.01 * torch.randn(8, 8, 16, generator=generator)
    tree = RegionTree.fit(data)
    assert same_partition(tree.cut(2), whole.numpy()) and same_partition(tree.cut(4), part.numpy())
    assert tree.height(1) > 1.5 * tree.height(2) and tree.height(3) > 5 * tree.height(4)


def test_features_of_any_length_precision_and_need_of_gradients_give_the_same_tree():
    data = smooth()
    tree = RegionTree.fit(data)
    lengths = 0.1 + torch.rand(9, 13, 1, generator=torch.Generator().manual_seed(5))
    other = RegionTree.fit((data * lengths).double().requires_grad_())
    np.testing.assert_array_equal(tree.cut(9), other.cut(9))
    half = RegionTree.fit(data.bfloat16())
    np.testing.assert_array_equal(half.cut(9), RegionTree.fit(data.bfloat16().float()).cut(9))


@pytest.mark.parametrize("linkage", LINKAGES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_features_still_have_a_tree(linkage, value):
    tree = RegionTree.fit(torch.full((4, 5, 3), value), linkage=linkage)
    assert tree.cut(3).max() == 2 and not tree.cut_at(0).any()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda tree: tree.cut(0), "num_regions: expected 1 to 117, the number of locations, got 0"),
        (lambda tree: tree.cut(118), "num_regions: expected 1 to 117.*got 118"),
        (lambda tree: tree.height(0), "num_regions: expected 1 to 117.*got 0"),
        (lambda tree: tree.parents(0, 3), "coarse: expected 1 to 117.*got 0"),
        (lambda tree: tree.parents(4, 3), "coarse: expected at most fine=3 regions, got 4"),
        (lambda _: RegionTree.fit(smooth(), linkage="centroid"), "linkage: expected one of.*got 'centroid'"),
        (lambda _: RegionTree.fit(smooth()[0]), "features: expected shape"),
        (lambda _: RegionTree.fit(smooth()[:1, :1]), "at least 2 locations"),
    ],
)
def test_trees_and_cuts_that_cannot_be_are_refused(act, message):
    with pytest.raises(ValueError, match=message):
        act(RegionTree.fit(smooth()))


def test_without_their_libraries_trees_and_colours_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    with pytest.raises(ImportError, match=r"apm_hf\[viz\]"):
        RegionTree.fit(smooth())
    monkeypatch.setitem(sys.modules, "skimage.color", None)
    with pytest.raises(ImportError, match=r"apm_hf\[viz\]"):
        tree_colours([np.zeros((2, 2), int)])


def test_labels_are_upsampled_to_the_nearest_cell():
    labels = np.arange(12).reshape(3, 4)
    np.testing.assert_array_equal(upsample_labels(labels, (6, 12)), labels.repeat(2, axis=0).repeat(3, axis=1))
    expected = F.interpolate(torch.from_numpy(labels)[None, None].double(), size=(7, 5), mode="nearest-exact")[0, 0]
    np.testing.assert_array_equal(upsample_labels(labels, (7, 5)), expected)
    np.testing.assert_array_equal(upsample_labels(labels, (3, 4)), labels)


def colours_of_regions(labels, picture):
    """`(K, 3)`, and that every region is of one colour."""
    colours = np.stack([picture[labels == region][0] for region in range(labels.max() + 1)])
    np.testing.assert_array_equal(colours[labels], picture)
    return colours


def test_parts_are_shades_of_their_whole():
    tree = RegionTree.fit(smooth(24, 30, 8))
    numbers = (2, 6, 20)
    cuts = tree.cuts(numbers)
    pictures = tree_colours(cuts)
    by_cut = [colours_of_regions(labels, picture) for labels, picture in zip(cuts, pictures, strict=True)]
    assert all(picture.dtype == np.float32 and picture.min() >= 0 and picture.max() <= 1 for picture in pictures)
    assert all(len(np.unique(colours, axis=0)) == number for colours, number in zip(by_cut, numbers, strict=True))
    wholes = rgb2lab(by_cut[0])
    for number, colours in zip(numbers[1:], by_cut[1:], strict=True):
        parents = tree.parents(2, number)
        # Hues, since parts differ in lightness.
        distances = np.linalg.norm((rgb2lab(colours)[:, None] - wholes[None])[..., 1:], axis=-1)  # (parts, wholes)
        np.testing.assert_array_equal(distances.argmin(axis=1), parents)
        for whole in range(2):
            shades = rgb2lab(colours[parents == whole])
            apart = [deltaE_cie76(*shades[[i, j]]) for i in range(len(shades)) for j in range(i)]
            assert min(apart, default=np.inf) > 4
    for one, other in zip(tree_colours(cuts), pictures, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_whole_that_does_not_break_keeps_its_colour():
    whole, part = np.zeros((4, 6), int), np.zeros((4, 6), int)
    whole[:, 4:] = part[:, 4:] = 1
    part[0, :4] = 2
    coarse, fine = tree_colours([whole, part])
    np.testing.assert_array_equal(coarse[:, 4:], fine[:, 4:])
    assert (coarse[0, 0] != fine[0, 0]).any() and (fine[0, 0] != fine[3, 0]).any()


def test_colours_depend_on_the_regions_not_on_their_numbers():
    whole = np.repeat([[5, 5, 9]], 2, axis=0)
    part = np.repeat([[7, 3, -2]], 2, axis=0)
    expected = tree_colours([np.repeat([[0, 0, 1]], 2, axis=0), np.repeat([[0, 1, 2]], 2, axis=0)])
    for one, other in zip(tree_colours([whole, part]), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_many_wholes_have_different_colours():
    (picture,) = tree_colours([np.arange(28).reshape(4, 7)])
    apart = deltaE_cie76(*(rgb2lab(picture.reshape(-1, 3))[index] for index in np.triu_indices(28, 1)))
    assert apart.min() > 5


@pytest.mark.parametrize("kind", COLOUR_BLINDNESS)
def test_the_colour_blind_tell_wholes_apart(kind):
    (picture,) = tree_colours([np.arange(6)[None]])
    linear = np.where(picture <= 0.04045, picture / 12.92, ((picture + 0.055) / 1.055) ** 2.4)
    seen = (linear @ np.array(COLOUR_BLINDNESS[kind]).T).clip(0, 1)
    seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    lab = rgb2lab(seen[0])
    apart = deltaE_cie76(*(lab[index] for index in np.triu_indices(6, 1)))
    assert apart.min() > 12


@pytest.mark.parametrize(
    ("cuts", "message"),
    [
        ([], "expected at least one label map"),
        ([np.array([[0, 0, 1]]), np.array([[0, 1, 1]])], "expected every region to lie in one region"),
        ([np.array([[0, 0, 1]]), np.array([[0, 1]])], "expected maps of one shape"),
    ],
)
def test_label_maps_that_do_not_nest_are_refused(cuts, message):
    with pytest.raises(ValueError, match=f"cuts: {message}"):
        tree_colours(cuts)


def naive_graph(labels, features):
    names = sorted(set(labels.ravel().tolist()))
    lengths = {}
    rows, cols = labels.shape
    for row in range(rows):
        for col in range(cols):
            for other in ((row + 1, col), (row, col + 1)):
                if other[0] < rows and other[1] < cols and labels[other] != labels[row, col]:
                    pair = tuple(sorted((names.index(labels[other]), names.index(labels[row, col]))))
                    lengths[pair] = lengths.get(pair, 0) + 1
    means = [features[torch.from_numpy(labels == name)].mean(dim=0) for name in names]
    return names, lengths, means


def test_a_region_graph_is_the_one_counted_cell_by_cell():
    features = smooth(6, 7)
    labels = np.random.default_rng(0).choice([-1, 2, 5, 9], size=(6, 7))
    graph = region_graph(labels, features)
    names, lengths, means = naive_graph(labels, features)
    np.testing.assert_array_equal(graph.labels, names)
    np.testing.assert_array_equal(graph.sizes, [np.count_nonzero(labels == name) for name in names])
    assert graph.edges.tolist() == [list(pair) for pair in sorted(lengths)]
    assert graph.boundary_lengths.tolist() == [lengths[pair] for pair in sorted(lengths)]
    np.testing.assert_allclose(graph.features, torch.stack(means), rtol=1e-5, atol=1e-6)
    places = grid_coordinates(6, 7).reshape(6, 7, 2).numpy()
    np.testing.assert_allclose(graph.centroids, [places[labels == name].mean(axis=0) for name in names], atol=1e-6)
    for (first, second), similarity in zip(graph.edges, graph.similarities, strict=True):
        expected = torch.cosine_similarity(means[first], means[second], dim=0)
        np.testing.assert_allclose(similarity, expected, atol=1e-5)


def test_a_region_graph_is_networkxs_too():
    labels = np.array([[4, 4, 7], [4, 8, 7]])
    graph = region_graph(labels, smooth(2, 3).bfloat16()).to_networkx()
    assert isinstance(graph, networkx.Graph)
    assert dict(graph.nodes(data="label")) == {0: 4, 1: 7, 2: 8} and graph.nodes[0]["size"] == 3
    assert sorted(graph.edges(data="boundary_length")) == [(0, 1, 1), (0, 2, 2), (1, 2, 1)]
    assert all(-1 <= similarity <= 1 for *_, similarity in graph.edges(data="similarity"))


def test_a_single_region_has_no_neighbours():
    graph = region_graph(np.zeros((3, 4), int), smooth(3, 4))
    assert graph.edges.shape == (0, 2) and graph.boundary_lengths.shape == graph.similarities.shape == (0,)
    np.testing.assert_allclose(graph.centroids, [[0, 0]], atol=1e-7)


@pytest.mark.parametrize(
    ("labels", "features", "message"),
    [
        (np.zeros((3, 4)), torch.zeros(3, 4, 2), "labels: expected integers"),
        (np.zeros(12, int), torch.zeros(3, 4, 2), "labels: expected integers of shape"),
        (np.zeros((3, 4), int), torch.zeros(4, 3, 2), r"features: expected shape \(3, 4, 'F'\), got \(4, 3, 2\)"),
    ],
)
def test_labels_and_features_that_do_not_fit_are_refused(labels, features, message):
    with pytest.raises(ValueError, match=message):
        region_graph(labels, features)
