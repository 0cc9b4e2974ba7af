"""APMModel: held against the naive witness, and the properties a model that looks location by location must have."""

import copy
import itertools
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from apm_hf import APMConfig, APMModel, APMModelOutput
from apm_hf import modeling_apm as module_under_test
from apm_hf.position_encoding import grid_coordinates
from naive_apm import (
    COLUMNS,
    assert_close,
    assert_same_answers,
    naive_apm,
    naive_columns,
    naive_fold,
    naive_grid_coordinates,
    random_coordinates,
    randomise,
    small_config,
    small_images,
    small_model,
)

GRID = grid_coordinates(3, 3)
# None is the full grid of 3 x 3 cells; two images.
COORDINATES = {
    "grid": None,
    "grid coordinates": GRID,
    "off-grid": random_coordinates(5),
    "per image": random_coordinates(2, 4),
    "outside": random_coordinates(5, reach=2.0),
    "one": random_coordinates(1),
}
VARIANTS = {
    f"{source}-{'patch' if local_patch else 'plain'}-{pooling}": {
        "trigger_source": source,
        "local_patch": local_patch,
        "pooling": pooling,
    }
    for source, local_patch, pooling in itertools.product(("conv", "embedding"), (False, True), ("mean", "attention"))
}
VARIANTS["columns-patch-attention"] = {**COLUMNS, "local_patch": True, "pooling": "attention"}
# The pooling comes after the query: two pairs cover every path through both.
QUERY_VARIANTS = {
    name: VARIANTS[name] for name in ("conv-plain-mean", "conv-patch-attention", "columns-patch-attention")
}

each_variant = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
each_query_variant = pytest.mark.parametrize("fields", QUERY_VARIANTS.values(), ids=QUERY_VARIANTS)
each_place = pytest.mark.parametrize("coordinates", COORDINATES.values(), ids=COORDINATES)


def inputs_for(model: APMModel, batch_size: int = 2) -> dict[str, Tensor]:
    """What `forward` needs: pixels or a trigger column, or both."""
    inputs = {}
    if model.config.folds_pixels or model.config.local_patch:
        inputs["pixel_values"] = small_images(batch_size)
    if model.config.trigger_source == "embedding":
        generator = torch.Generator().manual_seed(3)
        inputs["trigger_column"] = torch.randn(batch_size, model.config.trigger_width, generator=generator)
    return inputs


def weighted_sum(outputs: APMModelOutput) -> Tensor:
    """A loss in which every answer counts, each with another weight."""
    loss = torch.zeros((), dtype=outputs.last_hidden_state.dtype)
    for name in ("last_hidden_state", "pooler_output", "rgb"):
        if outputs[name] is not None:
            weights = torch.randn(outputs[name].shape, generator=torch.Generator().manual_seed(4))
            loss = loss + (outputs[name] * weights.to(loss.dtype)).sum()
    return loss


# ---- the witness


@each_variant
@each_place
def test_answers_and_gradients_equal_the_naive_form(fields, coordinates):
    model = small_model(**fields)
    inputs = {name: value.requires_grad_() for name, value in inputs_for(model).items()}
    outputs = model(**inputs, coordinates=coordinates, output_hidden_states=True)
    weighted_sum(outputs).backward()

    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    naive_inputs = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    naive_coordinates = None if coordinates is None else coordinates.double()
    expected = naive_apm(model.config, weights, **naive_inputs, coordinates=naive_coordinates)
    weighted_sum(expected).backward()

    assert_same_answers(outputs, expected)
    for name, parameter in model.named_parameters():
        if name == "pooler.k_proj.bias":  # A constant on every score: the softmax does not see it.
            assert weights[name].grad.abs().max() < 1e-10 and parameter.grad.abs().max() < 1e-3
        elif name.startswith(("pooler.q", "pooler.k")) and outputs.last_hidden_state.shape[1] == 1:
            assert parameter.grad.abs().max() < 1e-3  # One location: nothing to choose between.
        else:
            assert_close(parameter.grad, weights[name].grad, 5e-5)
    for name, value in inputs.items():
        assert_close(value.grad, naive_inputs[name].grad, 5e-5)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_act": "gelu"},
        {"trigger_channels": 1, "num_channels": 1, "local_patch": True},
        {"hidden_sizes": [20], "rgb_hidden_sizes": []},
        {"hidden_sizes": [20, 12, 8, 28], "rgb_hidden_sizes": [6]},
        {"patch_size": 3, "local_patch": True},
        {"patch_size": 12, "local_patch": True},
        {"use_rgb_head": False},
        {"feature_size": 10, "position_size": 4},
    ],
    ids=str,
)
def test_other_architectures_equal_the_naive_form(fields):
    model = small_model(**fields)
    pixel_values = small_images()[:, : model.config.num_channels]
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    for coordinates in (None, random_coordinates(3)):
        outputs = model(pixel_values, coordinates, output_hidden_states=True)
        expected = naive_apm(model.config, weights, pixel_values.double(), coordinates)
        assert_same_answers(outputs, expected)
        assert outputs.rgb is None or outputs.rgb.shape[-1] == 3  # whatever the image's channels


