"""Features become maps, colours and clusters: the same ones everywhere, and comparable between images."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates
from skimage.color import rgb2lab
from sklearn.decomposition import PCA
from transformers import AutoImageProcessor

from apm_hf import APMForSemanticSegmentation, APMModel, TTTConfig, adapt, load_teacher
from apm_hf.assets import DEMO_MODEL, DEMO_TEACHER
from apm_hf.data.scenes import CLASS_NAMES, make_scene
from apm_hf.islands import (
    PCAColours,
    RegionTree,
    cluster,
    embed_colours,
    feature_map,
    foreground_mask,
    similarity_map,
    similarity_to_point,
    similarity_to_text,
    upsample,
    upsample_labels,
)
from apm_hf.islands.colours import CLIPPED
from apm_hf.position_encoding import grid_coordinates
from fixtures_tiny import FEATURE_SIZE, STUDENT_GRID, STUDENT_SIZE, student, student_config


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


def disc(side=16, *, width=8, seed=0):
    """Features of a disc on a background, `(side, side, width)`, and the disc's mask, away from the border."""
    y, x = np.mgrid[:side, :side]
    mask = (y - 0.45 * side) ** 2 + (x - 0.55 * side) ** 2 < (0.3 * side) ** 2
    means = 3 * torch.randn(2, width, generator=torch.Generator().manual_seed(seed))
    noise = 0.3 * torch.randn(side, side, width, generator=torch.Generator().manual_seed(seed + 1))
    return means[torch.from_numpy(mask).long()] + noise, mask


def test_colours_of_a_foreground_ignore_what_lies_elsewhere():
    data, mask = disc()
    colours = PCAColours.fit(data, mask)
    np.testing.assert_array_equal(colours.directions, PCAColours.fit(data[torch.from_numpy(mask)]).directions)
    other = data.clone()
    other[~torch.from_numpy(mask)] *= -40
    np.testing.assert_array_equal(PCAColours.fit(other, torch.from_numpy(mask))(data), colours(data))
    # All the range goes to the foreground, whose variation is small beside the step to the background.
    assert np.ptp(colours(data)[mask], axis=0).min() > 0.9 > np.ptp(PCAColours.fit(data)(data)[mask, 0])


def test_the_background_recedes_as_far_as_told():
    data, mask = disc()
    colours = PCAColours.fit(data, mask)
    plain, shown = colours(data), colours(data, mask)
    np.testing.assert_array_equal(shown[mask], plain[mask])
    assert np.ptp(shown[~mask], axis=0).max() < 0.2 and shown[~mask].max() < 0.35
    np.testing.assert_array_equal(colours(data, mask, recede=0), plain)
    assert np.ptp(colours(data, mask, recede=1)[~mask]) == 0


@pytest.mark.parametrize("foreground", [np.ones((16, 15), bool), np.ones((16, 16), int)], ids=["shape", "type"])
def test_a_foreground_that_is_no_mask_of_the_locations_is_refused(foreground):
    data, _ = disc()
    with pytest.raises(ValueError, match=r"foreground: expected bool of shape \(16, 16\), got"):
        PCAColours.fit(data, foreground)
    with pytest.raises(ValueError, match="foreground: expected bool"):
        PCAColours.fit(data)(data, foreground)


def test_a_foreground_of_no_location_is_refused():
    data, mask = disc()
    with pytest.raises(ValueError, match="at least one location"):
        PCAColours.fit(data, np.zeros_like(mask))


@pytest.mark.parametrize("seed", range(6))  # the first component's sign is arbitrary, so both happen
def test_the_foreground_is_what_keeps_away_from_the_border(seed):
    data, mask = disc(seed=10 * seed)
    np.testing.assert_array_equal(foreground_mask(data), mask)
    np.testing.assert_array_equal(foreground_mask(-data.bfloat16()), mask)


