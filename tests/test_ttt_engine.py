"""What the engine of test-time training promises: exactness, parts that learn alone, mixtures of targets, stops.

Legend: B images, L locations, F feature width.
"""

import dataclasses

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from apm_hf import APMConfig, APMModel
from apm_hf.position_encoding import grid_coordinates
from apm_hf.ttt import TTTConfig, TTTTargets, adapt, bytes_per_image, redraw
from apm_hf.ttt.settings import FITS
from apm_hf.ttt.stacked import learning_layers
from naive_apm import assert_close, small_config, small_images, small_model

F_WIDTH = 16


def wide_model(**overrides):
    """An 8 x 8 grid, a trigger of 2 x 64."""
    fields = {
        "image_size": 64, "patch_size": 8, "trigger_channels": 2, "position_size": 64, "hidden_sizes": [64, 48],
        "feature_size": 128, "initializer_range": 0.1,
    }  # fmt: skip
    return APMModel(APMConfig.preset("tiny", **{**fields, **overrides}))


def wide_problem(batch_size=5):
    generator = torch.Generator().manual_seed(5)
    return small_images(batch_size, size=64), torch.randn(batch_size, 128, generator=generator)


def problem(batch_size=3):
    return small_images(batch_size), torch.randn(batch_size, F_WIDTH, generator=torch.Generator().manual_seed(7))


def recipe(**settings):
    return TTTConfig(**{"start": "model", "steps": 5, "learning_rate": 1e-2, **settings})


def assert_same_fit(adapted, index, other, position, tolerance=1e-5):
    assert_close(adapted.image_embeds[index], other.image_embeds[position], tolerance)
    assert torch.equal(adapted.losses[index].isnan(), other.losses[position].isnan())
    assert_close(adapted.losses[index].nan_to_num(), other.losses[position].nan_to_num(), tolerance)
    state = other.state_dict(position)
    for name, weight in adapted.state_dict(index).items():
        # The bias of attention's keys has no gradient but rounding, of which Adam makes whole steps.
        assert name == "pooler.k_proj.bias" or (weight - state[name]).abs().max() <= tolerance, name


# --- exactness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["all", "low_rank"])
def test_the_same_call_gives_the_same_bits(fit):
    images, targets = wide_problem(2)
    model, config = wide_model(pooling="attention"), TTTConfig(steps=3, fit=fit, num_locations=4)
    first, second = (adapt(model, images, targets, config=config) for _ in range(2))
    drawn = adapt(redraw(model, 0), images, targets, config=dataclasses.replace(config, start="model"))
    for other in (second, drawn):
        assert torch.equal(first.image_embeds, other.image_embeds) and torch.equal(first.losses, other.losses)
        for index in range(2):
            state = other.state_dict(index)
            assert all(torch.equal(weight, state[name]) for name, weight in first.state_dict(index).items())
    other = adapt(model, images, targets, config=dataclasses.replace(config, seed=1))
    assert not torch.equal(other.losses, first.losses)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("seeds", [None, [3, 1, 3, 4, 5]], ids=["one seed", "a seed an image"])
@pytest.mark.parametrize("num_locations", [None, 4])
@pytest.mark.parametrize("fit", FITS)
def test_an_image_is_fitted_in_the_same_way_whatever_stands_beside_it(fit, num_locations, seeds, dtype):
    model = wide_model(pooling="attention", local_patch=fit in ("all", "trigger"))
    images, targets = wide_problem()
    config = TTTConfig(steps=4, learning_rate=1e-3, num_locations=num_locations, fit=fit, dtype=dtype)
    tolerance = 1e-5 if dtype == "float32" else 2e-2  # three digits
    adapted = adapt(model, images, targets, config=config, seeds=seeds)
    for index in (0, 3):
        one = slice(index, index + 1)
        alone = adapt(model, images[one], targets[one], config=config, seeds=seeds and seeds[one])
        assert_same_fit(adapted, index, alone, 0, tolerance)
    order = torch.tensor([4, 0, 3, 1, 2])
    turned = adapt(
        model, images[order], targets[order], config=config, seeds=seeds and [seeds[index] for index in order]
    )
    assert_same_fit(adapted, 4, turned, 0, tolerance)
    assert_same_fit(adapted, 1, turned, 3, tolerance)