def test_locations_may_be_learned():
    model = small_model(local_patch=True, pooling="attention")
    coordinates = random_coordinates(2, 4).requires_grad_()
    weighted_sum(model(small_images(), coordinates)).backward()
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    expected = coordinates.detach().double().requires_grad_()
    weighted_sum(naive_apm(model.config, weights, small_images().double(), expected)).backward()
    assert_close(coordinates.grad, expected.grad, 1e-4)


# ---- fold and query


def test_fold_flattens_one_trigger_channel_after_the_other():
    model = small_model(trigger_channels=2)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    assert model.fold(small_images()).shape == (2, 18)
    assert_close(model.fold(small_images()), naive_fold(model.config, weights, small_images()))


@each_query_variant
@each_place
def test_forward_is_fold_then_query(fields, coordinates):
    model = small_model(**fields)
    trigger_column = model.fold(small_images())
    pixels = {"pixel_values": small_images()} if fields["local_patch"] else {}
    answer = model.query(trigger_column, coordinates, **pixels)
    assert isinstance(answer, APMModelOutput)
    assert_same_answers(answer, model(small_images(), coordinates), 1e-6)


@each_variant
def test_output_names_and_shapes(fields):
    model = small_model(**fields)
    inputs = inputs_for(model)
    outputs = model(**inputs, coordinates=random_coordinates(5), output_hidden_states=True)
    assert isinstance(outputs, APMModelOutput)
    width = {"conv": (18,), "embedding": (16,), "columns": (3, 3, 16)}[fields["trigger_source"]]
    assert {name: tuple(v.shape) for name, v in outputs.items() if name != "hidden_states"} == {
        "last_hidden_state": (2, 5, 16),
        "pooler_output": (2, 16),
        "rgb": (2, 5, 3),
        "trigger_column": (2, *width),
    }
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 5, 32), (2, 5, 24)]


def test_trigger_column_is_returned_as_folded_or_given():
    model = small_model()
    trigger_column = model.fold(small_images())
    torch.testing.assert_close(model(small_images()).trigger_column, trigger_column, rtol=0, atol=0)
    assert model.query(trigger_column).trigger_column is trigger_column
    model = small_model(trigger_source="embedding", trigger_size=20)
    given = torch.randn(3, 20)
    assert model(trigger_column=given).trigger_column is given


def test_embedding_model_has_nothing_to_fold():
    model = small_model(trigger_source="embedding")
    assert not any(name.startswith("trigger") for name, _ in model.named_parameters())
    with pytest.raises(ValueError, match="trigger_column"):
        model.fold(small_images())


def test_trigger_column_takes_the_place_of_the_pixels():
    model = small_model()
    outputs = model(small_images(seed=9), trigger_column=model.fold(small_images()))
    assert_same_answers(outputs, model(small_images()), 1e-6)


# ---- asking never depends on company


@each_query_variant
def test_grid_equals_its_coordinates(fields):
    model = small_model(**fields)
    expected = model(small_images(), output_hidden_states=True)
    for coordinates in (GRID, naive_grid_coordinates(3, 3), GRID.expand(2, -1, -1)):
        assert_same_answers(model(small_images(), coordinates, output_hidden_states=True), expected)


@each_query_variant
@each_place
def test_order_does_not_matter(fields, coordinates):
    model = small_model(**fields)
    places = GRID if coordinates is None else coordinates
    order = torch.randperm(places.shape[-2], generator=torch.Generator().manual_seed(0))
    straight = model(small_images(), coordinates)
    shuffled = model(small_images(), places[..., order, :])
    assert_close(shuffled.last_hidden_state, straight.last_hidden_state[:, order])
    assert_close(shuffled.rgb, straight.rgb[:, order])
    assert_close(shuffled.pooler_output, straight.pooler_output)


@each_query_variant
@each_place
def test_subset_gives_the_same_answers(fields, coordinates):
    model = small_model(**fields)
    places = GRID if coordinates is None else coordinates
    everything = model(small_images(), coordinates)
    for subset in ([0], [places.shape[-2] - 1, 0]):
        some = model(small_images(), places[..., subset, :])
        assert_close(some.last_hidden_state, everything.last_hidden_state[:, subset])
        assert_close(some.rgb, everything.rgb[:, subset])


