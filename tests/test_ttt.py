"""Adapting B images at once against plain loops that adapt one image with `torch.optim.Adam`.

The loops know nothing of `apm_hf.ttt`. Where locations are drawn at random, a loop tries every subset of the small
grid and takes the one whose loss was reported: there is exactly one, or the test fails.

Legend: B images, L locations, D trigger width, F feature width.
"""

import copy
import dataclasses
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from apm_hf import APMForImageClassification, APMModel
from apm_hf.position_encoding import grid_coordinates
from apm_hf.ttt import TTTConfig, adapt
from naive_apm import COLUMNS, assert_close, small_images, small_model

GRID, FEATURE_SIZE = 3, 16
VARIANTS = {
    "mean": {},
    "attention": {"pooling": "attention"},
    "local patch": {"local_patch": True},
    "trigger from the teacher": {"trigger_source": "embedding"},
}


def paper(**overrides):
    """The paper's recipe from the given weights, which the plain loops can start from too."""
    return dataclasses.replace(TTTConfig.preset("paper"), **{"start": "model", **overrides})


def problem(batch_size=3, *, seed=0):
    """Images `(B, 3, S, S)` and targets `(B, F)`, of order 1."""
    generator = torch.Generator().manual_seed(100 + seed)
    return small_images(batch_size, seed=seed), torch.randn(batch_size, FEATURE_SIZE, generator=generator)


def inputs_of(model, images, targets):
    """The keyword arguments that this model needs for these images."""
    if model.config.trigger_source == "embedding":
        return {"pixel_values": None, "trigger_column": targets.roll(1, dims=1)}
    return {"pixel_values": images, "trigger_column": None}


def run(model, images, targets, config, **options):
    inputs = inputs_of(model, images, targets)
    return adapt(
        model, inputs["pixel_values"], targets, config=config, trigger_column=inputs["trigger_column"], **options
    )


def starting_weights(model, images, targets, config, **options):
    """What `start="random"` draws: the weights after one step too small to be one."""
    still = dataclasses.replace(config, steps=1, learning_rate=1e-30)
    adapted = run(model, images, targets, still, **options)
    return [adapted.state_dict(index) for index in range(len(targets))]


class PlainLoop:
    """One image after the other, on a plain copy of the model: `torch.optim.Adam` and nothing else."""

    def __init__(self, model, *, learning_rate, copies=1):
        self.model, self.learning_rate, self.copies = copy.deepcopy(model), learning_rate, copies

    def fit(self, weights, inputs, target, *, steps):
        """Fit to one image over the whole grid. Embedding `(F,)` and losses."""
        self.model.load_state_dict(weights)
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.learning_rate)
        losses = []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.mse_loss(self.embed(inputs, None), target.expand(self.copies, -1))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            return self.embed(inputs, None)[0], losses

    def embed(self, inputs, coordinates):
        repeated = {
            name: value if value is None else value[None].expand(self.copies, *value.shape)
            for name, value in inputs.items()
        }
        return self.model(
            repeated["pixel_values"], coordinates, trigger_column=repeated["trigger_column"]
        ).pooler_output


def one_of(inputs, index):
    return {name: value if value is None else value[index] for name, value in inputs.items()}


def furthest(first, second):
    """The largest difference between two models' weights.

    The bias of attention's keys adds the same to all scores: its gradient is zero but for rounding, Adam makes whole
    steps of that, and nothing depends on it.
    """
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first if name != "pooler.k_proj.bias")


def assert_equal_to_loop(adapted, loop, starts, inputs, targets, *, steps, moved=1e-2, tolerance=1e-5):
    for index, target in enumerate(targets):
        loop.model.load_state_dict(starts[index])
        with torch.no_grad():
            before = loop.embed(one_of(inputs, index), None)[0]
        embeds, losses = loop.fit(starts[index], one_of(inputs, index), target, steps=steps)
        assert (embeds - before).abs().max() > moved, "the loop did not move, so that any tolerance would do"
        assert (adapted.image_embeds[index] - embeds).abs().max() < tolerance
        assert_close(adapted.losses[index], torch.tensor(losses), tolerance)
        assert furthest(adapted.state_dict(index), loop.model.state_dict()) < tolerance