def test_groups_and_threads_change_results_by_rounding_alone():
    model, (images, targets) = wide_model(), wide_problem()
    config = TTTConfig(steps=4, learning_rate=1e-3, num_locations=8)
    adapted = adapt(model, images, targets, config=config)
    size = bytes_per_image(model, config, TTTTargets(image_embeds=targets), distinct=False)
    threads = torch.get_num_threads()
    try:
        for num_threads, max_memory in ((threads, 1), (threads, 2 * size), (2, None)):
            torch.set_num_threads(num_threads)
            other = adapt(model, images, targets, config=config, max_memory=max_memory)
            for index in range(len(images)):
                assert_same_fit(adapted, index, other, index)
    finally:
        torch.set_num_threads(threads)


# --- what learns --------------------------------------------------------------------------------------------------


def first_pass(model, image, names):
    """Inputs and outputs of layers when the model, as it is given, reads an image."""
    seen, hooks = {}, []
    for name in names:

        def watch(layer, inputs, output, name=name):
            seen[name] = inputs[0].reshape(-1, inputs[0].shape[-1]), output.reshape(-1, output.shape[-1])

        hooks.append(model.get_submodule(name).register_forward_hook(watch))
    with torch.no_grad():
        model(image[None])
    for hook in hooks:
        hook.remove()
    return seen


def naive_fit(model, image, target, config):
    """A plain loop over the weights that `config.fit` names; a low-rank update is written out where it learns."""
    learning = learning_layers(model, config)
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    learnt, deltas, scales = {}, {}, {}
    for name, weight in weights.items():
        how, part = learning.get(name.rpartition(".")[0]), name.rpartition(".")[2]
        if how == "low_rank" and part == "weight":
            deltas[name] = torch.zeros(len(weight), config.rank + 1, requires_grad=True)
        elif how == "all" or (how == "bias" and part == "bias"):
            learnt[name] = weight.requires_grad_()
    for name, (inputs, outputs) in first_pass(model, image, [name.removesuffix(".weight") for name in deltas]).items():
        size = outputs.square().mean()
        if name in ("decoder.feature_head", "pooler.out_proj"):
            size = size + target.square().mean()
        moved = inputs.unflatten(-1, (config.rank, -1)).sum(dim=-1).abs().sum(dim=-1).mean()
        scales[f"{name}.weight"] = config.alpha * size.sqrt() / moved, config.alpha * size.sqrt() / 10

    def current():
        moved = {}
        for name, delta in deltas.items():
            bias, width = name.replace(".weight", ".bias"), weights[name].shape[1] // config.rank
            moved[name] = weights[name] + scales[name][0] * delta[:, :-1].repeat_interleave(width, dim=1)
            moved[bias] = weights[bias] + scales[name][1] * delta[:, -1]
        return {**weights, **moved}

    optimizer = torch.optim.Adam([*learnt.values(), *deltas.values()], lr=config.learning_rate)
    for _ in range(config.steps):
        pooled = functional_call(model, current(), (image[None],)).pooler_output[0]
        optimizer.zero_grad()
        F.mse_loss(pooled, target).backward()
        optimizer.step()
    names = set(learnt) | set(deltas) | {name.replace(".weight", ".bias") for name in deltas}
    return {name: weight.detach() for name, weight in current().items()}, names


@pytest.mark.parametrize("pooling", ["mean", "attention"])
@pytest.mark.parametrize("fit", [fit for fit in FITS if fit != "all"])
def test_what_is_asked_to_learn_learns_as_in_a_plain_loop_and_the_rest_stands_still(fit, pooling):
    model, (images, targets) = small_model(pooling=pooling), problem()
    config = TTTConfig(start="model", fit=fit, steps=20, learning_rate=1e-4, rank=4, alpha=3.0)
    adapted = adapt(model, images, targets, config=config)
    given = dict(model.named_parameters())
    for index in range(len(images)):
        expected, learnt = naive_fit(model, images[index], targets[index], config)
        state = adapted.state_dict(index)
        for name, weight in state.items():
            assert (weight - expected[name]).abs().max() < 1e-5
            assert torch.equal(weight, given[name]) == (name not in learnt), name


def test_a_model_without_a_convolution_has_no_trigger_to_fit():
    model, (_, targets) = small_model(trigger_source="embedding"), problem()
    with pytest.raises(ValueError, match="expected trigger_source='conv'"):
        adapt(model, None, targets, config=recipe(fit="trigger"), trigger_column=targets)


