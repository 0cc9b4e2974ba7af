"""Inputs in any usual form, and a recipe that serves any architecture.

Legend: B images, F feature width.
"""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from apm_hf import APMConfig, APMModel
from apm_hf.ttt import TTTConfig, TTTTargets, adapt, redraw
from naive_apm import COLUMNS, small_images, small_model

CONFIG = TTTConfig(steps=4, learning_rate=1e-2, num_locations=4)


def problem(batch_size=2):
    return small_images(batch_size), torch.randn(batch_size, 16, generator=torch.Generator().manual_seed(3))


def assert_same(adapted, expected):
    assert adapted.image_embeds.dtype == adapted.losses.dtype == torch.float32
    assert torch.equal(adapted.image_embeds, expected.image_embeds)
    assert torch.equal(adapted.losses, expected.losses)
    assert {weight.dtype for weight in adapted.state_dict(0).values()} == {torch.float32}
    torch.testing.assert_close(adapted.query().last_hidden_state, expected.query().last_hidden_state)


@pytest.mark.parametrize("fit", ["all", "low_rank"])
def test_automatic_mixed_precision_around_a_fit_changes_nothing(fit):
    model, (images, targets) = small_model(pooling="attention"), problem()
    config = dataclasses.replace(CONFIG, fit=fit)
    expected = adapt(model, images, targets, config=config)
    with torch.autocast("cpu", torch.bfloat16):
        adapted = adapt(model, images, targets, config=config)
    assert_same(adapted, expected)


@pytest.mark.parametrize("fit", ["all", "low_rank"])
def test_the_default_type_of_floating_point_numbers_changes_nothing(fit):
    model, (images, targets) = small_model(pooling="attention", local_patch=True), problem()
    config = dataclasses.replace(CONFIG, fit=fit, stop="plateau", stop_threshold=0.5)
    mixture = {"image_embeds": targets, "features": torch.randn(2, 4, 5, 16, generator=torch.Generator())}
    expected = adapt(model, images, TTTTargets(**mixture), config=config)
    torch.set_default_dtype(torch.float64)
    try:
        adapted = adapt(model, images, TTTTargets(**mixture), config=config)
        assert_same(adapted, expected)
        assert adapt(model.double(), images, targets, config=config).image_embeds.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: x.numpy(),
        lambda x: x.double().numpy(),
        lambda x: x.tolist(),
        lambda x: list(x),
        lambda x: list(x.numpy()),
        lambda x: x.double(),
    ],
    ids=["array", "float64 array", "lists", "list of tensors", "list of arrays", "float64"],
)
def test_arrays_and_lists_are_taken_as_tensors_are(form):
    model, (images, targets) = small_model(), problem()
    expected = adapt(model, images, targets, config=CONFIG)
    assert_same(adapt(model, form(images), form(targets), config=CONFIG), expected)
    mixture = adapt(model, form(images), TTTTargets(image_embeds=form(targets)), config=CONFIG)
    assert_same(mixture, expected)
    embedding = small_model(trigger_source="embedding")
    expected = adapt(embedding, None, targets, config=CONFIG, trigger_column=targets)
    assert_same(adapt(embedding, None, form(targets), config=CONFIG, trigger_column=form(targets)), expected)


@pytest.mark.parametrize("values", ["cat", [[1.0, 2.0], [3.0]], {"a": 1}])
def test_other_values_are_refused_by_name(values):
    model, (images, targets) = small_model(), problem()
    with pytest.raises(ValueError, match="targets: expected a tensor, an array or lists of numbers"):
        adapt(model, images, values, config=CONFIG)
    with pytest.raises(ValueError, match="pixel_values: expected a tensor, an array or lists of numbers"):
        adapt(model, values, targets, config=CONFIG)


@pytest.mark.parametrize("fields", [{"hidden_sizes": [32], "num_residual_blocks": 2}, COLUMNS], ids=str)
def test_random_weights_are_drawn_for_plain_models_alone(fields):
    model, (images, targets) = small_model(**fields), problem()
    with pytest.raises(ValueError, match="start: expected 'model' with local columns or residual blocks"):
        adapt(model, images, targets, config=dataclasses.replace(CONFIG, start="random"))


def test_local_columns_are_folded_from_the_pixels():
    model, (images, targets) = small_model(**COLUMNS), problem()
    config = dataclasses.replace(CONFIG, start="model")
    with pytest.raises(ValueError, match="adapt: expected pixel_values alone with trigger_source='columns'"):
        adapt(model, images, targets, config=config, trigger_column=model.fold(images))


def test_given_arrays_are_not_changed_and_not_kept():
    model, (images, targets) = small_model(), problem()
    given = images.numpy().copy(), targets.numpy().copy()
    adapted = adapt(model, given[0], given[1], config=CONFIG)
    assert np.array_equal(given[0], images.numpy()) and np.array_equal(given[1], targets.numpy())
    before = adapted.query().last_hidden_state
    given[0][:] = 0
    assert torch.equal(adapted.query().last_hidden_state, before)


# --- weights drawn once -------------------------------------------------------------------------------------------


def test_a_redrawn_model_is_what_a_random_start_draws():
    model, (images, targets) = small_model(pooling="attention"), problem()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for seed in (0, 5):
        config = dataclasses.replace(CONFIG, seed=seed)
        expected = adapt(model, images, targets, config=config)
        drawn = adapt(redraw(model, seed), images, targets, config=dataclasses.replace(config, start="model"))
        assert_same(drawn, expected)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


# --- the recipe `fast` --------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "tiny": {},
    "narrow": {"hidden_sizes": [64, 32], "feature_size": 64, "initializer_range": 0.02, "pooling": "attention"},
    "wide": {"hidden_sizes": [512, 1024, 1024], "feature_size": 512, "initializer_range": 0.02},
    "deep": {"hidden_sizes": [128] * 6, "feature_size": 64},
    "gelu": {"hidden_act": "gelu"},
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fast_reaches_its_target_on_any_architecture(architecture, caplog):
    for seed in range(3):
        model = APMModel(APMConfig.preset("tiny", **ARCHITECTURES[architecture]))
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(3, 3, 96, 96, generator=generator)
        for size in (0.4, 3.0):  # of embeddings of CLIP, and far larger
            targets = size * torch.randn(3, model.config.feature_size, generator=generator)
            with caplog.at_level(logging.WARNING):
                adapted = adapt(model, images, targets, config=TTTConfig.preset("fast", seed=seed))
            reached = F.cosine_similarity(adapted.image_embeds, targets) >= 0.985
            assert reached.all() and (adapted.steps > 0).all()
            assert F.cosine_similarity(adapted.query().pooler_output, targets).min() > 0.97
    assert not caplog.records


def test_images_that_do_not_reach_their_target_are_named(caplog):
    model, (images, targets) = small_model(), problem(3)
    with torch.no_grad():
        reached = model(images).pooler_output[1]
    targets[1] = reached  # from the start
    config = TTTConfig.preset("fast", start="model", steps=1, stop_threshold=0.999, num_locations=None)
    adapted = adapt(model, images, targets, config=config)
    assert adapted.steps.tolist() == [1, 0, 1]
    assert "1 steps were too few for a cosine of 0.999 to the targets of the images [0, 2]" in caplog.text
