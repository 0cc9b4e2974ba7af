"""Validation figures against scikit-learn and plain NumPy, and the picture's panels against their colours."""

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity

from apm_hf import APMModelOutput
from apm_hf.distillation.controls import measure_controls
from apm_hf.distillation.losses import DistillationTargets
from apm_hf.distillation.validation import (
    TILE,
    ValidationMetrics,
    comparison,
    validation_picture,
    verdict,
    worse_than_constant,
)
from apm_hf.islands import PCAColours
from apm_hf.position_encoding import grid_coordinates

NUM_IMAGES, GRID, WIDTH = 7, (3, 2), 5


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def answers_and_targets(*, offset=0.0, rgb=True, num_images=NUM_IMAGES):
    """A student that is right up to noise; features around `offset`."""
    num_locations = GRID[0] * GRID[1]
    features = noise(num_images, num_locations, WIDTH, seed=0) + offset
    embeds = noise(num_images, WIDTH, seed=1)
    colours = torch.rand(num_images, num_locations, 3, generator=torch.Generator().manual_seed(2))
    outputs = APMModelOutput(
        last_hidden_state=features + 0.5 * noise(num_images, num_locations, WIDTH, seed=3),
        pooler_output=embeds + 0.5 * noise(num_images, WIDTH, seed=4),
        rgb=colours + 0.1 * noise(num_images, num_locations, 3, seed=5).abs() if rgb else None,
    )
    return outputs, DistillationTargets(embeds, features, colours)


def part(outputs, targets, rows):
    outputs = APMModelOutput(**{name: value[rows] for name, value in outputs.items()})
    return outputs, DistillationTargets(*(value[rows] for value in vars(targets).values() if value is not None))


def compute(outputs, targets, batches):
    metrics = ValidationMetrics()
    for rows in batches:
        metrics.add(metrics.statistics(*part(outputs, targets, rows)))
    return metrics.compute()


WHOLE = [slice(None)]
BATCHES = [slice(0, 3), slice(3, 6), slice(6, 7)]  # the last one smaller


@pytest.mark.parametrize("batches", [WHOLE, BATCHES], ids=["one batch", "uneven batches"])
def test_figures_are_those_of_scikit_learn_and_count_every_image_once(batches):
    outputs, targets = answers_and_targets()
    values = compute(outputs, targets, batches)
    answer, target = outputs.last_hidden_state.numpy(), targets.features.numpy()
    cosines = [cosine_similarity(a, t).diagonal().mean() for a, t in zip(answer, target, strict=True)]
    assert values["feature_cosine"] == pytest.approx(np.mean(cosines), rel=1e-5)
    embed_cosines = cosine_similarity(outputs.pooler_output.numpy(), targets.image_embeds.numpy()).diagonal()
    assert values["embed_cosine"] == pytest.approx(embed_cosines.mean(), rel=1e-5)
    assert values["rgb_mse"] == pytest.approx(((outputs.rgb - targets.rgb) ** 2).mean().item(), rel=1e-5)


def photos(num_images, *, seed, offset=0.0):
    """Pixels, and a teacher's features of a 3 x 2 grid: each place's own value, the brightness there, and noise."""
    pixels = torch.rand(num_images, 3, 3 * 8, 2 * 8, generator=torch.Generator().manual_seed(seed))
    brightness = torch.nn.functional.avg_pool2d(pixels, 8).mean(dim=1).flatten(1)[..., None]  # (B, L, 1)
    scales = torch.tensor([1.0, 20.0, 0.1, 3.0, 1.0])
    place = 2 * noise(6, WIDTH, seed=99)
    features = (place + 200 * (brightness - 0.5) * torch.linspace(1, -1, WIDTH)) * scales + offset
    features = features + scales * noise(num_images, 6, WIDTH, seed=seed + 1)
    return {"pixel_values": pixels}, DistillationTargets(noise(num_images, WIDTH, seed=5), features, grid=GRID)


def controls_of(train, held_out):
    return measure_controls(*([(batch, {"": targets})] for batch, targets in (train, held_out)))[""]


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_controls_and_r2_are_those_of_numpy_in_standardised_units_after_position_means(offset):
    train, held_out = photos(40, seed=0, offset=offset), photos(9, seed=10, offset=offset)
    controls = controls_of(train, held_out)
    fitted, wanted = (targets.features.double().numpy() for _, targets in (train, held_out))
    std = fitted.std(axis=(0, 1))
    total = (((wanted - wanted.mean(axis=0)) / std) ** 2).sum()

    def r2(output):
        return 1 - (((wanted - output) / std) ** 2).sum() / total

    assert controls.figures["mean_r2"] == pytest.approx(r2(fitted.mean(axis=(0, 1))), abs=1e-4)
    assert controls.figures["position_r2"] == pytest.approx(r2(fitted.mean(axis=0)), abs=1e-4)
    assert controls.figures["mean_r2"] < controls.figures["position_r2"] < 0
    assert controls.figures["ridge_r2"] > 0.5, "what is linear in the pixels is found"
    output = held_out[1].features + 0.5 * noise(9, 6, WIDTH, seed=3)
    outputs = APMModelOutput(last_hidden_state=output, pooler_output=held_out[1].image_embeds)
    metrics = ValidationMetrics()
    for rows in (slice(0, 6), slice(6, 9)):
        one = APMModelOutput(**{name: value[rows] for name, value in outputs.items()})
        targets = DistillationTargets(held_out[1].image_embeds[rows], held_out[1].features[rows])
        metrics.add(metrics.statistics(one, targets, controls))
    values = metrics.compute(controls)
    assert values["feature_r2"] == pytest.approx(r2(output.double().numpy()), abs=1e-4)
    assert values | controls.figures == values


