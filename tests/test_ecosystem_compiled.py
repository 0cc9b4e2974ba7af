"""The model traced, mapped, cast and copied: `torch.compile`, `torch.export`, ONNX, `torch.func`, autocast, pickle."""

import copy
import io
import pickle

import pytest
import torch
from torch.export import Dim

from apm_hf import APMModel
from fixtures_ecosystem import HEADS, MODELS, assert_same, build, inputs_for, loss_of, tensors
from naive_apm import assert_close, random_coordinates, small_images

SIZES = range(1, 19)


def counting():
    """Return a backend of `torch.compile` that runs graphs as they are, and the list to which it adds each."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


def call_for(vary, size):
    """Return images and places, one number of which is `size`."""
    return {
        "images": (small_images(size), None),
        "places": (small_images(2), random_coordinates(size)),
    }[vary]


# The pairs cover every kind of layer and of input, with and without gradients.
@pytest.mark.parametrize(
    ("kind", "vary", "gradients"),
    [
        ("plain", "images", True),
        ("plain", "places", False),
        ("rich", "images", False),
        ("rich", "places", True),
    ],
)
def test_compiled_code_serves_any_size_with_two_graphs(kind, vary, gradients):
    torch.compiler.reset()
    model, (backend, graphs) = build(kind), counting()
    compiled = torch.compile(model, dynamic=True, backend=backend)
    with torch.set_grad_enabled(gradients):
        for size in SIZES:
            call = call_for(vary, size)
            outputs = compiled(*call)
            if size in (1, 2, SIZES[-1]):
                assert_same(outputs, model(*call))
        assert 1 <= len(graphs) <= 2
        if gradients:
            loss_of(outputs).backward()
            actual = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
            model.zero_grad()
            loss_of(model(*call)).backward()
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(actual[name], parameter.grad, rtol=1e-3, atol=1e-4)


IMAGES, PLACES = Dim("images"), Dim("places")
EXPORTS = {
    "grid": ({0: IMAGES},),
    "shared": ({0: IMAGES}, {0: PLACES}),
    "own": ({0: IMAGES}, {0: IMAGES, 1: PLACES}),
}


def inputs_of(model, form, num_images, num_places):
    shape = {"shared": (num_places,), "own": (num_images, num_places)}
    places = () if form == "grid" else (random_coordinates(*shape[form]),)
    return (small_images(num_images, size=model.config.image_size), *places)


@pytest.mark.parametrize(("kind", "form"), [("plain", "shared"), ("rich", "grid"), ("rich", "own")])
@torch.no_grad()
def test_exported_programs_take_other_numbers_of_images_and_places(kind, form):
    model = build(kind)
    program = torch.export.export(model, inputs_of(model, form, 3, 4), dynamic_shapes=EXPORTS[form]).module()
    for sizes in ((1, 1), (2, 7), (5, 3)):
        given = inputs_of(model, form, *sizes)
        assert_same(program(*given), model(*given))


# Graphs with local patches and other heads are those of `test_export.py`.
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:# The axis name:UserWarning")  # of torch
@pytest.mark.parametrize(("kind", "form"), [("clip-ttt", "own")])
@torch.no_grad()
def test_onnx_graphs_take_other_numbers_of_images_and_places(kind, form, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = build(kind)
    options = {"dynamo": True, "dynamic_shapes": EXPORTS[form], "verbose": False}
    torch.onnx.export(model, inputs_of(model, form, 3, 4), **options).save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    assert names == ["pixel_values", "coordinates"]
    for sizes in ((1, 1), (2, 7), (5, 3)):
        given = inputs_of(model, form, *sizes)
        values = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})
        for value, expected in zip(values, tensors(model(*given)).values(), strict=True):
            assert_same({"rgb": torch.from_numpy(value)}, {"rgb": expected})


# --- mapped, cast, copied -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch's own rules for slopes
@pytest.mark.parametrize("kind", ["rich", "embedding", "segmentation"])
def test_gradients_of_each_image_are_mapped(kind):
    model = build(kind).double()
    weights, inputs = dict(model.named_parameters()), inputs_for(model)
    inputs = {name: value.double() for name, value in inputs.items()}

    def loss(weights, inputs):
        return loss_of(torch.func.functional_call(model, weights, (), inputs))

    def of_one(weights, inputs):
        return loss(weights, {name: value[None] for name, value in inputs.items()})

    each = torch.vmap(torch.func.grad(of_one), in_dims=(None, 0))(weights, inputs)
    for row in range(2):
        one = torch.func.grad(loss)(weights, {name: value[row : row + 1] for name, value in inputs.items()})
        for name, gradient in one.items():
            torch.testing.assert_close(each[name][row], gradient, rtol=1e-4, atol=1e-6)
    tangents = {name: torch.ones_like(value) for name, value in weights.items()}
    _, slope = torch.func.jvp(lambda weights: loss(weights, inputs), (weights,), (tangents,))
    total = sum(gradient.sum() for gradient in torch.func.grad(loss)(weights, inputs).values())
    assert abs(slope) > 1e-2
    torch.testing.assert_close(slope, total, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "rich", "embedding", *HEADS])
def test_autocast_computes_and_trains(kind):
    model = build(kind)
    inputs = inputs_for(model)
    expected = model(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(**inputs)
        loss_of(outputs).backward()
    assert any(value.dtype == torch.bfloat16 for value in tensors(outputs).values())
    assert_same(outputs, expected, 0.05)
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["rich", "embedding", *HEADS])
@torch.no_grad()
def test_default_dtype_may_be_float64(kind, float64, tmp_path):
    model = build(kind)
    inputs = inputs_for(model)
    outputs = tensors(model(**inputs))
    assert {value.dtype for value in outputs.values()} == {torch.float64}
    single = copy.deepcopy(model).float()
    assert_same(single(**inputs), outputs, 1e-4)
    single.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.dtype == torch.float32
    assert_same(loaded(**inputs), single(**inputs), 1e-6)
    if isinstance(model, APMModel):
        places = random_coordinates(4)
        assert_same(single(**inputs, coordinates=places.float()), single(**inputs, coordinates=places), 1e-4)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_copies_pickles_and_files_compute_the_same(kind):
    model = build(kind)
    inputs, stream = inputs_for(model), io.BytesIO()
    outputs = model(**inputs)
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(stream, weights_only=False)]
    for other in copies:
        assert_same(other(**inputs), outputs, 0)
    for parameter in copies[0].parameters():
        parameter.mul_(2)
    assert_same(model(**inputs), outputs, 0)  # nothing is shared
    assert_same(pickle.loads(pickle.dumps(outputs)), outputs, 0)
    name = next(iter(tensors(outputs)))
    assert_close(tensors(copy.deepcopy(outputs))[name], tensors(outputs)[name])
