"""Validation figures against scikit-learn and plain loops, and the picture's panels against their colours."""

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from sklearn.metrics.pairwise import cosine_similarity

from apm_hf import APMModelOutput
from apm_hf.distillation.losses import DistillationTargets
from apm_hf.distillation.validation import TILE, ValidationMetrics, validation_picture, worse_than_constant
from apm_hf.islands import PCAColours

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
    flat_answer, flat_target = answer.reshape(-1, WIDTH), target.reshape(-1, WIDTH)
    expected = r2_score(flat_target, flat_answer, multioutput="variance_weighted")
    assert values["feature_r2"] == pytest.approx(expected, rel=1e-5)
    assert values["rgb_mse"] == pytest.approx(((outputs.rgb - targets.rgb) ** 2).mean().item(), rel=1e-5)


def test_r2_is_exact_where_features_lie_far_from_zero():
    # Vision transformers have such channels: their mean is large against their spread.
    outputs, targets = answers_and_targets(offset=300.0)
    expected = r2_score(
        targets.features.flatten(0, 1).double().numpy(),
        outputs.last_hidden_state.flatten(0, 1).double().numpy(),
        multioutput="variance_weighted",
    )
    assert compute(outputs, targets, BATCHES)["feature_r2"] == pytest.approx(expected, abs=1e-4)


def test_a_perfect_student_has_r2_one_and_the_mean_has_r2_zero():
    outputs, targets = answers_and_targets()
    outputs.last_hidden_state = targets.features
    assert compute(outputs, targets, WHOLE)["feature_r2"] == pytest.approx(1, abs=1e-6)
    assert worse_than_constant(compute(outputs, targets, WHOLE)) is None
    outputs.last_hidden_state = targets.features.mean(dim=(0, 1)).expand_as(targets.features)
    values = compute(outputs, targets, BATCHES)
    assert values["feature_r2"] == pytest.approx(0, abs=1e-5)
    assert values["feature_cosine"] == pytest.approx(values["mean_cosine"], abs=1e-6)
    values["feature_cosine"] -= 0.1
    assert "no better than a constant" in worse_than_constant(values)


def test_a_student_without_colours_has_no_colour_error():
    values = compute(*answers_and_targets(rgb=False), WHOLE)
    assert set(values) == {"feature_cosine", "feature_r2", "embed_cosine", "mean_cosine"}


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