# --- the fit ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps_are_those_of_adam_on_a_plain_copy(variant):
    model, (images, targets) = small_model(**VARIANTS[variant]), problem()
    adapted = run(model, images, targets, paper())
    assert adapted.losses.shape == (3, 20) and adapted.image_embeds.shape == (3, FEATURE_SIZE)
    loop = PlainLoop(model, learning_rate=1e-4)
    starts = [model.state_dict()] * 3
    assert_equal_to_loop(adapted, loop, starts, inputs_of(model, images, targets), targets, steps=20)


def test_behind_local_columns_residual_blocks_learn_and_norms_stay():
    blocks = {"hidden_sizes": [32], "num_residual_blocks": 1, "pooling": "attention"}
    model, (images, targets) = small_model(**COLUMNS, **blocks), problem()
    adapted = run(model, images, targets, paper())
    loop = PlainLoop(model, learning_rate=1e-4)
    loop.model.trigger.requires_grad_(False)
    for module in loop.model.modules():
        module.requires_grad_(False) if isinstance(module, torch.nn.LayerNorm) else None
    inputs = inputs_of(model, images, targets)
    assert_equal_to_loop(adapted, loop, [model.state_dict()] * 3, inputs, targets, steps=20)
    assert_close(adapted.query().pooler_output, adapted.image_embeds)


@pytest.mark.parametrize("fit", ["last_layers", "low_rank", "output_bias"])
def test_frozen_layers_read_local_columns_too(fit):
    model, (images, targets) = small_model(**COLUMNS, pooling="attention"), problem()
    adapted = run(model, images, targets, paper(fit=fit, learning_rate=1e-2))
    assert (adapted.losses[:, -1] < adapted.losses[:, 0]).all()
    assert_close(adapted.query(grid_coordinates(GRID, GRID)).pooler_output, adapted.query().pooler_output)


@pytest.mark.parametrize("variant", VARIANTS)
def test_random_weights_are_fitted_as_given_ones_are(variant):
    model, (images, targets) = small_model(**VARIANTS[variant]), problem()
    config = TTTConfig.preset("paper", learning_rate=1e-3, seed=7)
    starts = starting_weights(model, images, targets, config)
    adapted = run(model, images, targets, config)
    loop = PlainLoop(model, learning_rate=1e-3)
    # Rounding is passed on by Adam, whose steps are ten times as long here.
    inputs = inputs_of(model, images, targets)
    assert_equal_to_loop(adapted, loop, starts, inputs, targets, steps=20, tolerance=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seeds", [None, [3, 1, 3]], ids=["one seed", "a seed an image"])
def test_locations_drawn_are_pooled_and_those_of_the_last_step_are_in_the_embedding(variant, seeds):
    # A 2 x 2 grid's indices are exact: where a code is 0 but for rounding, Adam makes whole steps of it.
    model, (_, targets), images = small_model(image_size=8, **VARIANTS[variant]), problem(), small_images(3, size=8)
    config = paper(num_locations=2, learning_rate=1e-2, steps=8)
    adapted = run(model, images, targets, config, seeds=seeds)
    inputs = inputs_of(model, images, targets)
    subsets = list(itertools.combinations(range(4), 2))
    everywhere = grid_coordinates(2, 2)[torch.tensor(subsets)]  # (6, 2, 2): every pair of locations
    found = []
    for index, target in enumerate(targets):
        loop, one = PlainLoop(model, learning_rate=1e-2, copies=len(subsets)), one_of(inputs, index)
        optimizer = torch.optim.Adam(loop.model.parameters(), lr=1e-2)
        chosen = []
        for step in range(config.steps):
            losses = (loop.embed(one, everywhere) - target).square().mean(dim=1)  # (6,)
            reported = adapted.losses[index, step]
            chosen.append((losses - reported).abs().argmin().item())
            assert (losses[chosen[-1]] - reported).abs() < 1e-5 * losses.max(), f"step {step}: no two locations fit"
            optimizer.zero_grad()
            losses[chosen[-1]].backward()
            optimizer.step()
        with torch.no_grad():
            errors = (loop.embed(one, everywhere) - adapted.image_embeds[index]).abs().amax(dim=1)
        assert errors.argmin() == chosen[-1] and errors.min() < 1e-4
        assert errors.sort().values[1] > 1e-3, "other locations would do as well"
        found.append(chosen)
    assert len(set(found[0])) > 2, "the locations are not drawn afresh"
    if seeds is None:
        assert found[0] == found[1] == found[2]
    else:
        assert found[0] == found[2] != found[1]


def test_all_locations_drawn_are_all_locations():
    model, (images, targets) = small_model(), problem()
    everywhere, drawn = (run(model, images, targets, paper(num_locations=n)) for n in (None, GRID**2 + 1))
    assert_close(drawn.image_embeds, everywhere.image_embeds)
    assert_close(drawn.losses, everywhere.losses)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("settings", "options"),
    [
        ({}, {}),
        ({"start": "random", "seed": 4}, {}),
        ({"num_locations": 4, "start": "random"}, {}),
        ({"num_locations": 4, "start": "random"}, {"seeds": [5, 6, 5]}),
        ({"num_locations": 4}, {"seeds": [5, 6, 7]}),
    ],
    ids=["given", "random", "locations", "seeds", "seeds, given"],
)
def test_b_adaptations_are_b_single_ones(variant, settings, options):
    model, (images, targets) = small_model(**VARIANTS[variant]), problem()
    config = paper(**{"steps": 10, "learning_rate": 1e-3, **settings})
    together = run(model, images, targets, config, **options)
    inputs = inputs_of(model, images, targets)
    for index in range(3):
        one = {name: value if value is None else value[index : index + 1] for name, value in inputs.items()}
        single_options = {"seeds": options["seeds"][index : index + 1]} if options else {}
        single = adapt(
            model,
            one["pixel_values"],
            targets[index : index + 1],
            config=config,
            trigger_column=one["trigger_column"],
            **single_options,
        )
        assert_close(together.image_embeds[index], single.image_embeds[0])
        assert_close(together.losses[index], single.losses[0])
        assert furthest(single.state_dict(0), together.state_dict(index)) < 1e-5


