"""Properties that hold for any input, drawn by hypothesis, alike in every run: configurations, images, files."""

import io
import json
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apm_hf import APMConfig, APMModel
from apm_hf.data.images import decode_image, eight_bit_rgb
from apm_hf.image_processing_pil_apm import APMImageProcessorPil
from apm_hf.runs.checksums import read_checksummed, write_checksummed
from apm_hf.teachers.zero_shot import read_labels
from fixtures_tiny import STUDENT_SIZE, photo, student

pytestmark = pytest.mark.filterwarnings("ignore")  # Pillow warns of much that it then reads


def few(examples):
    return settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )


# --- configurations -------------------------------------------------------------------------------------------------


@st.composite
def configurations(draw):
    """Fields that go together."""
    patch_size, grid_size = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    heads = draw(st.sampled_from([1, 2]))
    num_levels = draw(st.integers(0, 2))
    fields = {
        "patch_size": patch_size,
        "image_size": patch_size * grid_size,
        "num_channels": draw(st.integers(1, 4)),
        "trigger_channels": draw(st.integers(1, 3)),
        "trigger_source": draw(st.sampled_from(["conv", "embedding"])),
        "local_patch": draw(st.booleans()),
        "position_size": 4 * draw(st.integers(1, 3)),
        "hidden_sizes": draw(st.lists(st.integers(1, 8), min_size=1, max_size=3)),
        "hidden_act": draw(st.sampled_from(["relu", "gelu", "silu"])),
        "feature_size": 4 * heads * draw(st.integers(1, 2)),
        "use_rgb_head": draw(st.booleans()),
        "rgb_hidden_sizes": draw(st.lists(st.integers(1, 6), max_size=2)),
        "pooling": draw(st.sampled_from(["mean", "attention"])),
        "pooling_num_heads": heads,
        "num_levels": num_levels,
        "initializer_range": draw(st.sampled_from([0.1, 1])),
    }
    if num_levels:
        fields["level_size"] = draw(st.none() | st.integers(1, 5))
    return fields