def test_the_smaller_of_two_sides_that_meet_the_border_alike_is_the_foreground():
    data = torch.zeros(6, 9, 3)  # the border's 26 cells fall apart into halves, the inner 28 do not
    rows = torch.tensor([[0, 9], [3, 9], [3, 9], [3, 9], [3, 9], [9, 9]])
    for row, (start, stop) in enumerate(rows.tolist()):
        data[row, start:stop] = 1
    found = foreground_mask(data)
    border = np.ones((6, 9), bool)
    border[1:-1, 1:-1] = False
    assert np.count_nonzero(found & border) == 13
    np.testing.assert_array_equal(found, data[..., 0].numpy() == 0)


def test_where_nothing_differs_everything_is_foreground():
    assert foreground_mask(torch.full((4, 5, 6), 0.1)).all()


METHODS_HERE = [
    "pca",
    "tsne",
    pytest.param(
        "umap",
        # Minutes of compiling, the first time.
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(not importlib.util.find_spec("umap"), reason="umap-learn, an extra, is missing"),
        ],
    ),
]


@pytest.mark.parametrize("method", METHODS_HERE)
def test_embedded_colours_tell_groups_apart_in_one_to_three_dimensions(method):
    groups = torch.eye(3, 8).repeat_interleave(12, dim=0)  # (36, 8)
    data = (groups + 0.05 * torch.randn(36, 8, generator=torch.Generator().manual_seed(0))).reshape(4, 9, 8)
    for components in (1, 2, 3):
        colours = embed_colours(data, method=method, components=components)
        assert colours.shape == (4, 9, 3) and colours.dtype == np.float32
        assert colours.min() >= 0 and colours.max() <= 1
        np.testing.assert_array_equal(colours, embed_colours(data, method=method, components=components))
        grouped = colours.reshape(3, 12, 3)
        within = np.abs(grouped - np.median(grouped, axis=1, keepdims=True)).sum(axis=-1)
        apart = [
            np.abs(np.median(grouped[i], 0) - np.median(grouped[j], 0)).sum() for i, j in ((0, 1), (0, 2), (1, 2))
        ]
        assert np.median(within) < min(apart) / 2


def test_one_dimension_is_ordered_by_lightness():
    data = torch.outer(torch.linspace(0, 1, 40), torch.randn(6, generator=torch.Generator().manual_seed(0)))
    lightness = rgb2lab(embed_colours(data, components=1))[:, 0]
    steps = np.diff(lightness)
    assert (steps >= -0.1).all() or (steps <= 0.1).all()
    assert np.ptp(lightness) > 50


def test_two_dimensions_keep_distances_on_the_plane_of_colours():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 9), torch.linspace(-0.8, 0.8, 9), indexing="ij")
    lab = rgb2lab(embed_colours(torch.stack([y, x], dim=-1), components=2))
    for axis in (0, 1):
        near = np.linalg.norm(np.diff(lab, axis=axis), axis=-1)
        far = np.linalg.norm(lab.take([4, 8], axis) - lab.take([0, 4], axis), axis=-1)
        assert near[1:-1, 1:-1].min() > 2 and far.min() > 2 * near.max()


def test_three_principal_dimensions_are_the_principal_colours():
    data = features(3, 50, 8)
    np.testing.assert_array_equal(embed_colours(data), PCAColours.fit(data)(data))


def test_colours_beyond_the_most_locations_are_those_of_the_nearest_feature():
    data = features(30, 6)
    pairs = data.repeat_interleave(2, dim=0)  # (60, 6): any 30 evenly spaced ones hold each feature about once
    pairs = pairs + 1e-5 * features(60, 6, seed=5)
    colours = embed_colours(pairs, method="tsne", components=2, max_locations=30)
    np.testing.assert_array_equal(colours[::2], colours[1::2])
    assert len(np.unique(colours, axis=0)) > 20
    chosen = np.linspace(0, 59, 30).round().astype(int)
    np.testing.assert_array_equal(colours[chosen], embed_colours(pairs[chosen], method="tsne", components=2))


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize(
    "data",
    [torch.ones(6, 6, 4), torch.eye(3).repeat(12, 1), torch.randn(1, 3, 4), torch.randn(1, 7, 1)],
    ids=["constant", "three different", "three locations", "width one"],
)
def test_few_different_features_have_finite_colours(method, data):
    for components in (1, 2, 3):
        colours = embed_colours(data, method=method, components=components)
        assert colours.shape == (*data.shape[:-1], 3) and np.isfinite(colours).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "lda"}, "method: expected one of .*got 'lda'"),
        ({"components": 4}, "components: expected 1, 2 or 3, got 4"),
        ({"max_locations": 1}, "max_locations: expected at least 4, got 1"),
    ],
)
def test_embeddings_that_do_not_exist_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        embed_colours(features(9, 6), **options)