def test_a_regression_finds_nothing_in_noise_and_reads_the_embedding_of_a_student_that_does():
    (pixels, train), (others, held_out) = photos(160, seed=0), photos(12, seed=10)
    features = [noise(len(one.features), 6, WIDTH, seed=seed) for seed, one in enumerate((train, held_out))]
    shared = [4 * one[:, :1].expand(-1, 6, -1) for one in features]
    for source, reads_embedding in ((features, False), (shared, False), (shared, True)):
        pairs = [
            [(batch, {"": DistillationTargets(values[:, 0], values, grid=GRID)})]
            for batch, values in zip((pixels, others), source, strict=True)
        ]
        found = measure_controls(*pairs, reads_embedding=reads_embedding)[""].figures["ridge_r2"]
        assert found > 0.6 if reads_embedding else found < 0.1, found


def test_features_at_some_places_alone_are_enough_to_fit_controls():
    (batch, whole), held_out = photos(40, seed=0), photos(9, seed=10)
    places = torch.stack([torch.randperm(6, generator=torch.Generator().manual_seed(row))[:4] for row in range(40)])
    some = DistillationTargets(
        whole.image_embeds,
        whole.features.take_along_dim(places[..., None], dim=1),
        grid=GRID,
        coordinates=grid_coordinates(*GRID)[places],
    )
    found, expected = (
        controls_of(({**batch, "locations": places}, some), held_out),
        controls_of((batch, whole), held_out),
    )
    assert found.figures["ridge_r2"] == pytest.approx(expected.figures["ridge_r2"], abs=0.1)
    assert found.figures["position_r2"] == pytest.approx(expected.figures["position_r2"], abs=0.05)


def test_without_two_images_to_validate_on_there_is_no_r2():
    train = photos(4, seed=0)
    held_out = photos(1, seed=1)
    assert measure_controls([(train[0], {"": train[1]})], [(held_out[0], {"": held_out[1]})]) == {}
    assert measure_controls([], [(held_out[0], {"": held_out[1]})]) == {}


def test_a_student_is_said_to_be_above_or_not_above_its_controls():
    figures = {"feature_r2": 0.1, "mean_r2": -0.5, "position_r2": 0.0, "ridge_r2": 0.2}
    assert verdict(figures) == "this student is above mean feature, position alone; not above ridge regression"
    assert [title for title, _ in comparison(figures)][0] == "this student" and verdict({"feature_cosine": 0.4}) == ""
    assert worse_than_constant(figures) is None
    assert "R² -0.500, the mean" in worse_than_constant({**figures, "feature_r2": -0.5})
    cosines = {"feature_cosine": 0.5, "mean_cosine": 0.6}
    assert "R² 0.100 and cosine 0.500, the mean" in worse_than_constant({**figures, **cosines})
    assert "no better than a constant" in worse_than_constant(cosines)


def test_the_mean_has_the_cosine_that_is_called_that_of_the_mean():
    outputs, targets = answers_and_targets()
    outputs.last_hidden_state = targets.features.mean(dim=(0, 1)).expand_as(targets.features)
    values = compute(outputs, targets, BATCHES)
    assert values["feature_cosine"] == pytest.approx(values["mean_cosine"], abs=1e-6)


def test_a_student_without_colours_has_no_colour_error():
    values = compute(*answers_and_targets(rgb=False), WHOLE)
    assert set(values) == {"feature_cosine", "embed_cosine", "mean_cosine"}


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="at least one image, got none"):
        ValidationMetrics().compute()


@pytest.mark.parametrize("rgb", [True, False])
def test_the_picture_has_a_row_an_image_and_a_panel_an_answer(rgb):
    outputs, targets = answers_and_targets(rgb=rgb)
    picture = validation_picture(outputs, targets, GRID, num_images=2)
    assert picture.size == ((4 if rgb else 3) * TILE, 2 * TILE) and picture.mode == "RGB"
    colours = PCAColours.fit(targets.features[:2])
    panels = [targets.rgb[:2].numpy(), colours(targets.features[:2]), colours(outputs.last_hidden_state[:2])]
    panels += [outputs.rgb[:2].clamp(0, 1).numpy()] if rgb else []
    pixels = np.asarray(picture).astype(float) / 255
    height, width = TILE / GRID[0], TILE / GRID[1]
    for image in range(2):
        for index, panel in enumerate(panels):
            for location in range(GRID[0] * GRID[1]):  # row-major: look at every cell's centre
                y, x = (location // GRID[1] + 0.5) * height, (location % GRID[1] + 0.5) * width
                seen = pixels[image * TILE + int(y), index * TILE + int(x)]
                np.testing.assert_allclose(seen, panel[image, location], atol=1 / 255)


def test_the_picture_takes_what_images_there_are():
    outputs, targets = answers_and_targets(num_images=1)
    assert validation_picture(outputs, targets, GRID, num_images=4).size == (4 * TILE, TILE)
