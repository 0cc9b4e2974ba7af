"""The three losses by hand, and the colours of a grid's cells."""

import math

import pytest
import torch
from torch.nn import functional as F

from apm_hf import APMModelOutput
from apm_hf.distillation.losses import DistillationTargets, LossWeights, distillation_losses
from apm_hf.teachers.targets import rgb_targets

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.5])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def answers(dtype=torch.float32, rgb=True):
    return APMModelOutput(
        last_hidden_state=noise(2, 6, 5, seed=1).to(dtype),
        pooler_output=noise(2, 5, seed=2).to(dtype),
        rgb=noise(2, 6, 3, seed=3).abs().to(dtype) if rgb else None,
    )


def wanted():
    return DistillationTargets(image_embeds=noise(2, 5, seed=4), features=noise(2, 6, 5, seed=5), rgb=noise(2, 6, 3))


def naive_mse(answer, target):
    errors = [(a - t) ** 2 for a, t in zip(answer.flatten().tolist(), target.flatten().tolist(), strict=True)]
    return sum(errors) / len(errors)


def test_losses_are_mean_squared_errors_and_their_weighted_sum():
    outputs, targets = answers(), wanted()
    losses = distillation_losses(outputs, targets, LossWeights(grid=2.0, cls=0.5, rgb=3.0))
    grid = naive_mse(outputs.last_hidden_state, targets.features)
    cls = naive_mse(outputs.pooler_output, targets.image_embeds)
    rgb = naive_mse(outputs.rgb, targets.rgb)
    assert losses["loss_grid"].item() == pytest.approx(grid, rel=1e-5)
    assert losses["loss_cls"].item() == pytest.approx(cls, rel=1e-5)
    assert losses["loss_rgb"].item() == pytest.approx(rgb, rel=1e-5)
    assert losses["loss"].item() == pytest.approx(2 * grid + 0.5 * cls + 3 * rgb, rel=1e-5)


def test_the_other_distance_of_features_is_smooth_l1_and_cosine_in_the_standardised_space():
    outputs, targets = answers(), wanted()
    mean, std = noise(5, seed=6), noise(5, seed=7).abs() + 0.5
    losses = distillation_losses(
        outputs, targets, LossWeights(), distance="smooth_l1_cosine", feature_mean=mean, feature_std=std
    )
    standardised = [((x - mean) / std).double() for x in (outputs.last_hidden_state, targets.features)]
    errors = (standardised[0] - standardised[1]).abs()
    smooth = [e * e / 2 if e < 1 else e - 0.5 for e in errors.flatten().tolist()]
    assert min(errors.max(), 1) == 1 > errors.min()  # both parts of the curve
    cosines = [
        sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
        for a, b in zip(*(x.flatten(0, 1).tolist() for x in standardised), strict=True)
    ]
    expected = sum(smooth) / len(smooth) + 1 - sum(cosines) / len(cosines)
    assert losses["loss_grid"].item() == pytest.approx(expected, rel=1e-5)
    assert losses["loss_rgb"].item() == pytest.approx(naive_mse(outputs.rgb, targets.rgb), rel=1e-5)


@pytest.mark.parametrize("left", ["grid", "cls", "rgb"])
def test_a_loss_of_weight_zero_is_not_computed(left):
    weights = LossWeights(**{name: float(name == left) for name in ("grid", "cls", "rgb")})
    outputs, targets = answers(), wanted()
    losses = distillation_losses(outputs, targets, weights)
    assert set(losses) == {"loss", f"loss_{left}"}
    assert losses["loss"] == losses[f"loss_{left}"] > 0
    # Not even one that is not finite.
    spoilt = {"grid": "image_embeds", "cls": "features", "rgb": "features"}[left]
    broken = DistillationTargets(**{**vars(targets), spoilt: torch.full_like(getattr(targets, spoilt), math.nan)})
    assert distillation_losses(outputs, broken, weights)["loss"] == losses["loss"]


def test_gradients_of_the_sum_reach_every_answer():
    outputs = answers()
    for answer in outputs.values():
        answer.requires_grad_()
    targets = wanted()
    distillation_losses(outputs, targets, LossWeights(grid=2.0, cls=0.5, rgb=3.0))["loss"].backward()
    torch.testing.assert_close(
        outputs.last_hidden_state.grad, 2 * 2 / 60 * (outputs.last_hidden_state.detach() - targets.features)
    )
    torch.testing.assert_close(outputs.rgb.grad, 3 * 2 / 36 * (outputs.rgb.detach() - targets.rgb))


def test_half_precision_answers_are_scored_in_float32():
    outputs, targets = answers(torch.bfloat16), wanted()
    losses = distillation_losses(outputs, targets, LossWeights())
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    exact = F.mse_loss(outputs.last_hidden_state.double(), targets.features.double()).item()
    assert losses["loss_grid"].item() == pytest.approx(exact, rel=1e-6)


def test_a_student_without_colours_needs_a_colour_weight_of_zero():
    with pytest.raises(ValueError, match="rgb.*use_rgb_head=True.*got a student without"):
        distillation_losses(answers(rgb=False), wanted(), LossWeights())
    assert "loss_rgb" not in distillation_losses(answers(rgb=False), wanted(), LossWeights(rgb=0.0))


@pytest.mark.parametrize(
    "weights",
    [{"grid": -1.0}, {"cls": math.nan}, {"rgb": math.inf}, {"grid": 0.0, "cls": 0.0, "rgb": 0.0}],
)
def test_weights_are_not_negative_and_not_all_zero(weights):
    with pytest.raises(ValueError, match="expected numbers >= 0, one of grid, cls and rgb positive, got LossWeights"):
        LossWeights(**weights)


def test_targets_at_some_locations_keep_the_image_embedding():
    targets = wanted()
    some = targets.at(torch.tensor([4, 0]))
    assert torch.equal(some.features, targets.features[:, [4, 0]]) and torch.equal(some.rgb, targets.rgb[:, [4, 0]])
    assert torch.equal(some.image_embeds, targets.image_embeds)
    assert targets.at(None) is targets


@pytest.mark.parametrize("grid", [(3, 4), (6, 2), (12, 8), (1, 1)])
def test_colours_are_the_cells_means_row_major_with_the_normalisation_undone(grid):
    colours = torch.rand(2, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    normalised = (colours - MEAN[:, None, None]) / STD[:, None, None]
    rgb = rgb_targets(normalised, *grid, mean=MEAN, std=STD)
    height, width = 12 // grid[0], 8 // grid[1]
    assert rgb.shape == (2, grid[0] * grid[1], 3) and rgb.dtype == torch.float32
    for row in range(grid[0]):
        for column in range(grid[1]):
            cell = colours[:, :, row * height : (row + 1) * height, column * width : (column + 1) * width]
            torch.testing.assert_close(rgb[:, row * grid[1] + column], cell.mean(dim=(2, 3)))


def test_colours_of_half_precision_pixels_are_worked_out_in_float32():
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    rgb = rgb_targets(pixels, 1, 1, mean=MEAN, std=STD)
    expected = pixels.double().mean(dim=(2, 3)) * STD.double() + MEAN.double()
    torch.testing.assert_close(rgb[:, 0].double(), expected, atol=1e-6, rtol=0)
