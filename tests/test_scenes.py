"""The procedural scenes: reproducible, balanced, and their masks say what the image shows."""

import hashlib

import numpy as np
import pytest

from apm_hf.data import scenes
from apm_hf.data.scenes import CLASS_NAMES, CLASS_PARTS, PART_NAMES, Scene, SceneDataset, make_scene

OCCLUDER = PART_NAMES.index("occluder")


def digest(scene: Scene) -> str:
    data = scene.image.tobytes() + bytes([scene.label]) + scene.whole_mask.tobytes() + scene.part_mask.tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def erode(mask: np.ndarray, reach: int) -> np.ndarray:
    padded = np.pad(mask, reach)
    shifts = [(dy, dx) for dy in range(2 * reach + 1) for dx in range(2 * reach + 1)]
    return np.all([padded[dy : dy + len(mask), dx : dx + len(mask)] for dy, dx in shifts], axis=0)


def chromaticity_spread(image: np.ndarray, mask: np.ndarray) -> float:
    """How much the hue varies inside a mask; light and shade cancel."""
    colours = image[mask].astype(float) + 1
    return (colours / colours.sum(axis=1, keepdims=True)).std(axis=0).max()


def test_a_scene_is_the_same_every_time_and_everywhere():
    assert digest(make_scene(7, seed=3)) == digest(make_scene(7, seed=3)) == "bca25f524c1fd0e5"


def test_another_index_or_seed_is_another_scene():
    digests = [digest(make_scene(index, seed=seed)) for index in (0, 12, 24) for seed in (0, 1)]
    assert len(set(digests)) == 6


def test_a_larger_image_shows_the_same_scene():
    for index in range(12):
        small, large = make_scene(index), make_scene(index, image_size=288)
        assert (small.part_mask == large.part_mask[1::3, 1::3]).mean() > 0.99
        difference = np.asarray(large.image.resize((96, 96), 5), dtype=float) - np.asarray(small.image)
        assert np.abs(difference).mean() < 6


def test_labels_are_balanced_and_do_not_depend_on_the_seed():
    labels = [[make_scene(index, seed=seed).label for index in range(48)] for seed in (0, 1)]
    assert labels[0] == labels[1]
    assert np.bincount(labels[0]).tolist() == [4] * len(CLASS_NAMES)


def test_shapes_and_types():
    scene = make_scene(1, image_size=80)
    assert scene.image.mode == "RGB" and scene.image.size == (80, 80)
    for mask in (scene.whole_mask, scene.part_mask):
        assert mask.shape == (80, 80) and mask.dtype == np.uint8


def test_the_whole_is_the_union_of_its_visible_parts():
    for index in range(60):
        scene = make_scene(index)
        own = [PART_NAMES.index(part) for part in CLASS_PARTS[CLASS_NAMES[scene.label]]]
        assert np.array_equal(scene.whole_mask == 1, np.isin(scene.part_mask, own))
        assert set(np.unique(scene.part_mask)) <= {0, OCCLUDER, *own}
        assert 0.05 < scene.whole_mask.mean() < 0.8


@pytest.mark.parametrize("label", range(len(CLASS_NAMES)), ids=CLASS_NAMES)
def test_every_class_shows_all_its_parts(label):
    seen = [set(np.unique(make_scene(label + len(CLASS_NAMES) * i).part_mask)) for i in range(12)]
    for part in CLASS_PARTS[CLASS_NAMES[label]]:
        assert sum(PART_NAMES.index(part) in parts for parts in seen) >= 6, part


def test_an_occluder_hides_what_lies_behind_it_in_image_and_mask_alike():
    inside, beside = [], []
    for index in range(60):
        scene = make_scene(index, seed=5)
        image, mask = np.asarray(scene.image), erode(scene.part_mask == OCCLUDER, 2)
        assert not scene.whole_mask[mask].any()
        if mask.sum() > 30:
            inside.append(chromaticity_spread(image, mask))
            beside.append(chromaticity_spread(image, np.roll(mask, 8, axis=1)))
    assert len(inside) > 10 and max(inside) < 0.01  # one flat colour, and nothing of the object in it
    assert np.mean(beside) > 0.05  # else the line above could not fail