@each_query_variant
@each_place
def test_chunks_do_not_matter(fields, coordinates):
    model = small_model(**fields)
    expected = model(small_images(), coordinates, output_hidden_states=True)
    pixels = {"pixel_values": small_images()} if fields["local_patch"] else {}
    for chunk_size in (1, 2, 4, 9, 100):
        in_chunks = model(small_images(), coordinates, chunk_size=chunk_size, output_hidden_states=True)
        assert_same_answers(in_chunks, expected)
        queried = model.query(expected.trigger_column, coordinates, chunk_size=chunk_size, **pixels)
        assert_close(queried.last_hidden_state, expected.last_hidden_state)


def count_calls(module: nn.Module) -> list[Tensor]:
    """One entry for every time `module` runs from now on: its output."""
    outputs: list[Tensor] = []
    module.register_forward_hook(lambda module, args, output: outputs.append(output))
    return outputs


def test_chunk_size_bounds_the_locations_answered_at_a_time():
    model = small_model()
    outputs = count_calls(model.decoder.feature_head)
    model(small_images(), random_coordinates(9), chunk_size=4)
    assert [output.shape[1] for output in outputs] == [4, 4, 1]
    outputs.clear()
    model(small_images(), chunk_size=7)  # whole rows of the grid
    assert [output.shape[1] for output in outputs] == [6, 3]


@each_query_variant
@each_place
def test_without_gradients_large_questions_are_answered_in_chunks(fields, coordinates, monkeypatch):
    model = small_model(**fields)
    expected = model(small_images(), coordinates, output_hidden_states=True)
    monkeypatch.setattr(module_under_test, "CHUNK_ELEMENTS", 2 * 2 * 32)
    outputs = count_calls(model.decoder.feature_head)
    with torch.no_grad():
        assert_same_answers(model(small_images(), coordinates, output_hidden_states=True), expected)
    assert len(outputs) > 1 or expected.last_hidden_state.shape[1] == 1


@each_query_variant
@each_place
def test_batch_equals_its_images_one_by_one(fields, coordinates):
    model = small_model(**fields)
    together = model(small_images(), coordinates)
    for image in range(2):
        places = coordinates if coordinates is None or coordinates.ndim == 2 else coordinates[image : image + 1]
        alone = model(small_images()[image : image + 1], places)
        for name, value in alone.items():
            assert_close(value[0], together[name][image])


@each_query_variant
def test_shared_coordinates_equal_the_same_for_each_image(fields):
    model = small_model(**fields)
    places = random_coordinates(5)
    assert_same_answers(model(small_images(), places.expand(2, -1, -1)), model(small_images(), places))


@each_query_variant
def test_queries_do_not_see_each_other(fields):
    model = small_model(**fields)
    coordinates = random_coordinates(2, 4).requires_grad_()
    outputs = model(small_images(), coordinates)
    for answers in (outputs.last_hidden_state, outputs.rgb + outputs.last_hidden_state.sum()):
        (gradient,) = torch.autograd.grad(outputs.last_hidden_state[1, 2].sum(), coordinates, retain_graph=True)
        seen = gradient.abs().sum(-1) > 0  # (B, L)
        assert seen.nonzero().tolist() == [[1, 2]], answers.shape


def test_images_do_not_see_each_other():
    model = small_model(local_patch=True, pooling="attention")
    pixel_values = small_images(3).requires_grad_()
    outputs = model(pixel_values)
    loss = outputs.last_hidden_state[1].sum() + outputs.pooler_output[1].sum() + outputs.rgb[1].sum()
    (gradient,) = torch.autograd.grad(loss, pixel_values)
    assert (gradient.abs().sum((1, 2, 3)) > 0).tolist() == [False, True, False]


def test_local_patch_on_the_grid_is_the_cells_own():
    model = small_model(trigger_source="embedding", local_patch=True)
    pixel_values = small_images(1).requires_grad_()
    answers = model(pixel_values, trigger_column=torch.randn(1, 16)).last_hidden_state
    (gradient,) = torch.autograd.grad(answers[0, 5].sum(), pixel_values)  # row 1, column 2
    seen = (gradient[0].abs().sum(0) > 0).nonzero()
    assert (seen.amin(0).tolist(), seen.amax(0).tolist()) == ([4, 8], [7, 11])


# ---- the three exact facts


