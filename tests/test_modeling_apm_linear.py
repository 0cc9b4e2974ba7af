"""The forms that the query path takes without gradients: same answers, and nothing kept that has gone stale."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from apm_hf import APMModel
from apm_hf.modeling_apm_decoder import APMQueryLinear
from apm_hf.modeling_apm_linear import FEW, LARGE, APMLinear, are_plain, linear
from naive_apm import assert_close, assert_same_answers, random_coordinates, small_images, small_model

WIDTH = 600
assert WIDTH**2 > LARGE


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- the product


@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (FEW,), (FEW + 1,), (2, 5), (1, 0)], ids=str)
@pytest.mark.parametrize("columns", [slice(None), slice(100, 400)], ids=["whole", "part"])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_product_equals_the_plain_one(rows, columns, with_bias, dtype):
    weight = drawn(2 * WIDTH, WIDTH).to(dtype)[:, columns]  # part of it is still large, and not contiguous
    inputs, bias = drawn(*rows, weight.shape[1], seed=1).to(dtype), drawn(2 * WIDTH, seed=2).to(dtype)
    answer = linear(inputs, weight, bias if with_bias else None)
    expected = F.linear(inputs.double(), weight.double(), bias.double() if with_bias else None)
    assert answer.dtype == dtype and answer.shape == expected.shape and answer.is_contiguous()
    assert_close(linear(inputs.new_ones(weight.shape[1]), weight), weight.double().sum(-1))  # one vector
    if len(expected.flatten()):
        assert_close(answer, expected)


@torch.no_grad()
def test_product_takes_inputs_that_are_not_contiguous():
    weight, inputs = drawn(WIDTH, WIDTH), drawn(WIDTH, 1).expand(WIDTH, 7).T
    assert_close(linear(inputs, weight), F.linear(inputs.double(), weight.double()))


def onednn_is_called(layer: Callable[[Tensor], Tensor], inputs: Tensor) -> bool:
    with torch.profiler.profile() as profile:
        layer(inputs)
    return any("linear_pointwise" in event.key for event in profile.key_averages())


@pytest.mark.filterwarnings("ignore:TF32 acceleration:UserWarning")  # of PyTorch's own switch
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch is built without oneDNN")
def test_large_products_are_oneDNNs_where_no_gradient_is_wanted():
    layer, inputs = APMLinear(WIDTH, WIDTH), drawn(2, WIDTH)
    with torch.no_grad():
        assert onednn_is_called(layer, inputs)
        assert not onednn_is_called(APMLinear(20, 20), inputs[:, :20])
        part = drawn(WIDTH, 2 * WIDTH)[:, :WIDTH]  # oneDNN takes a thousand times as long for such a weight
        assert not onednn_is_called(lambda inputs: linear(inputs, part), inputs)
        with torch.backends.mkldnn.flags(enabled=False):
            assert not onednn_is_called(layer, inputs)
    assert not onednn_is_called(layer, inputs)
    assert onednn_is_called(layer.requires_grad_(False), inputs)


def test_large_layers_train_map_count_cast_and_export():
    layer, inputs = APMLinear(WIDTH, WIDTH), drawn(3, WIDTH)
    layer(inputs).square().sum().backward()
    plain = nn.Linear(WIDTH, WIDTH)
    plain.load_state_dict(layer.state_dict())
    plain(inputs).square().sum().backward()
    assert_close(layer.weight.grad, plain.weight.grad)
    with torch.no_grad():
        assert_close(torch.vmap(layer)(inputs[:, None]), plain(inputs)[:, None])
        plainness = []
        torch.vmap(lambda row: plainness.append(are_plain(row)) or row)(inputs)
        assert plainness == [False] and are_plain(inputs)
        with FlopCounterMode(display=False) as counter:
            layer(inputs)
        assert counter.get_total_flops() == 2 * 3 * WIDTH**2
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(inputs).dtype == torch.bfloat16
        exported = torch.export.export(layer, (inputs,))
        assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)


# ---- what the position adds on the grid, kept while the weights stand still


def asked(model: APMModel) -> APMModel:
    """In evaluation mode, and with its products on the grid kept."""
    with torch.no_grad():
        model.eval()(small_images())
    assert all(layer._kept is not None for layer in query_linears(model))
    return model


def query_linears(model: nn.Module) -> list[APMQueryLinear]:
    return [module for module in model.modules() if isinstance(module, APMQueryLinear)]


def rebuilt(model: APMModel) -> APMModel:
    """Another machine of the same weights, which has kept nothing."""
    other = APMModel(model.config).to(model.dtype).eval()
    other.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    return other


def take_a_step(model: APMModel, optimizer: torch.optim.Optimizer) -> None:
    outputs = model(small_images())
    with torch.no_grad():
        model(small_images())  # between the loss and its step
    (outputs.last_hidden_state.square().sum() + outputs.rgb.square().sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def edit(model: APMModel, change: Callable[[Tensor], object]) -> None:
    for parameter in model.parameters():
        change(parameter)


def set_data(parameter: Tensor) -> None:
    parameter.data = 2 * parameter.data


def replace(model: APMModel) -> None:
    for layer in query_linears(model):
        layer.weight = nn.Parameter(layer.weight.detach() + 1)


CHANGES: dict[str, Callable[[APMModel], object]] = {
    "Adam": lambda model: take_a_step(model, torch.optim.Adam(model.parameters(), lr=0.1)),
    "fused Adam": lambda model: take_a_step(model, torch.optim.Adam(model.parameters(), lr=0.1, fused=True)),
    "SGD, one by one": lambda model: take_a_step(model, torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)),
    "load_state_dict": lambda model: model.load_state_dict(small_model(seed=5).state_dict()),
    "load_state_dict, assigned": lambda model: model.load_state_dict(small_model(seed=5).state_dict(), assign=True),
    "coarser and back": lambda model: model.bfloat16().float(),
    "another dtype": lambda model: model.double(),
    "in place": lambda model: edit(model, lambda parameter: parameter.mul_(2)),
    "a part in place": lambda model: edit(model, lambda parameter: parameter[..., -1].add_(2)),
    "detached, in place": lambda model: edit(model, lambda parameter: parameter.detach().mul_(2)),
    "other data": lambda model: edit(model, set_data),
    "past the count, then eval()": lambda model: (edit(model, lambda p: p.data.mul_(2)), model.eval()),
    "another parameter": replace,
    "one vector": lambda model: nn.utils.vector_to_parameters(
        2 * nn.utils.parameters_to_vector(model.parameters()).detach(), model.parameters()
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_kept_outlives_a_change_of_the_weights(change):
    model = asked(small_model())
    before = [layer._kept for layer in query_linears(model)]
    change(model)
    with torch.no_grad():
        pixel_values = small_images().to(model.dtype)
        actual, expected = model(pixel_values), rebuilt(model)(pixel_values)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, rtol=0, atol=0)
    torch.testing.assert_close(actual.rgb, expected.rgb, rtol=0, atol=0)
    assert all(layer._kept is not old for layer, old in zip(query_linears(model), before, strict=True))


def test_products_are_worked_out_once_while_the_weights_stand_still(monkeypatch):
    model = asked(small_model())
    before = [layer._kept for layer in query_linears(model)]
    monkeypatch.setattr(APMQueryLinear, "_grid_products", None)
    with torch.no_grad():
        model(small_images(), chunk_size=2)
    with torch.inference_mode():
        model.pooled_features(small_images())
    assert all(layer._kept is old for layer, old in zip(query_linears(model), before, strict=True))


def test_other_weights_lent_for_a_call_are_used():
    model, other = asked(small_model()), small_model(seed=5)
    with torch.no_grad():
        lent = torch.func.functional_call(model, dict(other.named_parameters()), (small_images(),))
        assert_same_answers(lent, other(small_images()), 1e-6)
        assert_same_answers(model(small_images()), rebuilt(model)(small_images()), 1e-6)


def test_gradients_never_meet_what_is_kept():
    model = asked(small_model())
    plain = rebuilt(model).train()
    for machine in (model, plain):  # in evaluation mode too, a weight that learns is asked anew
        machine(small_images()).last_hidden_state.square().sum().backward()
    for (name, actual), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            assert_close(actual.grad, expected.grad, 1e-6)
            assert actual.grad.abs().max() > 0, name
    model.train()(small_images())
    assert all(layer._kept is None for layer in query_linears(model))


def test_what_inference_mode_kept_serves_where_an_image_learns():
    model = small_model().eval().requires_grad_(False)
    with torch.inference_mode():
        model(small_images())
    assert all(layer._kept is not None for layer in query_linears(model))
    gradients = []
    for machine in (model, rebuilt(model)):
        pixel_values = small_images().requires_grad_()
        machine(pixel_values).last_hidden_state.square().sum().backward()
        gradients.append(pixel_values.grad)
    assert_close(*gradients, 1e-6)


def test_weights_made_in_inference_mode_are_answered():
    with torch.inference_mode():
        model = small_model().eval()
        answers = model(small_images())
    assert_same_answers(answers, small_model()(small_images()), 1e-6)


def test_copies_files_and_states_do_not_hold_what_is_kept(tmp_path):
    model = asked(small_model())
    assert not any("kept" in name for name in model.state_dict())
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert all(layer._kept is None for layer in query_linears(other))
        edit(other, lambda parameter: parameter.mul_(2))
        with torch.no_grad():
            assert_same_answers(other(small_images()), rebuilt(other)(small_images()), 1e-6)
    with torch.no_grad():
        assert_same_answers(model(small_images()), rebuilt(model)(small_images()), 1e-6)


@torch.no_grad()
def test_chunks_of_the_grid_share_what_is_kept_and_begin_anywhere():
    model, expected = asked(small_model()), small_model()(small_images())
    for chunk_size in (1, 2, 4, 5, 7):
        assert_same_answers(model(small_images(), chunk_size=chunk_size), expected)


@torch.no_grad()
def test_code_of_a_place_is_worked_out_once_for_all_layers(monkeypatch):
    from apm_hf import modeling_apm_decoder

    calls = []
    original = modeling_apm_decoder.position_code
    monkeypatch.setattr(modeling_apm_decoder, "position_code", lambda *args: calls.append(1) or original(*args))
    small_model()(small_images(), random_coordinates(5))
    assert len(calls) == 1