def test_bfloat16_products_are_close_and_not_the_same():
    model, (images, targets) = wide_model(), wide_problem()
    exact, rough = (
        adapt(model, images, targets, config=TTTConfig(steps=20, learning_rate=1e-3, dtype=dtype)).image_embeds
        for dtype in ("float32", "bfloat16")
    )
    assert not torch.equal(exact, rough) and (F.cosine_similarity(exact, rough) > 0.99).all()


# --- targets ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(6, 6), (3, 3), (4, 5)])
@pytest.mark.parametrize("scales", [None, [1], [1, 2, 3]])
def test_a_mixture_of_targets_is_their_weighted_losses_at_the_centres_of_the_targets_cells(scales, grid):
    options = {} if scales is None else {"local_patch": True, "local_patch_scales": scales}
    model, (images, views) = small_model(**options), problem()
    generator = torch.Generator().manual_seed(3)
    views = torch.stack([views, torch.randn(views.shape, generator=generator)], dim=1)  # (B, 2, F)
    features, rgb = (torch.rand(3, *grid, width, generator=generator) for width in (F_WIDTH, 3))
    weights = torch.tensor([0.25, 2.0])
    targets = TTTTargets(
        image_embeds=views, embed_weights=weights, features=features, rgb=rgb, grid_weight=0.5, rgb_weight=3.0
    )
    adapted = adapt(model, images, targets, config=recipe(learning_rate=1e-3))
    single = APMModel(model.config)
    for index in range(3):
        single.load_state_dict(model.state_dict())
        optimizer = torch.optim.Adam(single.parameters(), lr=1e-3)
        for step in range(5):
            answer = single(images[index : index + 1], grid_coordinates(*grid))
            loss = sum(
                weight * F.mse_loss(answer.pooler_output[0], view)
                for weight, view in zip(weights, views[index], strict=True)
            )
            loss = loss + 0.5 * F.mse_loss(answer.last_hidden_state[0], features[index].flatten(0, 1))
            loss = loss + 3 * F.mse_loss(answer.rgb[0], rgb[index].flatten(0, 1))
            assert adapted.losses[index, step].item() == pytest.approx(loss.item(), rel=1e-4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert not torch.equal(adapted.state_dict(0)["decoder.rgb_head.query.trigger.weight"],
                           model.state_dict()["decoder.rgb_head.query.trigger.weight"])  # fmt: skip


@pytest.mark.parametrize("fit", ["all", "low_rank", "heads"])
def test_levels_are_a_target(fit):
    """What learns beside the head of levels, and what it learns, is held against a plain loop."""
    model, (images, _) = small_model(num_levels=2, level_size=12), problem()
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(3, 4, 5, F_WIDTH, generator=generator)
    levels = torch.randn(3, 2, 4, 5, 12, generator=generator)
    targets = TTTTargets(features=features, levels=levels, level_weight=2.0)
    adapted = adapt(model, images, targets, config=recipe(learning_rate=1e-3, fit=fit, steps=40, num_locations=16))
    plain = adapt(model, images, TTTTargets(features=features), config=recipe(fit=fit))
    head = "decoder.level_head.weight"
    assert torch.equal(plain.state_dict(0)[head], model.state_dict()[head])
    assert not torch.equal(adapted.state_dict(0)[head], model.state_dict()[head])
    answer = adapted.query(grid_coordinates(4, 5)).levels
    before = model(images, grid_coordinates(4, 5)).levels
    wanted = levels.flatten(2, 3).transpose(1, 2)  # (B, N, rows, cols, C) -> (B, L, N, C)
    assert F.mse_loss(answer, wanted) < 0.9 * F.mse_loss(before, wanted)
    if fit == "all":
        single, optimizer = model, torch.optim.Adam(model.parameters(), lr=1e-3)
        few = adapt(model, images[:1], TTTTargets(features=features[:1], levels=levels[:1], level_weight=2.0),
                    config=recipe(learning_rate=1e-3, steps=4))  # fmt: skip
        for step in range(4):
            outputs = single(images[:1], grid_coordinates(4, 5))
            loss = F.mse_loss(outputs.last_hidden_state[0], features[0].flatten(0, 1))
            loss = loss + 2 * F.mse_loss(outputs.levels[0], wanted[0])
            assert few.losses[0, step].item() == pytest.approx(loss.item(), rel=1e-4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with pytest.raises(ValueError, match=r"levels: expected shape \(B, 2, rows, cols, 12\), got \(3, 1, 4, 5, 12\)"):
        adapt(model, images, TTTTargets(levels=levels[:, :1]), config=recipe())


def test_colours_on_another_grid_are_interpolated_to_that_of_the_features():
    model, (images, _) = small_model(), problem()
    generator = torch.Generator().manual_seed(3)
    features, rgb = (torch.rand(3, size, size, width, generator=generator) for size, width in ((3, F_WIDTH), (6, 3)))
    # 6 x 6 cells onto 3 x 3: a cell's centre lies between four of the target's.
    coarse = F.avg_pool2d(rgb.movedim(-1, 1), 2).movedim(1, -1)
    first, second = (
        adapt(model, images, TTTTargets(features=features, rgb=colours), config=recipe()) for colours in (rgb, coarse)
    )
    torch.testing.assert_close(first.losses, second.losses)


def test_features_alone_are_a_target():
    model, (images, _) = small_model(), problem()
    features = torch.randn(3, 3, 3, F_WIDTH, generator=torch.Generator().manual_seed(1))
    adapted = adapt(model, images, TTTTargets(features=features), config=recipe(steps=300, num_locations=4))
    error = F.mse_loss(adapted.query().last_hidden_state, features.flatten(1, 2))
    start = F.mse_loss(model(images).last_hidden_state, features.flatten(1, 2))
    assert error < 0.1 * start


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "expected image_embeds, features, rgb or levels, got none"),
        ({"image_embeds": torch.ones(3)}, r"image_embeds: expected \(2, 3\) dimensions"),
        ({"features": torch.ones(3, 9, F_WIDTH)}, "features: expected"),
        ({"rgb": torch.ones(3, 3, 3, 4)}, r"rgb: expected shape \(B, rows, cols, 3\)"),
        ({"image_embeds": torch.ones(3, 2), "rgb": torch.ones(2, 3, 3, 3)}, "the same number of images everywhere"),
        ({"image_embeds": torch.ones(3, 2, 4), "embed_weights": torch.ones(3)}, r"expected shape \(2,\), got \(3,\)"),
        ({"image_embeds": torch.ones(3, 4), "cls_weight": 0.0}, "cls_weight: expected a positive finite number"),
    ],
)
def test_targets_that_do_not_fit_each_other_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TTTTargets(**fields)