def test_first_layer_costs_rows_plus_columns_not_cells():
    config = APMConfig.preset(
        "tiny", image_size=128, patch_size=8, position_size=256, hidden_sizes=[64], use_rgb_head=False
    )
    model = randomise(APMModel(config))
    pixel_values = small_images(size=128)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(pixel_values)
    fold = 2 * 2 * 256 * (3 * 8 * 8)
    first_layer = 2 * 64 * (2 * 256) + 2 * 64 * 128 * (16 + 16)
    feature_head = 2 * (2 * 256) * 64 * config.feature_size
    assert counter.get_total_flops() <= 1.01 * (fold + first_layer + feature_head)


@each_variant
def test_pooled_features_are_the_pooler_output(fields):
    model = small_model(**fields)
    inputs = inputs_for(model)
    for coordinates in COORDINATES.values():
        expected = model(**inputs, coordinates=coordinates).pooler_output
        assert_close(model.pooled_features(**inputs, coordinates=coordinates), expected)


# ---- heads and layers


def test_mean_pooling_is_the_mean_of_the_locations_asked_for():
    model = small_model()
    outputs = model(small_images(), random_coordinates(2, 4))
    assert_close(outputs.pooler_output, outputs.last_hidden_state.sum(1) / 4)


def test_attention_pooling_is_told_where_the_features_lie():
    model = small_model(pooling="attention")
    features = torch.randn(2, 5, 16)

    def pooled(seed: int) -> Tensor:
        rows, columns = random_coordinates(1, 5, seed=seed, reach=3).split(1, dim=-1)
        return model.pooler(features, rows, columns)[0]

    assert (pooled(2) - pooled(8)).abs().max() > 0.01


def test_colours_are_never_negative():
    rgb = small_model()(small_images(8), random_coordinates(20)).rgb
    assert rgb.min() == 0
    assert (rgb > 0.1).any()


def test_without_rgb_head_there_are_no_colours():
    model = small_model(use_rgb_head=False)
    for chunk_size in (None, 2):
        outputs = model(small_images(), chunk_size=chunk_size)
        assert outputs.rgb is None
        assert list(outputs) == ["last_hidden_state", "pooler_output", "trigger_column"]
    assert not any("rgb" in name for name, _ in model.named_parameters())


def test_hidden_states_are_those_of_every_layer():
    model = small_model()
    assert model(small_images()).hidden_states is None
    outputs = model(small_images(), output_hidden_states=True)
    assert isinstance(outputs.hidden_states, tuple)
    assert_close(model.decoder.feature_head(outputs.hidden_states[-1]), outputs.last_hidden_state)
    assert_close(model.decoder.layers[0](outputs.hidden_states[0]).relu(), outputs.hidden_states[1])


def test_configuration_may_ask_for_hidden_states():
    model = small_model(output_hidden_states=True)
    assert len(model(small_images()).hidden_states) == 2
    assert model(small_images(), output_hidden_states=False).hidden_states is None


def test_options_of_transformers_that_mean_nothing_here_are_accepted():
    model = small_model()
    options = {"output_attentions": True, "interpolate_pos_encoding": True}
    assert_same_answers(model(small_images(), **options), model(small_images()), 1e-6)
    assert small_model(tie_word_embeddings=False, output_attentions=True)(small_images()).rgb is not None


def test_return_dict_false_gives_the_same_answers_in_a_tuple():
    model = small_model()
    expected = model(small_images(), output_hidden_states=True)
    answers = model(small_images(), output_hidden_states=True, return_dict=False)
    assert type(answers) is tuple
    assert_same_answers(APMModelOutput(*answers), expected, 1e-6)
    assert len(small_model(use_rgb_head=False)(small_images(), return_dict=False)) == 3


def test_any_real_numbers_are_coordinates():
    model = small_model(local_patch=True)
    places = random_coordinates(5)
    expected = model(small_images(), places)
    assert_same_answers(model(small_images(), places.double()), expected)
    coarse = places.bfloat16()
    assert_same_answers(model(small_images(), coarse), model(small_images(), coarse.float()), 1e-6)
    whole = model(small_images(), torch.tensor([[0, 1], [-1, 0]]))
    assert_same_answers(whole, model(small_images(), torch.tensor([[0.0, 1.0], [-1.0, 0.0]])), 1e-6)


@pytest.mark.parametrize("chunk_size", [None, 4])
@pytest.mark.parametrize("gradients", [True, False])
def test_no_images_get_no_answers(gradients, chunk_size):
    with torch.set_grad_enabled(gradients):
        outputs = small_model()(small_images(0), chunk_size=chunk_size)
    assert outputs.last_hidden_state.shape == (0, 9, 16)
    assert outputs.pooler_output.shape == (0, 16)


# ---- errors