def test_some_scenes_are_occluded():
    occluded = [OCCLUDER in make_scene(index, seed=2).part_mask for index in range(240)]
    assert 0.2 < np.mean(occluded) < 0.4


def test_an_occluder_that_would_hide_too_much_is_left_out(monkeypatch):
    monkeypatch.setattr(scenes, "MIN_VISIBLE", 0.95)
    num_occluded = 0
    for index in range(60):
        scene = make_scene(index, seed=2)
        with monkeypatch.context() as patch:
            patch.setattr(scenes, "OCCLUSION_RATE", 0.0)
            alone = make_scene(index, seed=2)
        assert scene.whole_mask.sum() > 0.93 * alone.whole_mask.sum()
        num_occluded += OCCLUDER in scene.part_mask
    assert num_occluded > 0


def test_pixels_outside_the_mask_do_not_depend_on_the_object(monkeypatch):
    scene = make_scene(8, seed=4)
    monkeypatch.setattr(scenes, "_rasterize", lambda shapes, size: np.zeros((size, size), dtype=np.uint8))
    empty = np.asarray(make_scene(8, seed=4).image, dtype=float)
    difference = np.abs(np.asarray(scene.image) - empty).max(axis=-1)
    assert not make_scene(8, seed=4).part_mask.any()
    beyond_the_shadow = erode(scene.part_mask == 0, 8)
    assert beyond_the_shadow.sum() > 500 and difference[beyond_the_shadow].max() == 0
    assert (difference[scene.part_mask > 0] > 8).mean() > 0.9


def test_colours_do_not_tell_the_class():
    """The mean colour of the object must not be linearly readable as its class."""
    rows = [make_scene(index) for index in range(240)]
    colours = np.array([np.asarray(row.image)[row.whole_mask == 1].mean(axis=0) for row in rows])
    labels = np.array([row.label for row in rows])
    centroids = np.stack([colours[:120][labels[:120] == label].mean(axis=0) for label in range(len(CLASS_NAMES))])
    nearest = ((colours[120:, None] - centroids) ** 2).sum(axis=-1).argmin(axis=1)
    assert (nearest == labels[120:]).mean() < 0.2


def test_the_dataset_serves_the_same_scenes():
    dataset = SceneDataset(5, seed=3, image_size=64)
    scene = make_scene(4, seed=3, image_size=64)
    assert len(dataset) == 5 and sorted(dataset[4]) == ["image", "label", "part_mask", "whole_mask"]
    assert dataset[4]["image"].tobytes() == scene.image.tobytes() and dataset[4]["label"] == scene.label
    assert np.array_equal(dataset[4]["part_mask"], scene.part_mask)
    with pytest.raises(IndexError, match=r"0\.\.4, got 5"):
        dataset[5]


def test_the_hugging_face_dataset_keeps_every_pixel_and_name():
    datasets = pytest.importorskip("datasets")
    rows = SceneDataset(3, seed=3, image_size=48).to_hf_dataset()
    assert isinstance(rows.features["label"], datasets.ClassLabel)
    assert rows.features["label"].names == list(CLASS_NAMES) and rows["label"] == [0, 1, 2]
    scene = make_scene(2, seed=3, image_size=48)
    assert np.array_equal(np.asarray(rows[2]["image"]), np.asarray(scene.image))
    assert np.array_equal(np.asarray(rows[2]["part_mask"]), scene.part_mask)
    assert np.array_equal(np.asarray(rows[2]["whole_mask"]), scene.whole_mask)


@pytest.mark.parametrize("options", [{"index": -1}, {"seed": -1}, {"image_size": 15}])
def test_impossible_scenes_are_refused(options):
    with pytest.raises(ValueError, match=r"expected index >= 0.*got .*(-1|15)"):
        make_scene(**{"index": 0, **options})
    with pytest.raises(ValueError, match="num_scenes >= 1, got 0"):
        SceneDataset(0)