def test_targets_without_a_direction_are_refused_naming_the_images():
    model, (images, targets) = small_model(), problem()
    targets[1] = 0
    with pytest.raises(ValueError, match=r"got zeros in images \[1\]"):
        adapt(model, images, targets, config=recipe())


def test_colours_need_a_model_that_has_an_rgb_head():
    model, (images, _) = APMModel(small_config(use_rgb_head=False)), problem()
    with pytest.raises(ValueError, match="rgb: expected a model with use_rgb_head=True"):
        adapt(model, images, TTTTargets(rgb=torch.rand(3, 3, 3, 3)), config=recipe())


# --- stops --------------------------------------------------------------------------------------------------------


def plateau(losses, threshold, patience):
    best, waited = float("inf"), 0
    for step, loss in enumerate(losses):
        better = loss < best * (1 - threshold)
        best, waited = (loss, 0) if better else (best, waited + 1)
        if waited >= patience:
            return step
    return len(losses)


@pytest.mark.parametrize("num_locations", [None, 8])
def test_an_image_stops_on_its_own_plateau_and_leaves_the_others_as_they_are(num_locations):
    model, (images, targets) = wide_model(pooling="attention"), wide_problem()
    config = TTTConfig(start="model", steps=60, learning_rate=1e-2, num_locations=num_locations)
    whole = adapt(model, images, targets, config=config)
    stopping = dataclasses.replace(config, stop="plateau", stop_threshold=0.2, stop_patience=3)
    stopped = adapt(model, images, targets, config=stopping)
    expected = [plateau(losses.tolist(), 0.2, 3) for losses in whole.losses]
    assert stopped.steps.tolist() == expected and len(set(expected)) > 1 and min(expected) < 60
    for index, steps in enumerate(expected):
        assert_close(stopped.losses[index, : steps + 1], whole.losses[index, : steps + 1])
        assert stopped.losses[index, steps + 1 :].isnan().all()
        one = slice(index, index + 1)
        same = adapt(model, images[one], targets[one], config=dataclasses.replace(config, steps=steps))
        state = stopped.state_dict(index)
        for name, weight in same.state_dict(0).items():
            assert name == "pooler.k_proj.bias" or (weight - state[name]).abs().max() < 1e-3, name
    assert not stopped.diverged.any()