@pytest.mark.parametrize(
    ("fields", "call", "message"),
    [
        ({}, lambda m: m(), "expected pixel_values or trigger_column"),
        ({}, lambda m: m.pooled_features(), "expected pixel_values or trigger_column"),
        ({}, lambda m: m(torch.rand(3, 12, 12)), r"pixel_values: expected shape \(B, 3, 12, 12\), got \(3, 12, 12\)"),
        ({}, lambda m: m(torch.rand(2, 3, 16, 12)), r"\(B, 3, 12, 12\), got \(2, 3, 16, 12\)"),
        ({}, lambda m: m(torch.rand(2, 3, 24, 24)), r"\(B, 3, 12, 12\), got \(2, 3, 24, 24\)"),
        ({}, lambda m: m.fold(torch.rand(2, 1, 12, 12)), r"\(B, 3, 12, 12\), got \(2, 1, 12, 12\)"),
        ({}, lambda m: m.query(torch.rand(2, 17)), r"trigger_column: expected shape \(B, 18\), got \(2, 17\)"),
        ({}, lambda m: m.query(torch.rand(18)), r"trigger_column: expected shape \(B, 18\), got \(18,\)"),
        ({}, lambda m: m.query(torch.rand(2, 1, 18)), r"trigger_column: expected shape \(B, 18\), got \(2, 1, 18\)"),
        (
            {},
            lambda m: m(small_images(), torch.rand(5, 3)),
            r"coordinates: expected shape \(L, 2\) or \(2, L, 2\).*got \(5, 3\)",
        ),
        (
            {},
            lambda m: m(small_images(), torch.rand(3, 5, 2)),
            r"coordinates: expected .*\(2, L, 2\).*got \(3, 5, 2\)",
        ),
        (
            {},
            lambda m: m(small_images(), torch.rand(1, 5, 2)),
            r"coordinates: expected .*\(2, L, 2\).*got \(1, 5, 2\)",
        ),
        ({}, lambda m: m(small_images(), torch.rand(2)), r"coordinates: expected .*got \(2,\)"),
        ({}, lambda m: m(small_images(), torch.rand(1, 1, 5, 2)), r"coordinates: expected .*got \(1, 1, 5, 2\)"),
        ({}, lambda m: m(small_images(), torch.rand(0, 2)), r"coordinates: expected .*L >= 1, got \(0, 2\)"),
        ({}, lambda m: m.pooled_features(small_images(), torch.rand(5, 3)), r"coordinates: expected .*got \(5, 3\)"),
        ({}, lambda m: m(small_images(), chunk_size=0), "chunk_size: expected a positive number of locations, got 0"),
        ({}, lambda m: m(small_images(), chunk_size=-1), "chunk_size: expected a positive .*got -1"),
        ({"trigger_source": "embedding"}, lambda m: m(small_images()), "trigger_column"),
        ({"trigger_source": "embedding"}, lambda m: m(), "expected trigger_column"),
        ({"trigger_source": "embedding"}, lambda m: m.pooled_features(), "expected trigger_column"),
        ({"local_patch": True}, lambda m: m.query(torch.rand(2, 18)), "pixel_values: expected the images"),
        (
            {"local_patch": True},
            lambda m: m.query(torch.rand(2, 18), pixel_values=small_images(3)),
            "pixel_values: expected 2 images.*got 3",
        ),
        (
            {"local_patch": True},
            lambda m: m.query(torch.rand(2, 18), pixel_values=small_images(size=16)),
            r"pixel_values: expected shape \(B, 3, 12, 12\), got \(2, 3, 16, 16\)",
        ),
    ],
)
def test_wrong_inputs_say_what_was_expected(fields, call, message):
    with pytest.raises(ValueError, match=message):
        call(small_model(**fields))


def test_nonsense_in_a_changed_configuration_is_refused_when_the_model_is_built(tmp_path):
    small_model().save_pretrained(tmp_path)
    for nonsense in ({"position_size": 18}, {"pooling": "max"}, {"image_size": 13}):
        with pytest.raises(ValueError, match=f"{next(iter(nonsense))}: expected"):
            APMModel.from_pretrained(tmp_path, **nonsense)


# ---- sizes and initial weights