def test_images_have_their_own_weights():
    model, (images, targets) = small_model(), problem()
    adapted = run(model, images, targets, paper(learning_rate=1e-2))
    name = "decoder.feature_head.weight"
    weights = [adapted.state_dict(index)[name] for index in range(3)]
    assert min((a - b).abs().max() for a, b in itertools.combinations(weights, 2)) > 1e-2
    expected = weights[0].clone()
    weights[0].zero_()
    assert torch.equal(adapted.state_dict(0)[name], expected), "a state dict is a copy"


def test_the_fit_approaches_the_target():
    model, (images, targets) = small_model(), problem()
    adapted = run(model, images, targets, TTTConfig(num_locations=4, learning_rate=1e-2, steps=80))
    assert (adapted.losses[:, -5:].mean(dim=1) < 0.05 * adapted.losses[:, 0]).all()
    assert (F.cosine_similarity(adapted.image_embeds, targets) > 0.98).all()
    assert not adapted.diverged.any()


# --- seeds and weights --------------------------------------------------------------------------------------------


def test_one_seed_serves_all_images_and_decides_the_weights():
    model, (images, targets) = small_model(), problem()
    first, again, other = (starting_weights(model, images, targets, TTTConfig(seed=seed))[0] for seed in (0, 0, 1))
    starts = starting_weights(model, images, targets, TTTConfig(seed=0))
    assert all(furthest(start, first) < 1e-20 for start in [again, *starts])
    assert all((weight - other[name]).abs().max() > 0.1 for name, weight in first.items() if "weight" in name)


def test_seeds_are_set_for_each_image():
    model, (images, targets) = small_model(), problem()
    by_seed = {s: starting_weights(model, images, targets, TTTConfig(seed=s))[0] for s in (11, 12)}
    for seeds in ([11, 12, 11], torch.tensor([11, 12, 11])):
        starts = starting_weights(model, images, targets, TTTConfig(), seeds=seeds)
        for start, seed in zip(starts, [11, 12, 11], strict=True):
            assert furthest(start, by_seed[seed]) < 1e-20
    assert furthest(by_seed[11], by_seed[12]) > 0.1


