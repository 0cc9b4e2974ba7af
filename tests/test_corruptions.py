"""The corruptions: as defined in ImageNet-C, worse with severity, reproducible."""

import numpy as np
import pytest
from PIL import Image

from apm_hf.data.corruptions import CORRUPTIONS, corrupt
from apm_hf.data.scenes import make_scene

SIZES = (32, 96, 224)  # one for each set of constants


def corrupted(image: Image.Image, name: str, severity: int, seed: int = 0) -> np.ndarray:
    return np.asarray(corrupt(image, name, severity=severity, generator=np.random.default_rng(seed)), dtype=float)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_damage_grows_with_severity(name, size):
    images = [make_scene(index, image_size=size).image for index in range(12)]
    damage = [
        np.mean([((corrupted(image, name, severity) - np.asarray(image)) ** 2).mean() for image in images])
        for severity in range(1, 6)
    ]
    assert damage[0] > 1 and all(later > 1.03 * earlier for earlier, later in zip(damage, damage[1:], strict=False))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_keeps_the_image_and_its_size(name):
    image = make_scene(0).image.crop((0, 0, 90, 60))
    before = image.tobytes()
    result = corrupt(image, name, severity=5, generator=np.random.default_rng(0))
    assert result.mode == "RGB" and result.size == (90, 60) and image.tobytes() == before


def test_noise_follows_the_generator_and_nothing_else_draws_from_it():
    image = make_scene(0).image
    assert np.array_equal(corrupted(image, "gaussian_noise", 3), corrupted(image, "gaussian_noise", 3))
    assert not np.array_equal(corrupted(image, "gaussian_noise", 3), corrupted(image, "gaussian_noise", 3, seed=1))
    for name in set(CORRUPTIONS) - {"gaussian_noise"}:
        generator = np.random.default_rng(0)
        corrupt(image, name, severity=3, generator=generator)
        assert generator.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize(("size", "sigmas"), [(224, (0.08, 0.38)), (64, (0.04, 0.18)), (32, (0.04, 0.10))])
def test_noise_has_the_published_strength(size, sigmas):
    grey = Image.new("RGB", (size, size), (128, 128, 128))
    for severity, sigma in zip((1, 5), sigmas, strict=True):
        noise = np.concatenate([corrupted(grey, "gaussian_noise", severity, seed).ravel() for seed in range(9)])
        inside = np.quantile(noise, [0.3, 0.7])  # the tails are clipped at black and white
        assert np.ptp(inside) / 255 == pytest.approx(2 * 0.5244 * sigma, abs=1.5 / 255)


@pytest.mark.parametrize(("size", "factor"), [(224, 0.05), (64, 0.05), (32, 0.15)])
def test_contrast_shrinks_the_distance_to_the_mean_colour(size, factor):
    image = make_scene(3, image_size=size).image
    pixels = np.asarray(image, dtype=float)
    mean = pixels.mean(axis=(0, 1))
    assert np.abs(corrupted(image, "contrast", 5) - (mean + factor * (pixels - mean))).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("size", "radius"), [(225, 3), (65, 0.5), (65, 3), (225, 10)])
def test_defocus_spreads_a_point_over_a_disc(size, radius):
    point = Image.new("RGB", (size, size))
    point.putpixel((size // 2, size // 2), (255, 255, 255))
    severity = 1 if (size, radius) in ((225, 3), (65, 0.5)) else 5
    spread = corrupted(point, "defocus", severity)[..., 0]
    y, x = np.nonzero(spread)
    reach = np.hypot(y - size // 2, x - size // 2).max()
    assert radius <= reach <= radius + 1.5
    assert np.array_equal(spread, spread.T) and np.array_equal(spread, spread[::-1])


def test_defocus_leaves_flat_areas_and_mean_brightness_alone():
    flat = Image.new("RGB", (40, 70), (10, 128, 250))
    assert np.array_equal(corrupted(flat, "defocus", 5), np.asarray(flat, dtype=float))


def test_unknown_names_and_severities_are_refused():
    image, generator = make_scene(0).image, np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"expected a corruption in .*gaussian_noise.*, got 'rain'"):
        corrupt(image, "rain", severity=1, generator=generator)
    for severity in (0, 6, -1):
        with pytest.raises(ValueError, match=rf"expected a severity in 1\.\.5, got {severity}"):
            corrupt(image, "jpeg", severity=severity, generator=generator)