@pytest.mark.parametrize(
    ("name", "millions"), [("dinov2-large", 54.3), ("clip-ttt", 22.8)], ids=["dinov2-large", "clip-ttt"]
)
def test_presets_have_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        model = APMModel(APMConfig.preset(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == millions


def test_local_columns_of_an_image_of_any_size_are_queried_anywhere_at_little_cost():
    model, generator = small_model(**COLUMNS, local_patch=True), torch.Generator().manual_seed(5)
    pixel_values = torch.randn(2, 3, 16, 24, generator=generator)
    columns = model.fold(pixel_values)
    assert columns.shape == (2, 4, 6, 16)
    places = grid_coordinates(4, 6)
    outputs = model(pixel_values)  # by default at the centres of the image's cells
    for expected in (model(pixel_values, places), model.query(columns, places, pixel_values=pixel_values)):
        assert_same_answers(expected, outputs)
    last = model.query(columns, places[-1:], pixel_values=pixel_values)
    assert_close(last.last_hidden_state[:, 0], outputs.last_hidden_state[:, -1])


@pytest.mark.parametrize(("patch_size", "rows"), [(2, 4), (16, 2)])
def test_local_columns_of_other_patches_equal_the_naive_form(patch_size, rows):
    side = patch_size * rows
    model = small_model(**COLUMNS, patch_size=patch_size, image_size=side).double()
    pixel_values = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    columns = naive_columns(model.config, model.state_dict(), pixel_values)
    assert columns.shape == (2, rows, rows, 16)
    assert_close(model.fold(pixel_values), columns)


def test_the_student_costs_a_quarter_of_the_smallest_usual_teacher():
    model, places = APMModel(APMConfig.preset("student", feature_size=192)).eval(), grid_coordinates(14, 14)
    pixel_values = torch.zeros(1, 3, 224, 224)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        columns = model(pixel_values, places).trigger_column
    grid = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.query(columns, places[:1])
    assert grid <= 0.25 * 2.51e9  # a DeiT-Tiny
    assert counter.get_total_flops() <= grid / 20


def test_tiny_preset_has_a_few_hundred_thousand_parameters():
    model = APMModel(APMConfig.preset("tiny"))
    assert sum(p.numel() for p in model.parameters()) < 500_000


def test_tiny_preset_starts_with_features_that_differ():
    torch.manual_seed(0)
    features = APMModel(APMConfig.preset("tiny"))(small_images(size=96)).last_hidden_state
    assert 0.05 < features.std() < 5
    assert (features[0] - features[1]).abs().max() > 0.01


def test_fresh_weights_have_the_range_asked_for_and_biases_are_zero():
    torch.manual_seed(0)
    config = small_config(hidden_sizes=[256, 256], feature_size=256, pooling="attention", initializer_range=0.05)
    for name, parameter in APMModel(config).named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif parameter.numel() > 1000:
            assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
        else:
            assert parameter.any(), name


# ---- storing and loading


@each_variant
def test_save_and_load_is_bit_equal(fields, tmp_path):
    model = small_model(**fields)
    model.save_pretrained(tmp_path)
    loaded, report = APMModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    # Loaded weights lie where the file has them; a copy is aligned as the original is, and sums in the same order.
    inputs, answers = inputs_for(model), copy.deepcopy(loaded)(**inputs_for(model))
    for name, value in model(**inputs).items():
        assert torch.equal(value, answers[name])


def test_weights_are_stored_as_safetensors_under_their_own_names(tmp_path):
    model = small_model(pooling="attention")
    model.save_pretrained(tmp_path)
    files = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".py")  # beside the code
    assert files == ["config.json", "model.safetensors"]
    stored = load_file(tmp_path / "model.safetensors")
    assert set(stored) == {name for name, _ in model.named_parameters()}
    assert {name: tuple(weight.shape) for name, weight in stored.items() if ".query." in name} == {
        "decoder.query.trigger.weight": (32, 18), "decoder.query.trigger.bias": (32,),
        "decoder.query.row.weight": (32, 8), "decoder.query.column.weight": (32, 8),
        "decoder.rgb_head.query.features.weight": (12, 16),
        "decoder.rgb_head.query.trigger.weight": (12, 18), "decoder.rgb_head.query.trigger.bias": (12,),
        "decoder.rgb_head.query.row.weight": (12, 8), "decoder.rgb_head.query.column.weight": (12, 8),
    }  # fmt: skip


def test_auto_model_knows_apm(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is APMModel
    assert_same_answers(loaded(small_images()), model(small_images()))
    assert type(AutoModel.from_config(small_config())) is APMModel


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}], ids=["default", "low_cpu_mem_usage"])
def test_loading_leaves_nothing_on_the_meta_device(options, tmp_path):
    model = small_model(pooling="attention")
    model.save_pretrained(tmp_path)
    loaded = APMModel.from_pretrained(tmp_path, **options)
    assert not any(tensor.is_meta for tensor in itertools.chain(loaded.parameters(), loaded.buffers()))
    assert_close(loaded(small_images()).pooler_output, model(small_images()).pooler_output)