def test_the_cosine_rule_stops_where_the_target_is_reached():
    model, (images, targets) = wide_model(), wide_problem()
    config = TTTConfig(steps=200, learning_rate=1e-3, stop="cosine", stop_threshold=0.9, stop_patience=1)
    adapted = adapt(model, images, targets, config=config)
    assert (adapted.steps < 200).all() and (F.cosine_similarity(adapted.image_embeds, targets) > 0.9 - 1e-5).all()


def test_the_prediction_rule_stops_where_the_class_has_stayed():
    model, (images, targets) = wide_model(), wide_problem()
    texts = torch.randn(7, 128, generator=torch.Generator().manual_seed(2))
    config = TTTConfig(steps=100, learning_rate=1e-3)
    classes = []

    def watch(step):
        classes.append((step.image_embeds @ F.normalize(texts, dim=-1).T).argmax(dim=-1))

    adapt(model, images, targets, config=config, callback=watch)
    stopping = dataclasses.replace(config, stop="stable", stop_patience=6)
    adapted = adapt(model, images, targets, config=stopping, text_embeds=texts)
    for trace, steps in zip(torch.stack(classes, dim=1), adapted.steps, strict=True):
        runs = [step for step in range(6, 100) if len(set(trace[step - 6 : step + 1].tolist())) == 1]
        assert steps == runs[0]
    with pytest.raises(ValueError, match="text_embeds: expected class embeddings"):
        adapt(model, images, targets, config=stopping)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stop": "never"}, "stop: expected one of"),
        ({"stop": "plateau"}, "stop_threshold: expected a number between 0 and 1 for stop='plateau', got None"),
        ({"stop": "cosine", "stop_threshold": 1.5}, "stop_threshold: .* got 1.5"),
        ({"stop_threshold": 0.5}, "stop_threshold: expected None for stop=None, got 0.5"),
        ({"fit": "some"}, "fit: expected one of"),
        ({"dtype": "float16"}, "dtype: expected one of"),
        ({"rank": 0}, "rank: expected a positive number"),
        ({"alpha": 0.0}, "alpha: expected a positive finite number"),
    ],
)
def test_settings_of_the_engine_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TTTConfig(**settings)


# --- watching and memory ------------------------------------------------------------------------------------------


def test_a_callback_sees_every_step_before_its_update():
    model, (images, targets) = wide_model(), wide_problem(3)
    config = TTTConfig(start="model", steps=4, learning_rate=1e-3, num_locations=8)
    seen = []

    def watch(step):
        seen.append((step.step, step.images.tolist(), step.losses, step.state_dict(2)))

    adapted = adapt(model, images, targets, config=config, callback=watch)
    assert [(step, rows) for step, rows, *_ in seen] == [(step, [0, 1, 2]) for step in range(4)]
    assert torch.equal(torch.stack([losses for _, _, losses, _ in seen], dim=1), adapted.losses)
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in seen[0][3].items())
    shorter = adapt(model, images, targets, config=dataclasses.replace(config, steps=3)).state_dict(2)
    assert all(torch.equal(weight, shorter[name]) for name, weight in seen[3][3].items())


def test_images_of_every_group_have_their_own_indices():
    model, (images, targets) = wide_model(), wide_problem(3)
    seen = []
    adapt(
        model, images, targets, config=recipe(steps=2), callback=lambda step: seen.append(step.images.tolist()),
        max_memory=1,
    )  # fmt: skip
    assert seen == [[0], [0], [1], [1], [2], [2]]


def test_models_that_are_not_kept_cannot_be_queried():
    model, (images, targets) = small_model(), problem()
    kept = adapt(model, images, targets, config=recipe())
    freed = adapt(model, images, targets, config=recipe(), keep_models=False)
    assert torch.equal(freed.image_embeds, kept.image_embeds)
    with pytest.raises(ValueError, match="got keep_models=False"):
        freed.query()
    with pytest.raises(ValueError, match="max_memory: expected a positive number of bytes, got 0"):
        adapt(model, images, targets, config=recipe(), max_memory=0)


@pytest.mark.parametrize("fit", FITS)
def test_the_model_and_its_inputs_are_left_as_they_were(fit):
    model, (images, targets) = small_model(pooling="attention"), problem()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    given = images.clone(), targets.clone()
    adapt(model, images, targets, config=recipe(fit=fit)).query()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert torch.equal(images, given[0]) and torch.equal(targets, given[1])
    assert all(weight.grad is None for weight in model.parameters())
