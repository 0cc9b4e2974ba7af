"""The handler of Inference Endpoints, by its contract: a folder, then requests as JSON brings them, JSON back."""

import base64
import importlib.util
import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import pipeline

from apm_hf import APM, load_teacher
from apm_hf.publishing.zero_shot import save_with_text
from apm_hf.teachers.matching import matching_image_processor
from fixtures_tiny import photo, save_clip, student

PATH = Path(__file__).parents[1] / "examples/serving/handler.py"


def encoded(image, kind="PNG"):
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


PNG = encoded(photo(0))
BASE64 = base64.b64encode(PNG).decode()
LABELS = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def handlers(tmp_path_factory):
    """The module, and its handler of a model without and with words."""
    folder = tmp_path_factory.mktemp("serving")
    teacher, model = load_teacher(save_clip(folder / "clip"), device="cpu"), student(initializer_range=0.3)
    processor = matching_image_processor(teacher, model.config.image_size)
    model.save_pretrained(folder / "plain")
    processor.save_pretrained(folder / "plain")
    (folder / "words").mkdir()
    save_with_text(model, teacher, processor, folder / "words")
    spec = importlib.util.spec_from_file_location("serving_handler", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, {name: module.EndpointHandler(str(folder / name)) for name in ("plain", "words")}, folder


@pytest.fixture
def ask(handlers):
    """Send a request as an endpoint does; what is returned has been JSON."""

    def ask(inputs, *, model="plain", **parameters):
        return json.loads(
            json.dumps(handlers[1][model]({"inputs": inputs, "parameters": parameters}), allow_nan=False)
        )

    return ask


def test_an_image_in_any_form_gives_the_vector_of_encode(ask, handlers):
    expected = APM.load(handlers[2] / "plain", device="cpu").encode(photo(0))[0]
    for image in (photo(0), PNG, BASE64, f"data:image/png;base64,{BASE64}"):
        value = handlers[1]["plain"]({"inputs": image})["embedding"]
        torch.testing.assert_close(torch.tensor(value), expected, rtol=1e-4, atol=1e-5)
    assert sum(x * x for x in ask(BASE64, normalize=True)["embedding"]) == pytest.approx(1, abs=1e-5)
    two = ask([BASE64, base64.b64encode(encoded(photo(1), "JPEG")).decode()])
    torch.testing.assert_close(torch.tensor(two[0]["embedding"]), expected, rtol=1e-4, atol=1e-5)
    assert two[0] != two[1]


def test_features_of_coordinates_are_those_of_the_model(ask, handlers):
    places = [[0.0, 0.0], [-0.4, 0.9]]
    expected = APM.load(handlers[2] / "plain", device="cpu").bare_model
    pixels = handlers[1]["plain"].image_processor(photo(0), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        values = expected(pixels, torch.tensor(places)).last_hidden_state[0]
    torch.testing.assert_close(torch.tensor(ask(BASE64, coordinates=places)["features"]), values)


def test_labels_are_scored_as_by_the_pipeline(ask, handlers):
    answers = ask(BASE64, model="words", candidate_labels=LABELS)
    expected = pipeline("zero-shot-image-classification", model=str(handlers[2] / "words"), device="cpu")
    assert [(one["label"], pytest.approx(one["score"], abs=1e-6)) for one in answers] == [
        (one["label"], one["score"]) for one in expected(photo(0), candidate_labels=LABELS)
    ]
    other = ask(BASE64, model="words", candidate_labels=LABELS, hypothesis_template="a {}")
    assert sum(one["score"] for one in other) == pytest.approx(1, abs=1e-5) and other != answers


@pytest.mark.parametrize(
    ("model", "inputs", "parameters", "message"),
    [
        ("plain", None, {}, "inputs: expected an image, or one as base64, got NoneType"),
        ("plain", "/etc/passwd", {}, "an image as base64, got other text"),
        ("plain", "aGVsbG8=", {}, "an encoded image, got other bytes"),
        ("plain", PNG[: len(PNG) // 2], {}, "a whole image, got a damaged one"),
        ("plain", [], {}, "expected 1 to 32 images, got 0"),
        ("plain", [BASE64] * 33, {}, "expected 1 to 32 images, got 33"),
        ("plain", Image.new("1", (10001, 5000)), {}, "at most 50000000 pixels, got 10001 x 5000"),
        ("plain", BASE64, {"labels": ["cat"]}, "parameters: expected some of .*, got 'labels'"),
        ("plain", BASE64, {"candidate_labels": ["cat"]}, "saved without its teacher's words"),
        ("plain", BASE64, {"hypothesis_template": "a {}"}, "hypothesis_template: expected candidate_labels beside it"),
        ("plain", BASE64, {"coordinates": [0.1, 0.2]}, "pairs .y, x., got the shape .2,."),
        ("plain", BASE64, {"coordinates": [["a", 0.2]]}, "expected a list of pairs of numbers"),
        ("words", BASE64, {"candidate_labels": "cat"}, "expected a list of 1 to 1000 words, got 'cat'"),
        ("words", BASE64, {"candidate_labels": []}, "expected a list of 1 to 1000 words"),
        (
            "words",
            BASE64,
            {"candidate_labels": ["cat"], "hypothesis_template": "a"},
            "expected a text with {}, got 'a'",
        ),
        ("words", BASE64, {"candidate_labels": ["cat"], "normalize": True}, "normalize: expected no candidate_labels"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_what_was_expected(handlers, model, inputs, parameters, message):
    with pytest.raises(ValueError, match=message):
        handlers[1][model]({"inputs": inputs, "parameters": parameters})


def test_a_model_that_reads_its_teacher_is_refused(handlers, tmp_path):
    student(trigger_source="embedding").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected a model that reads images"):
        handlers[0].EndpointHandler(str(tmp_path))