def test_weights_that_a_checkpoint_lacks_are_drawn(tmp_path):
    small_model(pooling="mean", use_rgb_head=False).save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = APMModel.from_pretrained(tmp_path, pooling="attention", use_rgb_head=True)
    drawn = [loaded.pooler.query, loaded.pooler.k_proj.weight, loaded.decoder.rgb_head.layers[0].weight]
    for parameter in drawn:
        assert parameter.std().item() == pytest.approx(0.3, rel=0.5)
    assert not loaded.pooler.out_proj.bias.any()


@each_variant
def test_model_on_the_meta_device_is_only_shapes(fields):
    config = small_config(**fields)
    with torch.device("meta"):
        model = APMModel(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    inputs = {name: value.to("meta") for name, value in inputs_for(model).items()}
    for coordinates in (None, torch.empty(9, 2, device="meta")):
        outputs = model(**inputs, coordinates=coordinates)
        assert outputs.last_hidden_state.is_meta and outputs.last_hidden_state.shape == (2, 9, 16)
    # Nothing but the weights is needed to bring it to life.
    expected = randomise(APMModel(config))
    model.load_state_dict(expected.state_dict(), assign=True)
    inputs = inputs_for(expected)
    assert_same_answers(model.eval()(**inputs), expected(**inputs), 1e-6)


def test_sizes_that_do_not_match_are_drawn_again_beside_feature_statistics(tmp_path):
    statistics = {"feature_mean": [0.5] * 16, "feature_std": 2.0}
    model = small_model(**statistics)
    model.save_pretrained(tmp_path)
    loaded = APMModel.from_pretrained(tmp_path, hidden_sizes=[32, 20], ignore_mismatched_sizes=True)
    assert loaded.decoder.layers[0].weight.shape == (20, 32)
    assert torch.equal(loaded.decoder.query.row.weight, model.decoder.query.row.weight)
    assert torch.equal(loaded.feature_space.mean, model.feature_space.mean)
    features = {"feature_size": 20, "feature_mean": [0.5] * 20}
    loaded = APMModel.from_pretrained(tmp_path, **features, ignore_mismatched_sizes=True)
    assert loaded(small_images()).last_hidden_state.shape == (2, 9, 20)


def test_statistics_are_there_where_no_weights_are_initialised():
    space = module_under_test.APMFeatureSpace([1, 2], 3)
    assert space.mean.tolist() == [1, 2] and space.std.tolist() == [3, 3]


# ---- precision


@each_variant
def test_bfloat16_loading_is_close(fields, tmp_path):
    model = small_model(**fields)
    model.save_pretrained(tmp_path)
    loaded = APMModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    inputs = inputs_for(model)
    for coordinates in COORDINATES.values():
        expected = model(**inputs, coordinates=coordinates)
        for dtype in (torch.bfloat16, torch.float32):  # an image processor knows nothing of the weights' dtype
            given = {name: value.to(dtype) for name, value in inputs.items()}
            outputs = loaded(**given, coordinates=coordinates)
            assert {value.dtype for value in outputs.values()} == {torch.bfloat16}
            assert_same_answers(outputs, expected, 0.03)


def test_coordinates_keep_their_precision_in_bfloat16():
    # One step of bfloat16 at 40 is a quarter: 40.03 and 40.11 would be the same place, 0.6 of a cell too far.
    places = torch.tensor([[40.03, 40.03], [40.11, 40.11]])
    assert places.bfloat16()[0].equal(places.bfloat16()[1])
    model = small_model(image_size=60, position_size=32, trigger_source="embedding")
    trigger_column = torch.randn(1, 16, generator=torch.Generator().manual_seed(0)) / 4
    expected = model.query(trigger_column, places).last_hidden_state
    assert (expected[0, 0] - expected[0, 1]).abs().max() > 0.1 * expected.abs().max()
    answers = model.bfloat16().query(trigger_column.bfloat16(), places).last_hidden_state
    assert_close(answers, expected, 0.03)


def test_local_patches_do_not_move_in_bfloat16():
    # One step of bfloat16 below 1 is 1/256: nearly a pixel of 448.
    places = torch.tensor([[0.9, 0.9], [0.9019, 0.9019]])
    fields = {"image_size": 448, "patch_size": 14, "trigger_source": "embedding", "local_patch": True}
    model = small_model(**fields)
    trigger_column, pixel_values = torch.zeros(1, 16), small_images(1, size=448)
    expected = model.query(trigger_column, places, pixel_values=pixel_values).last_hidden_state
    assert (expected[0, 0] - expected[0, 1]).abs().max() > 0.2 * expected.abs().max()
    model = model.bfloat16()
    answers = model.query(trigger_column.bfloat16(), places, pixel_values=pixel_values.bfloat16()).last_hidden_state
    assert_close(answers, expected, 0.03)


@each_query_variant
def test_autocast_answers_and_trains(fields):
    model = small_model(**fields)
    for coordinates in (None, random_coordinates(5)):
        expected = model(small_images(), coordinates)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(small_images(), coordinates)
            weighted_sum(outputs).backward()
        assert_close(outputs.last_hidden_state, expected.last_hidden_state, 0.03)
        assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


# ---- training


@each_variant
def test_every_parameter_gets_a_gradient(fields):
    model = small_model(**fields)
    outputs = model(**inputs_for(model))
    (outputs.last_hidden_state.sum() + outputs.pooler_output.sum() + outputs.rgb.sum()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def gradients(model: APMModel, coordinates: Tensor | None, chunk_size: int | None) -> dict[str, Tensor]:
    model.zero_grad()
    weighted_sum(model(small_images(), coordinates, chunk_size=chunk_size)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@each_query_variant
@each_place
def test_gradient_checkpointing_gives_equal_gradients(fields, coordinates):
    model = small_model(**fields).train()
    expected = gradients(model, coordinates, None)
    model.gradient_checkpointing_enable()
    # Chunks of the grid are whole rows, of three cells here.
    num_in_twos = 3 if coordinates is None else (coordinates.shape[-2] + 1) // 2
    outputs = count_calls(model.decoder.feature_head)
    for chunk_size, num_chunks in ((None, 1), (2, num_in_twos)):
        outputs.clear()
        actual = gradients(model, coordinates, chunk_size)
        assert len(outputs) == 2 * num_chunks, "the backward pass computes each chunk once more"
        for name, gradient in expected.items():
            if gradient.abs().max() > 1e-2:
                assert_close(actual[name], gradient, 1e-4)


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"preserve_rng_state": False}], ids=str)
@pytest.mark.parametrize("trigger_source", ["conv", "embedding"])
def test_reentrant_checkpointing_loses_no_gradient_silently(trigger_source, options):
    model = small_model(trigger_source=trigger_source, pooling="attention").train()
    model.gradient_checkpointing_enable(options)  # torch's default is to be reentrant
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weighted_sum(model(**inputs_for(model))).backward()
    lost = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # Where no input has a gradient, torch warns of what it loses.
    assert bool(lost) == any("Gradients will be None" in str(warning.message) for warning in caught)
    assert not lost or trigger_source == "embedding"