def test_embedding_and_masking_without_their_libraries_say_what_to_install(monkeypatch):
    data = features(5, 5, 6)
    for module, extra, options in (
        ("umap", "umap", {"method": "umap"}),
        ("sklearn.neighbors", "viz", {"method": "tsne"}),
        ("skimage.color", "viz", {"components": 2}),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ImportError, match=rf"apm_hf\[{extra}\]"):
            embed_colours(data, **options)
    monkeypatch.setitem(sys.modules, "skimage.filters", None)
    with pytest.raises(ImportError, match=r"apm_hf\[viz\]"):
        foreground_mask(data)


@pytest.mark.parametrize(
    "act",
    [lambda x: cluster(x, 2), foreground_mask, embed_colours, RegionTree.fit],
    ids=["cluster", "mask", "embed", "tree"],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused(act, value):
    data = features(4, 5, 6)
    data[2, 3, 1] = value
    with pytest.raises(ValueError, match="expected finite numbers"):
        act(data)


def test_clusters_keep_the_shape_of_the_map_and_count_from_the_largest():
    data, mask = disc()
    found = cluster(data, 2)
    np.testing.assert_array_equal(found, mask.astype(int))  # the background is larger
    np.testing.assert_array_equal(cluster(data.flatten(0, 1), 2), found.ravel())
    sizes = np.bincount(cluster(features(200, 6), 7))
    assert (np.diff(sizes) <= 0).all() and len(sizes) == 7


def test_clusters_fitted_on_a_subset_hold_all_locations(monkeypatch):
    monkeypatch.setattr("apm_hf.islands.clusters.CHUNK_LOCATIONS", 37)
    data, mask = disc(24)
    found = cluster(data, 2, max_locations=50, seed=3)
    np.testing.assert_array_equal(found, mask.astype(int))
    mixed = features(300, 6)
    np.testing.assert_array_equal(*(cluster(mixed, 5, max_locations=40, seed=3) for _ in range(2)))
    assert (cluster(mixed, 5, max_locations=40, seed=3) != cluster(mixed, 5, max_locations=40, seed=4)).any()


def test_clusters_of_fewer_different_features_are_fewer():
    assert not cluster(torch.ones(3, 4, 5), 3).any()
    assert not cluster(torch.zeros(3, 4, 5), 3).any()
    np.testing.assert_array_equal(np.bincount(cluster(torch.eye(2, 5).repeat_interleave(4, dim=0), 6)), [4, 4])


def test_clusters_fitted_on_fewer_locations_than_there_are_clusters_are_refused():
    with pytest.raises(ValueError, match="max_locations: expected at least num_clusters=5, got 4"):
        cluster(features(20, 6), 5, max_locations=4)


def small_model(**overrides):
    return student(**overrides).eval()


def pixels(batch_size=2, seed=0):
    return torch.rand(batch_size, 3, STUDENT_SIZE, STUDENT_SIZE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("overrides", [{}, {"local_patch": True}], ids=["plain", "local patch"])
@pytest.mark.parametrize("size", [None, (3, 3), (5, 4), (1, 7)])
def test_a_map_holds_the_answer_at_the_centre_of_every_cell(overrides, size):
    model = small_model(**overrides)
    found = feature_map(model, pixels(), size, chunk_size=3)
    rows, cols = size or (STUDENT_GRID, STUDENT_GRID)
    assert found.shape == (2, rows, cols, FEATURE_SIZE) and not found.requires_grad
    for row in range(rows):
        for col in range(cols):
            centre = torch.tensor([[(2 * row + 1) / rows - 1, (2 * col + 1) / cols - 1]])
            expected = model(pixels(), centre).last_hidden_state[:, 0]
            torch.testing.assert_close(found[:, row, col], expected, rtol=1e-4, atol=1e-5)


def test_a_map_may_be_of_colours_and_of_folded_images_and_of_models_with_heads():
    model = small_model()
    colours = feature_map(model, pixels(), (4, 5), output="rgb")
    assert colours.shape == (2, 4, 5, 3)
    expected = model(pixels(), grid_coordinates(4, 5)).rgb
    torch.testing.assert_close(colours.flatten(1, 2), expected)
    folded = feature_map(model, None, (4, 5), trigger_column=model.fold(pixels()))
    torch.testing.assert_close(folded, feature_map(model, pixels(), (4, 5)))
    segmenter = APMForSemanticSegmentation(student_config()).eval()
    torch.testing.assert_close(feature_map(segmenter, pixels()), feature_map(segmenter.apm, pixels()))


def test_levels_come_first_as_a_teachers_do(monkeypatch):
    model = small_model()
    answers = SimpleNamespace(levels=torch.arange(2 * 20 * 3 * 4.0).reshape(2, 20, 3, 4))  # (B, L, N, F)
    monkeypatch.setattr(model, "forward", lambda *args, **options: answers)
    levels = feature_map(model, pixels(), (4, 5), output="levels")
    assert levels.shape == (2, 3, 4, 5, 4)
    torch.testing.assert_close(levels[1, 2, 3, 1], answers.levels[1, 3 * 5 + 1, 2])


def test_a_map_of_adapted_models_is_of_their_own_images():
    model = small_model()
    targets = torch.randn(2, FEATURE_SIZE, generator=torch.Generator().manual_seed(1))
    adapted = adapt(model, pixels(), targets, config=TTTConfig(steps=3, learning_rate=0.01, start="model"))
    found = feature_map(adapted, None, (4, 5))
    for index in range(2):
        model.load_state_dict(adapted.state_dict(index))
        expected = feature_map(model, pixels()[index : index + 1], (4, 5))
        torch.testing.assert_close(found[index : index + 1], expected)
    similarity = similarity_to_point(adapted, None, (0.1, 0.2), (4, 5))
    assert similarity.shape == (2, 1, 4, 5)
    with pytest.raises(ValueError, match="expected None for adapted models"):
        feature_map(adapted, pixels())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (0, 3)}, r"size: expected a positive \(rows, cols\), got \(0, 3\)"),
        ({"output": "pooler_output"}, "output: expected one of"),
        ({"output": "rgb"}, "output: expected one that the model gives, got 'rgb'"),
        ({"model": torch.nn.Linear(2, 2)}, "model: expected an APMModel.*got Linear"),
    ],
)
def test_maps_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        feature_map(**{"model": small_model(use_rgb_head=False), "pixel_values": pixels(), **arguments})


