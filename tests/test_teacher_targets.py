"""Teachers' answers kept in memory: each beside its own image, and, for the control, beside another's."""

import numpy as np
import pytest
import torch

from apm_hf import load_teacher
from apm_hf.distillation import matching_image_processor
from apm_hf.teachers import targets
from apm_hf.teachers.dense_grids import encode_densely
from apm_hf.teachers.targets import TargetCache
from fixtures_tiny import FEATURE_SIZE, STUDENT_SIZE, TEACHER_GRID, photo, save_clip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_teacher(save_clip(tmp_path_factory.mktemp("clip")), device="cpu")


def counted(num_images):
    """A cache in which every number is the index of its image."""
    numbers = torch.arange(num_images, dtype=torch.float32)
    return TargetCache(
        numbers[:, None, None, None].expand(-1, 3, 4, 4),
        numbers[:, None].expand(-1, 5),
        numbers[:, None, None, None].expand(-1, 2, 3, 5),
    )


def pairs(cache):
    """(image, image whose embedding it got, image whose features it got)."""
    rows = [cache[i] for i in range(len(cache))]
    return [(row["pixel_values"].max(), row["image_embeds"].max(), row["features"].max()) for row in rows]


def test_every_image_has_the_answer_that_its_teacher_gives(teacher, monkeypatch):
    monkeypatch.setattr(targets, "BATCH_SIZE", 2)
    images = [photo(seed) for seed in range(5)]
    image_processor = matching_image_processor(teacher, STUDENT_SIZE)
    cache = TargetCache.build(images, teacher, image_processor)
    assert len(cache) == 5
    for index, image in enumerate(images):
        row, answer = cache[index], teacher.encode_images(image)
        torch.testing.assert_close(row["image_embeds"], answer.image_embeds[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(row["features"], answer.features[0], atol=1e-5, rtol=1e-5)
        assert torch.equal(row["pixel_values"], image_processor(image, return_tensors="pt")["pixel_values"][0])
    assert row["features"].shape == (TEACHER_GRID, TEACHER_GRID, FEATURE_SIZE)
    differences = np.diff([row["image_embeds"].numpy() for row in map(cache.__getitem__, range(5))], axis=0)
    assert np.abs(differences).max(axis=1).min() > 0.1, "nothing to tell the images apart by"


def test_rows_are_ordinary_tensors_that_a_student_may_be_trained_on(teacher):
    cache = TargetCache.build([photo(0)], teacher, matching_image_processor(teacher, STUDENT_SIZE))
    assert not any(value.is_inference() or value.requires_grad for value in cache[0].values())


@pytest.mark.parametrize("num_images", [2, 3, 17])
def test_shuffled_gives_every_image_the_answer_of_another_one(num_images):
    for seed in range(4):
        rows = pairs(counted(num_images).shuffled(seed))
        assert [image for image, _, _ in rows] == list(range(num_images))
        assert all(embeds == features != image for image, embeds, features in rows)
        assert sorted(embeds for _, embeds, _ in rows) == list(range(num_images)), "every answer is given once"


def test_shuffling_follows_its_seed_and_leaves_the_cache_as_it_is():
    cache = counted(17)
    assert pairs(cache.shuffled(1)) == pairs(cache.shuffled(1)) != pairs(cache.shuffled(2))
    assert all(image == embeds == features for image, embeds, features in pairs(cache))


def test_a_single_image_has_no_other_ones_answer_to_take():
    with pytest.raises(ValueError, match="at least two|at least 2"):
        counted(1).shuffled(0)


def test_no_image_is_an_error(teacher):
    with pytest.raises(ValueError, match="at least one image"):
        TargetCache.build([], teacher, matching_image_processor(teacher, STUDENT_SIZE))


def test_levels_and_finer_grids_are_kept_beside_the_image_that_they_are_of(teacher):
    images = [photo(seed) for seed in range(3)]
    image_processor = matching_image_processor(teacher, STUDENT_SIZE)
    cache = TargetCache.build(images, teacher, image_processor, factor=2, layers=[1, 2], dtype=torch.float16)
    side = 2 * TEACHER_GRID
    assert cache.features.shape == (3, side, side, FEATURE_SIZE) and cache.features.dtype == torch.float16
    levels = cache[1]["levels"].float()
    assert levels.shape == (2, side, side, 16)
    torch.testing.assert_close(levels.mean(-1), torch.zeros(2, side, side), atol=2e-3, rtol=0)
    torch.testing.assert_close(levels.var(-1, correction=0), torch.ones(2, side, side), atol=0.02, rtol=0)
    answer = encode_densely(teacher, teacher.pixel_values(images[1]), 2, layers=[1, 2])
    torch.testing.assert_close(cache[1]["features"].float(), answer.features[0], atol=0.01, rtol=0.01)
    shuffled = cache.shuffled(0)
    wrong = int(shuffled.order[1])
    assert wrong != 1 and torch.equal(shuffled[1]["levels"], cache[wrong]["levels"])
