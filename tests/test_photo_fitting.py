"""Models fitted to the photos at hand, and whole photos shown to models and teachers."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from apm_hf import load_teacher
from apm_hf.distillation import matching_image_processor
from apm_hf.image_processing_apm import APMImageProcessor
from apm_hf.islands import feature_map
from apm_hf.pair.several_photos import fit_photos
from apm_hf.ttt.photos import (
    fit_photo,
    map_size,
    photo_colours,
    photo_model,
    random_model,
    teacher_features,
    whole_photos,
)
from fixtures_tiny import FEATURE_SIZE, STUDENT_SIZE, TEACHER_GRID, photo, save_clip, student

WIDE = {"initializer_range": 0.3, "local_patch": True}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """It resizes the short side and crops the centre."""
    return load_teacher(save_clip(tmp_path_factory.mktemp("clip")), device="cpu")


def pixels(*seeds):
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack([torch.randn(3, STUDENT_SIZE, STUDENT_SIZE, generator=each) for each in generator])


def targets(*seeds):
    """`(B, 4, 5, F)`."""
    return torch.stack([torch.randn(4, 5, FEATURE_SIZE, generator=torch.Generator().manual_seed(s)) for s in seeds])


def cosine(model, pixel_values, features):
    answers = feature_map(model, pixel_values, tuple(features.shape[1:3]))
    return F.cosine_similarity(answers, features, dim=-1).mean().item()


@pytest.mark.parametrize(
    ("size", "expected"), [((400, 300), (48, 64)), ((300, 400), (64, 48)), ((9, 9), (64, 64)), ((1000, 2), (1, 64))]
)
def test_a_map_has_the_shape_of_its_photo(size, expected):
    assert map_size(Image.new("RGB", size), 64) == expected


def test_photos_are_shown_whole_whatever_the_processor_crops(teacher):
    wide = np.full((40, 120, 3), 128, dtype=np.uint8)
    wide[:, :20], wide[:, -20:] = (255, 0, 0), (0, 0, 255)  # what a centre crop would cut off
    for processor in (teacher.image_processor, matching_image_processor(teacher, STUDENT_SIZE)):
        shown = whole_photos(processor, [Image.fromarray(wide)], (24, 48))
        assert shown.shape == (1, 3, 24, 48)
        assert (shown[0, 0, :, 0] > shown[0, 2, :, 0]).all() and (shown[0, 2, :, -1] > shown[0, 0, :, -1]).all()


def test_a_fine_grid_has_the_photo_s_shape_and_more_answers_than_the_teacher_s_own(teacher):
    wide = photo(0, size=(80, 40))
    plain, fine = (teacher_features(teacher, [wide], fine=fine) for fine in (False, True))
    assert plain.shape == (1, TEACHER_GRID, TEACHER_GRID, FEATURE_SIZE)
    assert fine.shape == (1, 2 * TEACHER_GRID, 4 * TEACHER_GRID, FEATURE_SIZE)


def test_the_colours_of_a_grid_are_its_cells_means():
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    colours = photo_colours(Image.fromarray(picture), (2, 3))
    expected = picture.reshape(2, 4, 3, 4, 3).mean(axis=(1, 3)) / 255
    np.testing.assert_allclose(colours[0].numpy(), expected, atol=1e-6)


def test_a_random_model_depends_on_its_seed_alone():
    state = torch.get_rng_state()
    models = [random_model(student().config, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    weights = [fitted.decoder.feature_head.weight for fitted in models]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_a_photo_model_answers_everywhere_and_starts_at_mid_grey():
    model = photo_model(FEATURE_SIZE)
    assert model.config.local_patch and not photo_model(FEATURE_SIZE, local_patch=False).config.local_patch
    with torch.no_grad():
        answers = model(torch.zeros(1, 3, 224, 224), torch.zeros(1, 2))
    assert answers.last_hidden_state.shape == (1, 1, FEATURE_SIZE)
    assert answers.rgb.mean() == pytest.approx(0.5, abs=0.2)


def test_a_fit_comes_closer_to_the_teacher_and_leaves_the_model_as_it_was():
    model, features = student(**WIDE), targets(0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    rgb = torch.rand(1, 4, 5, 3, generator=torch.Generator().manual_seed(3))
    fitted, again = (fit_photo(model, pixels(0), features, rgb, steps=200) for _ in range(2))
    assert cosine(fitted, pixels(0), features) > cosine(model, pixels(0), features) + 0.2
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(torch.equal(weight, fitted.state_dict()[name]) for name, weight in again.state_dict().items())


def test_a_fit_shows_every_step_from_the_start_on():
    model, seen = student(**WIDE), []

    def on_step(step, fitted):
        seen.append((step, cosine(fitted, pixels(0), targets(0))))

    fit_photo(model, pixels(0), targets(0), None, steps=6, on_step=on_step)
    assert [step for step, _ in seen] == list(range(6))
    assert seen[0][1] == pytest.approx(cosine(model, pixels(0), targets(0)), abs=1e-6)
    assert len({value for _, value in seen}) == 6
    one_step = fit_photo(model, pixels(0), targets(0), None, steps=1)
    assert seen[1][1] == pytest.approx(cosine(one_step, pixels(0), targets(0)), abs=1e-6)


def test_a_fit_that_diverges_is_said():
    with pytest.raises(ValueError, match="diverged"):
        fit_photo(student(**WIDE), pixels(0), 1e30 * targets(0), None, steps=3)


def test_one_model_for_two_photos_tells_them_apart():
    model = student()  # without local patch: the trigger column has to
    processor = APMImageProcessor(size={"height": STUDENT_SIZE, "width": STUDENT_SIZE})
    both, features = pixels(0, 1), targets(0, 1)[:, :1, :1].expand(-1, 4, 5, -1)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    fitted = fit_photos(model, both, features, processor, steps=200)
    assert cosine(fitted, both, features) > cosine(fitted, both, features.flip(0)) + 0.3
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
