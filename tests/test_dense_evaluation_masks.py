"""Data sets with masks: found, read, and refused with the reason."""

import numpy as np
import pytest

from apm_hf.data.scenes import PART_NAMES
from apm_hf.evaluation.masks.datasets import VOID, load_masked_images, without_unreadable
from fixtures_masks import SIZE, mask, save_masked
from fixtures_tiny import photo

pytest.importorskip("datasets")


def four(*labels):
    return [mask(*labels) for _ in range(4)]


@pytest.mark.parametrize(
    ("whole", "part", "names"),
    [("object_mask", "part_mask", ["null", "hat", "shoe"]), ("coarse_mask", "fine_mask", None)],
)
def test_folders_of_parts_are_read_with_their_names(tmp_path, whole, part, names):
    path = save_masked(tmp_path / "set", {whole: four(0, 1), part: four(0, 1, 2)}, names=names)
    for place in (path, path.parent):
        (found,) = load_masked_images(place)
        assert dict(found.mask_columns) == {"whole": whole, "part": part} and found.class_names == names
        assert found.num_segments == {"whole": [2] * 4, "part": [3] * 4}
        assert found.mask(1, "part").shape == SIZE[::-1] and found.image(1).size == SIZE
        found.check()


def test_a_folder_of_several_such_folders_is_all_of_them(tmp_path):
    for name in ("first", "second"):
        save_masked(tmp_path / name, {"part_mask": four(0, 1)})
    assert [found.name for found in load_masked_images(tmp_path)] == ["first", "second"]
    assert [found.name for found in load_masked_images(tmp_path / "first")] == ["first"]


def test_columns_can_be_named_and_subsets_are_drawn_once_and_for_all(tmp_path):
    masks = [mask(0, number) for number in range(1, 8)]
    path = save_masked(tmp_path, {"annotators": masks, "other": masks})
    with pytest.raises(ValueError, match=r"found no column with masks among \['image', 'annotators', 'other'\]"):
        load_masked_images(path)
    options = {"mask_columns": {"whole": "other"}, "max_images": 4}
    first, again, other = (load_masked_images(path, seed=seed, **options)[0] for seed in (0, 0, 1))
    kept = [[found.mask(index, "whole").max() for index in range(4)] for found in (first, again, other)]
    assert kept[0] == kept[1] == sorted(kept[0]) and kept[0] != kept[2]
    assert first.levels == ["whole"] and first.source != other.source


def test_void_pixels_are_no_segment_whatever_their_label(tmp_path):
    path = save_masked(tmp_path, {"part_mask": four(0, 255, 3, 7)})
    (usual,) = load_masked_images(path)
    assert usual.num_segments == {"part": [3] * 4}
    assert ((usual.mask(0, "part") == VOID) == (np.asarray(mask(0, 255, 3, 7)) == 255)).all()
    (given,) = load_masked_images(path, ignore_labels=(0, 3, 7, 255))
    with pytest.raises(ValueError, match=r"expected part masks of two segments or more.*\[0, 3, 7, 255\]"):
        given.check()


def test_scenes_are_those_of_a_stream_that_taught_nobody():
    (found,) = load_masked_images("scenes", max_images=4, seed=2)
    assert len(found) == 4 and found.class_names == PART_NAMES and found.source == {"stream": 3}
    assert found.mask(0, "whole").max() == 1 and found.map_size == 96
    with pytest.raises(ValueError, match="expected 4 images or more, .* got 3"):
        load_masked_images("scenes", max_images=3)[0].check()


@pytest.mark.parametrize(
    ("columns", "names", "message"),
    [
        ({"part_mask": [*four(0, 1)[:3], mask(0, 1, size=(9, 5))]}, None, "row 3, .* image's 44 x 36 .* got 9 x 5"),
        ({"part_mask": [photo(0, size=SIZE)] * 4}, None, r"row 0, .* one integer per pixel, got uint8 .*\(36, 4"),
        ({"part_mask": four(0, 5)}, ["a", "b"], "row 0, .* expected labels below 2, .* got 5"),
    ],
)
def test_masks_that_cannot_be_scored_are_named(tmp_path, columns, names, message):
    (found,) = load_masked_images(save_masked(tmp_path, columns, names=names))
    with pytest.raises(ValueError, match=message):
        found.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_column": "photo"}, "expected a column with the image, one of .* got 'photo'"),
        ({"mask_columns": {"part": "fine"}}, "expected a column with the part mask, one of .* got 'fine'"),
        ({"split": "dev"}, "no split 'dev'"),
        ({"max_images": 0}, "max_images: expected at least 1, got 0"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, options, message):
    path = save_masked(tmp_path, {"part_mask": four(0, 1)})
    with pytest.raises(ValueError, match=message):
        load_masked_images(path, **options)
    with pytest.raises(FileNotFoundError):
        load_masked_images(tmp_path / "nowhere")


def test_rows_that_cannot_be_read_are_left_out_up_to_a_limit(tmp_path):
    path = save_masked(tmp_path, {"part_mask": [mask(0, 1, size=(9, 5)), *four(0, 1), *four(0, 1)]})
    (found,) = load_masked_images(path)
    (kept,), skipped = without_unreadable([found], 1)
    assert len(kept) == 8 and kept.num_segments == {"part": [2] * 8} and kept.source != found.source
    (line,) = skipped
    assert (line["data"], line["image"]) == (found.name, 0) and "got 9 x 5" in line["reason"]
    again, none = without_unreadable([kept], 1)
    assert again == [kept] and none == []
    (two,) = load_masked_images(save_masked(tmp_path / "two", {"part_mask": [mask(0, size=(9, 5))] * 2 + four(0, 1)}))
    with pytest.raises(ValueError, match="expected at most 1 unreadable images, got 2, the last of them .*, row 1, "):
        without_unreadable([two], 1)