def test_upsampling_is_bilinear_between_the_centres_of_cells():
    grid = features(2, 3, 4, 5, 6)  # two leading dimensions
    found = upsample(grid, (7, 9))
    assert found.shape == (2, 3, 7, 9, 6)
    centres = grid_coordinates(7, 9)
    y, x = (((c + 1) * n - 1) / 2 for c, n in zip(centres.unbind(-1), (4, 5), strict=True))
    for maps, answers in zip(grid.flatten(0, 1), found.flatten(0, 1), strict=True):
        expected = map_coordinates_2d(maps.numpy(), y.numpy(), x.numpy())
        np.testing.assert_allclose(answers.flatten(0, 1), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(upsample(grid[0, 0], (4, 5)), grid[0, 0])
    assert upsample(grid.bfloat16(), (7, 9)).dtype == torch.bfloat16


def map_coordinates_2d(grid, y, x):
    places = np.stack([y, x])
    return np.stack([map_coordinates(grid[..., f], places, order=1, mode="nearest") for f in range(grid.shape[-1])], 1)


def test_a_similarity_map_holds_cosines():
    data, query = features(2, 4, 5, 6), features(2, 3, 6, seed=1)
    found = similarity_map(data, query)
    assert found.shape == (2, 3, 4, 5) and found.dtype == torch.float32
    for image in range(2):
        for number in range(3):
            expected = torch.cosine_similarity(data[image], query[image, number], dim=-1)
            torch.testing.assert_close(found[image, number], expected)
    torch.testing.assert_close(similarity_map(data, query[0])[1], similarity_map(data[1:], query[:1])[0])
    torch.testing.assert_close(similarity_map(data, query[0, 0]), similarity_map(data, query[0, :1]))
    half = similarity_map(data.bfloat16(), query.bfloat16())
    torch.testing.assert_close(half, similarity_map(data.bfloat16().float(), query.bfloat16().float()))
    assert not similarity_map(torch.zeros(1, 2, 2, 6), query[0]).any()


@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 2, 6), (1, 2, 2, 6)])
def test_queries_of_another_width_or_number_of_images_are_refused(shape):
    with pytest.raises(ValueError, match="query: expected shape"):
        similarity_map(features(2, 4, 5, 6), torch.ones(shape))