def test_random_weights_are_those_of_a_fresh_model_by_their_spread():
    model = small_model(initializer_range=0.07, hidden_sizes=[128, 96], pooling="attention")
    images, targets = problem(1)
    weights = starting_weights(model, images, targets, TTTConfig())[0]
    assert weights.keys() == model.state_dict().keys()
    for name, weight in weights.items():
        if name.endswith(".bias"):
            assert weight.abs().max() < 1e-20
        else:
            spread = 0.07 / math.sqrt(2 * weight.numel())
            assert abs(weight.std().item() - 0.07) < 5 * spread and abs(weight.mean().item()) < 8 * spread, name


def test_a_generator_supplies_the_seed():
    model, (images, targets) = small_model(), problem()
    config = TTTConfig(num_locations=3, steps=3, seed=9)

    def generated(seed):
        return run(model, images, targets, config, generator=torch.Generator().manual_seed(seed)).image_embeds

    assert torch.equal(generated(1), generated(1))
    assert (generated(1) - generated(2)).abs().max() > 1e-2
    assert (generated(1) - run(model, images, targets, config).image_embeds).abs().max() > 1e-2
    generator = torch.Generator().manual_seed(1)
    first, second = (run(model, images, targets, config, generator=generator).image_embeds for _ in range(2))
    assert (first - second).abs().max() > 1e-2, "two calls with one generator differ"


def test_the_argument_and_the_global_generator_are_left_as_they_were():
    model, (images, targets) = small_model(pooling="attention"), problem()
    model.train()
    model.decoder.feature_head.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(0)
    expected = torch.rand(1)
    given = images.clone(), targets.clone()
    for start in ("model", "random"):
        torch.manual_seed(0)
        run(model, images, targets, paper(start=start, learning_rate=0.1, num_locations=3))
        assert torch.rand(1) == expected
        assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
        assert [parameter.requires_grad for parameter in model.parameters()] == flags
        assert all(parameter.grad is None for parameter in model.parameters()) and model.training
    assert torch.equal(images, given[0]) and torch.equal(targets, given[1])


def test_frozen_weights_of_the_argument_are_fitted_all_the_same():
    model, (images, targets) = small_model(), problem()
    expected = run(model, images, targets, paper(learning_rate=1e-2))
    model.requires_grad_(False)
    assert torch.equal(run(model, images, targets, paper(learning_rate=1e-2)).image_embeds, expected.image_embeds)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_adapting_works_where_gradients_are_switched_off(context):
    model, (images, targets) = small_model(), problem()
    expected = run(model, images, targets, paper(learning_rate=1e-2, steps=3))
    with context():
        adapted = run(model, images.clone(), targets.clone(), paper(learning_rate=1e-2, steps=3))
    assert_close(adapted.image_embeds, expected.image_embeds)


def test_results_are_float32_and_need_no_gradient_whatever_the_inputs():
    model, (images, targets) = small_model(), problem()
    expected = run(model, images, targets, paper())
    adapted = run(model, images.double(), targets.double().requires_grad_(), paper())
    assert adapted.image_embeds.dtype == adapted.losses.dtype == torch.float32
    assert torch.equal(adapted.image_embeds, expected.image_embeds)
    results = [
        adapted.image_embeds,
        adapted.losses,
        adapted.query().last_hidden_state,
        *adapted.state_dict(0).values(),
    ]
    assert not any(tensor.requires_grad for tensor in results)


def test_a_model_in_half_precision_is_fitted_in_float32():
    model, (images, targets) = small_model(pooling="attention", local_patch=True).bfloat16(), problem()
    expected = run(copy.deepcopy(model).float(), images, targets, paper())
    adapted = run(model, images, targets, paper())
    assert_close(adapted.image_embeds, expected.image_embeds)
    assert_close(adapted.query().rgb, expected.query().rgb)
    assert {weight.dtype for weight in adapted.state_dict(0).values()} == {torch.float32}
    assert model.dtype == torch.bfloat16


def test_a_model_with_a_head_is_adapted_by_the_model_in_it():
    bare, (images, targets) = small_model(use_rgb_head=False), problem()
    model = APMForImageClassification(bare.config)
    model.apm.load_state_dict(bare.state_dict())
    expected = run(bare, images, targets, paper())
    adapted = adapt(model, images, targets, config=paper())
    assert torch.equal(adapted.image_embeds, expected.image_embeds)
    bare.load_state_dict(adapted.state_dict(1))