@pytest.mark.parametrize("trigger_source", ["conv", "embedding"])
def test_inputs_that_require_gradients_save_reentrant_checkpointing(trigger_source):
    model = small_model(trigger_source=trigger_source, pooling="attention").train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    weighted_sum(model(**inputs_for(model))).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_stacked_weights_can_be_mapped_over():
    """Test-time training gives every image weights of its own."""
    models = [small_model(seed=seed, local_patch=True, pooling="attention") for seed in (0, 1, 2)]
    stacked, _ = torch.func.stack_module_state(models)
    images = small_images(3)[:, None]

    def pooled(weights: dict[str, Tensor], pixel_values: Tensor, *coordinates: Tensor) -> Tensor:
        return torch.func.functional_call(models[0], weights, (pixel_values, *coordinates)).pooler_output[0]

    for coordinates in ((), (random_coordinates(3, 5),)):
        mapped = torch.vmap(pooled)(stacked, images, *coordinates)
        for i, model in enumerate(models):
            assert_close(mapped[i], model(images[i], *(places[i] for places in coordinates)).pooler_output[0])


# ---- compilation


def test_compiles_into_one_graph():
    torch.compiler.reset()
    model = small_model(local_patch=True, pooling="attention")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for coordinates in (None, random_coordinates(5)):
        assert_same_answers(compiled(small_images(), coordinates), model(small_images(), coordinates))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("coordinates", [None, random_coordinates(5)], ids=["grid", "off-grid"])
def test_compiled_code_gives_equal_answers_and_gradients(coordinates):
    torch.compiler.reset()
    model = small_model(local_patch=True, pooling="attention")
    compiled = torch.compile(model, fullgraph=True)
    expected, actual = gradients(model, coordinates, None), gradients(compiled, coordinates, None)
    for name, gradient in expected.items():
        if gradient.abs().max() > 1e-2:
            assert_close(actual[f"_orig_mod.{name}"], gradient, 1e-4)
    assert_same_answers(compiled(small_images(), coordinates), model(small_images(), coordinates))