@few(25)
@given(fields=configurations())
def test_every_valid_configuration_builds_saves_loads_and_answers(fields):
    config = APMConfig(**fields)
    model = APMModel(config).eval()
    side, channels = config.image_size, config.num_channels
    pixels = torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    trigger = None if config.trigger_source == "conv" else torch.ones(2, config.trigger_width)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        loaded = APMModel.from_pretrained(folder)
        answers = [one(pixels, trigger_column=trigger) for one in (model, loaded)]
    assert loaded.config.to_diff_dict() == model.config.to_diff_dict()
    assert answers[0].last_hidden_state.shape == (2, config.num_locations, config.feature_size)
    for first, second in zip(answers[0].to_tuple(), answers[1].to_tuple(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
        assert first.isfinite().all()


JUNK = st.none() | st.text(max_size=3) | st.floats(max_value=-0.5) | st.integers(max_value=-1) | st.just({"a": 1})
NUMBERS = [
    "patch_size",
    "image_size",
    "num_channels",
    "trigger_channels",
    "position_size",
    "feature_size",
    "num_levels",
]
INVALID = st.one_of(
    st.tuples(st.sampled_from(NUMBERS), JUNK),
    st.tuples(st.sampled_from(["hidden_sizes", "rgb_hidden_sizes", "local_patch_scales"]), JUNK),
    st.tuples(st.sampled_from(["trigger_source", "pooling", "hidden_act"]), JUNK),
    st.tuples(st.just("initializer_range"), st.none() | st.just(0) | st.just(float("nan")) | st.floats(max_value=0)),
    st.tuples(st.just("position_size"), st.integers(1, 99).filter(lambda size: size % 4)),
    st.tuples(st.text("abcdefghij_", min_size=3, max_size=9).filter(lambda name: name[0] != "_"), st.integers()),
)


@few(60)
@given(fields=configurations(), wrong=INVALID)
def test_every_invalid_configuration_is_a_value_error(fields, wrong):
    with pytest.raises(ValueError):
        APMConfig(**{**fields, wrong[0]: wrong[1]})


# --- coordinates ----------------------------------------------------------------------------------------------------

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
PLACES = st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=7)
MACHINES = [student(local_patch=local, initializer_range=0.3).eval() for local in (False, True)]
PIXELS = torch.rand(1, 3, STUDENT_SIZE, STUDENT_SIZE, generator=torch.Generator().manual_seed(0))


@few(60)
@given(model=st.sampled_from(MACHINES), places=PLACES, data=st.data())
def test_answers_at_any_finite_places_do_not_depend_on_order_or_chunks(model, places, data):
    order = data.draw(st.permutations(range(len(places))))
    chunk_size = data.draw(st.integers(1, 8))
    coordinates = torch.tensor(places)
    with torch.no_grad():
        together = model(PIXELS, coordinates).last_hidden_state[0]
        shuffled = model(PIXELS, coordinates[order], chunk_size=chunk_size).last_hidden_state[0]
    assert together.isfinite().all()
    torch.testing.assert_close(together[order], shuffled, rtol=1e-5, atol=1e-5)


@few(20)
@given(places=PLACES, bad=st.sampled_from([float("nan"), float("inf"), float("-inf")]), data=st.data())
def test_places_that_are_no_numbers_are_refused(places, bad, data):
    coordinates = torch.tensor(places)
    coordinates[data.draw(st.integers(0, len(places) - 1)), data.draw(st.integers(0, 1))] = bad
    with pytest.raises(ValueError, match="coordinates: expected finite"):
        MACHINES[0](PIXELS, coordinates)


# --- images ---------------------------------------------------------------------------------------------------------

MODES = [
    "1",
    "L",
    "LA",
    "La",
    "P",
    "PA",
    "RGB",
    "RGBA",
    "RGBa",
    "RGBX",
    "CMYK",
    "YCbCr",
    "HSV",
    "LAB",
    "I",
    "I;16",
    "F",
]
PROCESSOR = APMImageProcessorPil(size={"height": 8, "width": 8})


@few(60)
@given(mode=st.sampled_from(MODES), width=st.integers(1, 64), height=st.integers(1, 64), seed=st.integers(0, 9))
def test_an_image_of_any_shape_and_mode_is_a_picture(mode, width, height, seed):
    rng = np.random.default_rng(seed)
    if mode in ("I", "I;16"):
        pixels = rng.integers(0, 65536, (height, width)).astype(np.int32 if mode == "I" else np.uint16)
        image = PIL.Image.fromarray(pixels)
    elif mode == "F":
        image = PIL.Image.fromarray(rng.random((height, width), dtype=np.float32))
    else:
        size = len(PIL.Image.new(mode, (width, height)).tobytes())
        image = PIL.Image.frombytes(mode, (width, height), rng.bytes(size))
    assert image.mode == mode and eight_bit_rgb(image).size == (width, height)
    values = PROCESSOR(image, return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 8, 8) and values.isfinite().all()


def encodings():
    picture = photo(0, size=(24, 20))
    kinds = {
        "JPEG": {}, "PNG": {}, "GIF": {"save_all": True, "append_images": [photo(1, size=(24, 20))]}, "WEBP": {},
        "TIFF": {"compression": "tiff_lzw"},
    }  # fmt: skip
    for kind, options in kinds.items():
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        yield kind, buffer.getvalue()


VALID = dict(encodings())


@few(250)
@given(
    kind=st.sampled_from(sorted(VALID)),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6),
    in_header=st.booleans(),
    keep=st.just(1.0) | st.floats(0, 1),
)
def test_flipped_bytes_give_a_picture_or_a_value_error(kind, flips, in_header, keep):
    data = bytearray(VALID[kind])
    for place, flip in flips:
        data[int(place * (min(64, len(data)) if in_header else len(data)))] ^= flip
    try:
        picture = eight_bit_rgb(decode_image(bytes(data[: int(keep * len(data))])))
    except ValueError as error:
        assert str(error).count("\n") == 0 and len(str(error)) < 600
    else:
        assert picture.mode == "RGB" and min(picture.size) >= 1


# --- files of labels, parts of a run --------------------------------------------------------------------------------

NAMES = st.sampled_from(["a.txt", "a.json"])
TEXTS = st.lists(st.text(st.characters(codec="utf-8"), max_size=12), max_size=6)


@few(120)
@given(
    lines=TEXTS,
    kind=st.sampled_from(["lines", "json", "raw"]),
    junk=st.binary(max_size=40),
    name=st.sampled_from(["a.txt", "a.json"]),
)
def test_a_file_of_labels_gives_different_labels_or_a_value_error(lines, kind, junk, name):
    content = {"lines": "\n".join(lines).encode(), "json": json.dumps(lines).encode(), "raw": junk}[kind]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        try:
            labels = read_labels(path)
        except ValueError as error:
            assert str(error).count("\n") == 0 and len(str(error)) < 600
        else:
            assert labels and len(set(labels)) == len(labels) and all(one == one.strip() != "" for one in labels)
            assert all("\n" not in one for one in labels) or kind != "lines"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@few(120)
@given(content=st.dictionaries(st.text(max_size=5), JSON, max_size=4), edit=st.data())
def test_a_part_is_read_as_it_was_written_or_refused(content, edit):
    """Bytes removed, inserted, doubled or changed anywhere; JSON forgives much, a checksum nothing."""
    content.pop("checksum", None)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.json"
        write_checksummed(path, content)
        assert read_checksummed(path) == content
        whole = path.read_bytes()
        start = edit.draw(st.integers(0, len(whole)))
        end = edit.draw(st.integers(start, min(start + 8, len(whole))))
        changed = whole[:start] + edit.draw(st.binary(max_size=4) | st.just(whole[start:end] * 2)) + whole[end:]
        path.write_bytes(changed)
        if changed == whole:
            return
        with pytest.raises(ValueError, match="part.json: expected text that fits its checksum"):
            read_checksummed(path)