# --- queries ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("places", ["grid", "shared", "own"])
def test_every_model_answers_about_its_own_image(variant, places):
    model, (images, targets) = small_model(**VARIANTS[variant]), problem()
    adapted = run(model, images, targets, paper(learning_rate=1e-2, num_locations=4))
    generator = torch.Generator().manual_seed(0)
    coordinates = {
        "grid": None,
        "shared": torch.rand(5, 2, generator=generator) * 2 - 1,
        "own": torch.rand(3, 5, 2, generator=generator) * 2 - 1,
    }[places]
    answers = adapted.query(coordinates)
    num_locations = GRID**2 if coordinates is None else 5
    assert answers.last_hidden_state.shape == (3, num_locations, FEATURE_SIZE)
    inputs = inputs_of(model, images, targets)
    for index in range(3):
        single = APMModel(model.config).eval()
        single.load_state_dict(adapted.state_dict(index))
        one = {name: value if value is None else value[index : index + 1] for name, value in inputs.items()}
        where = coordinates[index] if places == "own" else coordinates
        with torch.no_grad():
            expected = single(one["pixel_values"], where, trigger_column=one["trigger_column"])
        for name in ("last_hidden_state", "pooler_output", "rgb", "trigger_column"):
            assert_close(answers[name][index], expected[name][0])


def test_answers_do_not_depend_on_the_chunks():
    model, (images, targets) = small_model(local_patch=True), problem()
    adapted = run(model, images, targets, paper(learning_rate=1e-2))
    expected = adapted.query()
    for chunk_size in (1, 4, 100):
        for name, value in adapted.query(chunk_size=chunk_size).items():
            assert_close(value, expected[name])


@pytest.mark.parametrize("variant", VARIANTS)
def test_some_of_the_models_answer_as_among_all(variant):
    model, (images, targets) = small_model(**VARIANTS[variant]), problem()
    adapted = run(model, images, targets, paper(learning_rate=1e-2))
    answers, some = adapted.query(), adapted[1:]
    for name, value in some.query().items():
        assert torch.equal(value, answers[name][1:])
    for name in ("image_embeds", "losses", "steps", "diverged"):
        assert torch.equal(getattr(some, name), getattr(adapted, name)[1:])
    forgotten = adapt(model, **inputs_of(model, images, targets), targets=targets, config=paper(), keep_models=False)
    assert len(forgotten[:1].losses) == 1


def test_the_embedding_is_the_pooled_answer_where_all_locations_are_pooled():
    model, (images, targets) = small_model(pooling="attention"), problem()
    adapted = run(model, images, targets, paper(learning_rate=1e-2))
    assert_close(adapted.query().pooler_output, adapted.image_embeds)


@pytest.mark.parametrize("shape", [(2, 5, 2), (5, 3), (5,), (0, 2)])
def test_coordinates_of_another_shape_are_refused(shape):
    model, (images, targets) = small_model(), problem()
    adapted = run(model, images, targets, paper(steps=1))
    with pytest.raises(ValueError, match=r"coordinates: expected shape \(L, 2\)"):
        adapted.query(torch.zeros(shape))


# --- presets and errors -------------------------------------------------------------------------------------------