@pytest.mark.parametrize("act", [foreground_mask, lambda x: similarity_map(x, torch.ones(6))])
def test_maps_of_other_dimensions_are_refused(act):
    with pytest.raises(ValueError, match=r"features: expected shape \(.*rows, cols, F\), got \(4, 6\)"):
        act(features(4, 6))


def test_a_location_is_most_similar_to_itself_wherever_one_points():
    model = small_model(local_patch=True)
    point = grid_coordinates(5, 4)[7]
    found = similarity_to_point(model, pixels(), point, (5, 4))
    assert found.shape == (2, 1, 5, 4)
    assert (found.flatten(2).argmax(dim=-1) == 7).all()
    torch.testing.assert_close(found.flatten(2)[..., 7], torch.ones(2, 1))
    between = (0.123, -0.456)  # no cell's centre
    query = model(pixels(), torch.tensor([between])).last_hidden_state
    expected = similarity_map(feature_map(model, pixels()), query)
    torch.testing.assert_close(similarity_to_point(model, pixels(), between), expected)
    both = similarity_to_point(model, pixels(), torch.stack([point, torch.tensor(between)]), (5, 4))
    torch.testing.assert_close(both[:, :1], found)


@pytest.mark.parametrize("point", [(0.0, 1.5), (0.0, float("nan")), (0.0, 0.0, 0.0)])
def test_a_point_outside_the_picture_is_refused(point):
    with pytest.raises(ValueError, match="point: expected"):
        similarity_to_point(small_model(), pixels(), point)


def test_text_finds_the_objects_it_names():
    model, teacher = APMModel.from_pretrained(DEMO_MODEL).eval(), load_teacher(DEMO_TEACHER)
    scenes = [make_scene(index) for index in range(12)]
    processor = AutoImageProcessor.from_pretrained(DEMO_MODEL)
    pixel_values = processor(images=[scene.image for scene in scenes], return_tensors="pt")["pixel_values"]
    text_embeds = teacher.encode_text(CLASS_NAMES)
    maps = similarity_to_text(model, pixel_values, text_embeds, (24, 24))
    assert maps.shape == (12, len(CLASS_NAMES), 24, 24)
    # The class that is there scores higher on the object than beside it, relative to the other classes.
    relative = maps - maps.mean(dim=1, keepdim=True)
    higher = 0
    for index, scene in enumerate(scenes):
        whole = torch.from_numpy(upsample_labels(scene.whole_mask, (24, 24))).bool()
        shown = relative[index, scene.label]
        higher += bool(shown[whole].mean() > shown[~whole].mean())
    assert higher >= 9
    with pytest.raises(ValueError, match="text_embeds: expected shape"):
        similarity_to_text(model, pixel_values, text_embeds[:, :5])
