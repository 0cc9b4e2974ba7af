"""Random crops: reproducible from (seed, epoch, row), and really parts of the picture."""

import numpy as np
import pytest
from PIL import Image

from apm_hf.data.augmentation import RandomCrops

HEIGHT, WIDTH = 30, 40


def pictures(count=6):
    """Every pixel says where it lies: red is its column, green its row."""
    columns, rows = np.meshgrid(np.arange(WIDTH), np.arange(HEIGHT))
    image = Image.fromarray(np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8))
    return [{"image": image, "label": index} for index in range(count)]


def test_a_view_is_a_part_of_the_picture_or_its_mirror_image():
    crops, mirrored, areas = RandomCrops(pictures(80), "image", min_area=0.4), 0, []
    for index in range(80):
        pixels = np.asarray(crops[index]["image"]).astype(int)
        height, width, _ = pixels.shape
        step = np.unique(np.diff(pixels[..., 0], axis=1))
        assert len(step) == 1 and step[0] in (-1, 1) and (np.diff(pixels[..., 1], axis=0) == 1).all()
        mirrored += step[0] == -1
        areas.append(height * width / (HEIGHT * WIDTH))
    assert 20 < mirrored < 60
    assert 0.35 < min(areas) < 0.5 and max(areas) > 0.9  # rounding to pixels, and a crop is never wider than all


def test_views_depend_on_seed_epoch_and_row_alone():
    crops, again = RandomCrops(pictures(), "image", seed=3), RandomCrops(pictures(), "image", seed=3)
    backwards = [again[index] for index in reversed(range(6))][::-1]
    for index in range(6):
        assert np.array_equal(crops[index]["image"], backwards[index]["image"])
        assert crops[index]["label"] == index
    first = [np.asarray(crops[index]["image"]) for index in range(6)]
    crops.set_epoch(1)
    other_seed = RandomCrops(pictures(), "image", seed=4)
    for other in (crops, other_seed):
        assert not all(np.array_equal(first[index], other[index]["image"]) for index in range(6))
    assert len({image.shape for image in first}) > 1  # rows differ from each other


def test_the_smallest_share_is_a_share():
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match="min_area: expected a share above 0 and at most 1"):
            RandomCrops(pictures(), "image", min_area=wrong)
    assert np.asarray(RandomCrops(pictures(), "image", min_area=1)[0]["image"]).shape[0] >= HEIGHT * 0.8


def test_a_fixed_number_of_crops_is_the_same_in_every_epoch():
    crops = RandomCrops(pictures(4), "image", seed=3, views=3)
    assert len(crops) == 12
    before = [np.asarray(crops[row]["image"]).tobytes() for row in range(12)]
    assert len(set(before)) == 12
    crops.set_epoch(1)
    assert [np.asarray(crops[row]["image"]).tobytes() for row in range(12)] == before
    assert [crops[row]["label"] for row in range(12)] == [row // 3 for row in range(12)]
    with pytest.raises(ValueError, match="views: expected a number of crops or 0, got -1"):
        RandomCrops(pictures(), "image", views=-1)