def test_presets_are_the_published_recipes():
    recipe, fast = (TTTConfig.preset(name) for name in ("paper", "fast"))
    assert (recipe.steps, recipe.learning_rate, recipe.num_locations, recipe.start) == (20, 1e-4, None, "random")
    assert recipe.fit == "all" and recipe.stop is None
    assert fast.num_locations is not None and fast.num_locations < 144 and fast.fit == "low_rank"
    assert TTTConfig.preset("fast", steps=3, seed=8) == dataclasses.replace(fast, steps=3, seed=8)
    assert TTTConfig() == recipe


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"\['fast', 'paper'\], got 'slow'"):
        TTTConfig.preset("slow")


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TTTConfig().steps = 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps: expected a positive number, got 0"),
        ({"num_locations": 0}, "num_locations: expected a positive number"),
        ({"learning_rate": 0.0}, "learning_rate: expected a positive finite number"),
        ({"learning_rate": math.nan}, "learning_rate: expected a positive finite number, got nan"),
        ({"learning_rate": math.inf}, "learning_rate: expected a positive finite number"),
        ({"start": "teacher"}, r"start: expected one of \['random', 'model'\], got 'teacher'"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        TTTConfig(**settings)


def test_inputs_that_are_not_finite_are_refused_naming_the_images():
    model, (images, targets) = small_model(), problem(4)
    for value in (math.nan, math.inf):
        spoilt = images.clone()
        spoilt[1, 0, 3, 3] = spoilt[3, 2, 0, 0] = value
        with pytest.raises(ValueError, match=r"pixel_values.*NaN or infinity in images \[1, 3\]"):
            adapt(model, spoilt, targets, config=TTTConfig(steps=1))
        spoilt = targets.clone()
        spoilt[2, 5] = value
        with pytest.raises(ValueError, match=r"targets.*NaN or infinity in images \[2\]"):
            adapt(model, images, spoilt, config=TTTConfig(steps=1))


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"targets": torch.zeros(2, 15)}, {}, r"targets: expected shape \(B, 16\) with B >= 1, got \(2, 15\)"),
        ({"targets": torch.zeros(16)}, {}, r"targets: expected shape \(B, 16\)"),
        ({"targets": torch.zeros(0, 16)}, {}, "B >= 1"),
        ({"targets": torch.zeros(0, 16), "images": torch.zeros(0, 3, 12, 12)}, {}, "B >= 1"),
        ({"targets": torch.zeros(3, 16)}, {}, "pixel_values: expected 3 images, as many as targets, got 2"),
        ({"images": torch.zeros(2, 3, 13, 12)}, {}, r"pixel_values: expected shape \(B, 3, 12, 12\)"),
        ({"images": torch.zeros(2, 1, 12, 12)}, {}, r"pixel_values: expected shape \(B, 3, 12, 12\)"),
        ({"images": None}, {}, "expected pixel_values or trigger_column"),
        ({}, {"trigger_column": torch.zeros(2, 5)}, r"trigger_column: expected shape \(B, 18\)"),
        ({}, {"trigger_column": torch.full((2, 18), math.nan)}, r"trigger_column.*NaN or infinity in images \[0, 1\]"),
        ({}, {"trigger_column": torch.zeros(1, 18)}, "trigger_column: expected 2 images"),
        ({}, {"seeds": [1]}, "seeds: expected 2, one per image, got 1"),
        ({}, {"seeds": [1, 2], "generator": torch.Generator()}, "expected one of them, got both"),
        ({"model": torch.nn.Linear(2, 2)}, {}, "model: expected an APMModel or a model that contains one, got Linear"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, options, message):
    given = {"model": small_model(), "images": small_images(2), "targets": torch.zeros(2, 16)} | changes
    options = {"config": TTTConfig(steps=1)} | options
    with pytest.raises(ValueError, match=message):
        adapt(given["model"], given["images"], given["targets"], **options)


def test_a_model_fed_by_its_teacher_needs_a_trigger_column():
    images, targets = problem(2)
    with pytest.raises(ValueError, match="trigger_column"):
        adapt(small_model(trigger_source="embedding"), images, targets, config=TTTConfig(steps=1))


@pytest.mark.parametrize("num_locations", [None, 4])
def test_an_image_that_diverges_leaves_the_others_as_they_are(num_locations, caplog):
    model, (images, targets) = small_model(), problem(4)
    config = TTTConfig(learning_rate=1e-2, num_locations=num_locations)
    expected = run(model, images, targets, config)
    targets = targets.clone()
    targets[1] = 1e25  # finite, its square is not
    adapted = run(model, images, targets, config)
    assert adapted.diverged.tolist() == [False, True, False, False] and not expected.diverged.any()
    assert "diverged for images [1]" in caplog.text
    others = [0, 2, 3]
    assert_close(adapted.image_embeds[others], expected.image_embeds[others])
    assert_close(adapted.losses[others], expected.losses[others])
    assert adapted.query().last_hidden_state[others].isfinite().all()
    for index in others:
        assert all(weight.isfinite().all() for weight in adapted.state_dict(index).values())
