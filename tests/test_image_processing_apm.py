"""Whatever an image comes in, both backends must read the same pixels, apply the same recipe, or say what is wrong."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import PreTrainedConfig

# At its top level transformers 5.17 refuses this class without torchvision.
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING, AutoImageProcessor
from transformers.utils import is_torchvision_available

from apm_hf import APMModel
from apm_hf.image_processing_apm import APMImageProcessor
from apm_hf.image_processing_pil_apm import APMImageProcessorKwargs, APMImageProcessorPil, read_image
from fixtures_tiny import STUDENT_SIZE, student_config

needs_torchvision = pytest.mark.skipif(not is_torchvision_available(), reason="torchvision is not installed")
BACKENDS = [APMImageProcessorPil, pytest.param(APMImageProcessor, marks=needs_torchvision, id="APMImageProcessor")]
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
RAW = {"do_resize": False, "do_rescale": False, "do_normalize": False}  # pixels as they were read


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def photo():
    """`(40, 30, 3)` uint8: blocks of colour and some noise, so that flips, transposes and channel swaps all show."""
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (4, 3, 3)).repeat(10, axis=0).repeat(10, axis=1)
    return (blocks + generator.normal(0, 9, blocks.shape)).clip(0, 255).astype(np.uint8)


def raw_pixels(backend, image, **options):
    """`(H, W, 3)`, as read."""
    pixel_values = backend(**RAW)(image, return_tensors="np", **options)["pixel_values"]
    assert pixel_values.dtype == np.float32 and pixel_values.shape[:2] == (1, 3)
    return pixel_values[0].transpose(1, 2, 0)


def reopened(image, **options):
    """The image as it comes back from a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


# --- the recipe ---------------------------------------------------------------------------------------------------


def test_defaults_are_448_bicubic_with_imagenet_statistics(backend, photo):
    pixel_values = backend()(Image.fromarray(photo), return_tensors="pt")["pixel_values"]
    resized = np.array(Image.fromarray(photo).resize((448, 448), Image.Resampling.BICUBIC))
    expected = ((resized / 255 - MEAN) / STD).transpose(2, 0, 1)[None]
    assert pixel_values.dtype == torch.float32
    # Two 8-bit levels for torchvision's own resampling; nothing for PIL's.
    tolerance = 1e-5 if backend is APMImageProcessorPil else 2 / 255 / STD.min() + 1e-5
    np.testing.assert_allclose(pixel_values.numpy(), expected, rtol=0, atol=tolerance)


def test_min_max_replaces_mean_and_std_image_by_image(backend, photo):
    dark, bright = photo // 4 + 20, photo // 2 + 100
    processor = backend(do_resize=False, do_min_max=True)
    assert processor.do_normalize  # stays on in the file, without effect
    pixel_values = processor([dark, bright], disable_grouping=False, return_tensors="np")["pixel_values"]
    for result, image in zip(pixel_values, (dark, bright), strict=True):
        expected = (image.astype(float) - image.min()) / (int(image.max()) - int(image.min()))
        np.testing.assert_allclose(result, expected.transpose(2, 0, 1), atol=1e-6)
        assert result.min() == 0 and result.max() == 1
    again = processor(dark, do_min_max=False, return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(again, ((dark / 255 - MEAN) / STD).transpose(2, 0, 1), atol=1e-5)


def test_min_max_is_taken_after_resizing(backend, photo):
    pixel_values = backend(size=9, do_min_max=True)(photo, return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (1, 3, 9, 9)
    assert pixel_values.min() == 0 and pixel_values.max() == 1


@pytest.mark.parametrize("value", [0, 7, 255])
def test_min_max_of_a_constant_image_is_zero(backend, value):
    constant = np.full((5, 6, 3), value, dtype=np.uint8)
    pixel_values = backend(size=8, do_min_max=True)(constant, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixel_values, torch.zeros(1, 3, 8, 8))


def test_flipping_the_channel_order_is_the_last_step(backend, photo):
    rgb = backend(size=20)(photo, return_tensors="pt")["pixel_values"]
    bgr = backend(size=20, do_flip_channel_order=True)(photo, return_tensors="pt")["pixel_values"]
    assert torch.equal(bgr, rgb.flip(1)) and not torch.equal(bgr, rgb)


def test_a_crop_larger_than_the_image_is_padded_alike(backend, photo):
    pixels = raw_pixels(backend, photo, do_center_crop=True, crop_size={"height": 43, "width": 21})
    expected = np.zeros((43, 21, 3))
    expected[1:41] = photo[:, 4:25]  # the odd row of padding last, the odd column cropped last
    np.testing.assert_array_equal(pixels, expected)


def test_shortest_edge_crop_and_padding_keep_the_aspect_ratio(backend, photo):
    processor = backend(size={"shortest_edge": 15}, do_center_crop=True, crop_size=15, do_pad=True, pad_size=17)
    deep = photo.astype(np.float32) / 255
    shallow, deep = (processor(image, return_tensors="np")["pixel_values"] for image in (photo, deep))
    assert shallow.shape == deep.shape == (1, 3, 17, 17)
    assert not shallow[..., 15:].any() and shallow[..., :15, :15].any()
    np.testing.assert_allclose(shallow, deep, atol=0.1)


# --- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_eight_bit_pil_modes_read_as_pil_converts_them(backend, photo, mode):
    image = Image.fromarray(photo).convert(mode)
    np.testing.assert_array_equal(raw_pixels(backend, image), np.array(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I", "png", "uint16", "uint16 rgb", "big-endian", "torch"])
def test_sixteen_bits_are_scaled_and_not_clipped(backend, kind):
    deep = np.random.default_rng(0).integers(0, 65536, (6, 7), dtype=np.uint16)
    image = {
        "I;16": lambda: Image.fromarray(deep),
        "I;16B": lambda: Image.frombytes("I;16B", (7, 6), deep.astype(">u2").tobytes()),
        "I": lambda: Image.fromarray(deep.astype(np.int32)),
        "png": lambda: reopened(Image.fromarray(deep)),
        "uint16": lambda: deep,
        "uint16 rgb": lambda: deep[..., None].repeat(3, axis=2),
        "big-endian": lambda: deep.astype(">u2"),
        "torch": lambda: torch.from_numpy(deep)[None],
    }[kind]()
    np.testing.assert_allclose(raw_pixels(backend, image), np.repeat(deep[..., None] / 257, 3, axis=2), rtol=1e-6)


def test_resizing_keeps_sixteen_bits_deep(backend):
    ramp = np.linspace(30000, 30500, 64 * 64).reshape(64, 64).astype(np.uint16)  # two 8-bit levels
    pixel_values = backend(size=32, do_min_max=True)(ramp, return_tensors="pt")["pixel_values"]
    assert len(pixel_values.unique()) > 200


@pytest.mark.parametrize("scale", [1, 255])
def test_bicubic_overshoot_is_clamped_at_black_and_white(backend, photo, scale):
    edges = np.where(photo > 120, scale, 0).astype(np.float32)
    for options in ({}, {"do_rescale": False}):
        pixel_values = backend(size=50, do_normalize=False)(edges, return_tensors="pt", **options)["pixel_values"]
        assert pixel_values.min() == 0 and pixel_values.max() == (scale if options else 1)


def test_mode_f_follows_the_rule_for_floats(backend, photo):
    gray = photo[..., 0].astype(np.float32)
    for image in (Image.fromarray(gray), gray):
        np.testing.assert_array_equal(raw_pixels(backend, image), np.repeat(gray[..., None], 3, axis=2))
    fractions = raw_pixels(backend, Image.fromarray(gray / 255), do_rescale=True, rescale_factor=1.0)
    np.testing.assert_allclose(fractions[..., 1], gray, rtol=1e-6)


@pytest.mark.parametrize(
    "kind", ["RGBA", "RGBA array", "RGBA floats", "RGBA uint16", "LA", "La", "P bytes", "P index"]
)
def test_transparency_is_composited_on_white(backend, photo, kind):
    alpha = np.arange(40 * 30).reshape(40, 30) % 256
    gray = np.repeat(photo[..., :1], 3, axis=2)
    rgba = np.dstack([photo, alpha]).astype(np.uint8)
    palette = Image.fromarray(photo).quantize(16)
    palette_rgb, indices = np.array(palette.convert("RGB")), np.array(palette)
    opacity = np.full(16, 255)
    opacity[[2, 5]] = [0, 90]
    gray_alpha = Image.merge("LA", (Image.fromarray(photo[..., 0]), Image.fromarray(alpha.astype(np.uint8))))
    image, colours, alpha = {
        "RGBA": lambda: (Image.fromarray(rgba), photo, alpha),
        "RGBA array": lambda: (rgba, photo, alpha),
        "RGBA floats": lambda: (rgba / 255, photo, alpha),
        "RGBA uint16": lambda: (rgba.astype(np.uint16) * 257, photo, alpha),
        "LA": lambda: (gray_alpha, gray, alpha),
        "La": lambda: (gray_alpha.convert("La"), gray, alpha),
        "P bytes": lambda: (
            reopened(palette, transparency=bytes(opacity.tolist())),
            palette_rgb,
            opacity[indices],
        ),
        "P index": lambda: (reopened(palette, transparency=3), palette_rgb, np.where(indices == 3, 0, 255)),
    }[kind]()
    expected = 255 + (colours.astype(float) - 255) * alpha[..., None] / 255
    if kind == "La":  # premultiplied: dark colours under little opacity are lost, so compare where there is much
        image, expected = image.crop((0, 7, 30, 8)), expected[7:8]
    pixels = raw_pixels(backend, image, do_rescale=True, rescale_factor=1.0)
    np.testing.assert_allclose(pixels, expected, atol=0.51 if kind != "La" else 1.51)


def test_a_transparent_gray_level_of_a_sixteen_bit_png_becomes_white(backend):
    deep = np.array([[0, 1000], [2000, 65535]], dtype=np.uint16)
    image = Image.fromarray(deep)
    image.info["transparency"] = 1000
    np.testing.assert_allclose(raw_pixels(backend, image)[..., 0], [[0, 255], [2000 / 257, 255]], rtol=1e-6)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(backend, photo, orientation):
    upright = Image.fromarray(photo)
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}.get(orientation)  # transpositions that the tag asks to revert
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(raw_pixels(backend, reopened(stored, exif=exif)), photo)


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.transpose(2, 0, 1),
        lambda x: x[::-1][::-1],
        lambda x: x.astype(np.int64),
        lambda x: x / 255,
        lambda x: (x / 255).astype(np.float32),
        lambda x: x.astype(np.float16),
        lambda x: x.astype(np.longdouble),
        lambda x: torch.from_numpy(x),
        lambda x: torch.from_numpy(x).permute(2, 0, 1),
        lambda x: (torch.from_numpy(x) / 255).requires_grad_(),
        lambda x: torch.from_numpy(x).to(torch.uint32),
        lambda x: torch.from_numpy(x).bfloat16(),
    ],
    ids="chw views int64 float64 float32 float16 longdouble torch torch-chw gradient uint32 bfloat16".split(),
)
def test_layouts_and_types_of_one_image_agree(backend, photo, convert):
    processor = backend(size=20, do_normalize=False)
    expected = processor(photo, return_tensors="pt")["pixel_values"]
    result = processor(convert(photo), return_tensors="pt")["pixel_values"]
    # Deeper types are resized unrounded: a level apart, and a few more where 8 bits clip between the two passes.
    torch.testing.assert_close(result, expected, rtol=0, atol=8 / 255)
    assert (result - expected).abs().mean() < 1 / 255


def test_booleans_are_black_and_white_and_gray_is_repeated(backend, photo):
    mask = photo[..., 0] > 100
    expected = np.repeat(mask[..., None] * 255, 3, axis=2)
    for image in (mask, mask[..., None], mask[None], torch.from_numpy(mask), Image.fromarray(mask)):
        np.testing.assert_array_equal(raw_pixels(backend, image), expected)


def test_singles_lists_batches_and_nests_give_the_same_images(backend, photo):
    processor = backend(size=16)
    other = photo[::-1].copy()
    expected = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in (photo, other)])
    for images in (
        [photo, other],
        (Image.fromarray(photo), other.transpose(2, 0, 1)),
        np.stack([photo, other]),
        torch.from_numpy(np.stack([photo, other])).permute(0, 3, 1, 2),
        [[photo], [Image.fromarray(other)]],
        [photo[None], other],
    ):
        assert torch.equal(processor(images, return_tensors="pt")["pixel_values"], expected)
    assert isinstance(processor([photo, other])["pixel_values"], list)


def test_paths_keep_their_depth(backend, photo, tmp_path):
    deep = photo[..., 0].astype(np.uint16) * 200
    Image.fromarray(deep).save(tmp_path / "deep.png")
    for path in (tmp_path / "deep.png", str(tmp_path / "deep.png")):
        np.testing.assert_allclose(raw_pixels(backend, path)[..., 0], deep / 257, rtol=1e-6)


def test_floats_are_fractions_up_to_one_and_eight_bit_values_from_two(backend):
    image = np.zeros((5, 6, 3))
    scaled = {"do_rescale": True, "rescale_factor": 1.0}
    for maximum, expected in ((0.5, 127.5), (1.0, 255.0), (1.0005, 255.0), (2.0, 2.0), (200.0, 200.0), (255.1, 255.0)):
        image[1, 2] = maximum
        assert raw_pixels(backend, image, **scaled).max() == pytest.approx(expected)
    image[1, 2], image[0, 0] = 1.0, -0.0005
    assert raw_pixels(backend, image, **scaled).min() == 0


def test_without_rescaling_fractions_stay_fractions(backend, photo):
    processor = backend(size=20)
    usual = processor(photo / 255, return_tensors="pt")["pixel_values"]
    skipped = processor(photo / 255, do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(usual, skipped, rtol=0, atol=1e-4)
    with_alpha = np.dstack([photo, np.full((40, 30), 51)]) / 255
    pixels = raw_pixels(backend, with_alpha)
    np.testing.assert_allclose(pixels, 0.8 + 0.2 * photo / 255, atol=1e-6)


def test_ambiguous_shapes_read_as_channels_first_unless_told(backend, photo, monkeypatch):
    strip = photo[:3]  # (3, 30, 3)
    warnings = []
    monkeypatch.setattr("transformers.image_utils.logger.warning", warnings.append)
    np.testing.assert_array_equal(raw_pixels(backend, strip), strip.transpose(1, 2, 0))
    assert "ambiguous" in warnings[0]
    np.testing.assert_array_equal(raw_pixels(backend, strip, input_data_format="channels_last"), strip)
    assert len(warnings) == 1


def test_an_image_does_not_change_with_its_neighbours(backend, photo):
    processor = backend(size=20, do_min_max=True)
    alone = processor(photo, return_tensors="pt")["pixel_values"]
    mixed = processor([photo / 255, photo, photo // 2], disable_grouping=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(alone[0], mixed[1])


def test_the_input_is_left_alone(backend, photo):
    tensor = torch.from_numpy(photo).permute(2, 0, 1).float() / 255
    copies = photo.copy(), tensor.clone()
    backend(do_resize=False, do_min_max=True)([photo, tensor], return_tensors="pt")
    assert np.array_equal(photo, copies[0]) and torch.equal(tensor, copies[1])


# --- how many channels ------------------------------------------------------------------------------------------


def statistics(num_channels):
    """Options for so many channels, each with a mean and a deviation of its own."""
    return {
        "image_mean": [0.1 + 0.05 * channel for channel in range(num_channels)],
        "image_std": [0.2 + 0.03 * channel for channel in range(num_channels)],
    }


def with_channels(photo, num_channels):
    """`(40, 30, C)` uint8: other pictures in other channels, the fourth with zeros that transparency would read."""
    channels = [np.roll(photo[..., number % 3], 7 * number, axis=0) for number in range(num_channels)]
    if num_channels > 3:
        channels[3] = np.where(channels[3] < 90, 0, channels[3])
    return np.stack(channels, axis=-1)


@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize("num_channels", [1, 2, 4, 5, 7])
def test_as_many_channels_come_out_as_mean_and_std_have_entries(backend, photo, num_channels, convert):
    options = statistics(num_channels)
    array = with_channels(photo, num_channels)
    processor = backend(do_resize=False, do_convert_rgb=convert, **options)
    expected = ((array / 255 - options["image_mean"]) / options["image_std"]).transpose(2, 0, 1)[None]
    first = np.ascontiguousarray(array.transpose(2, 0, 1))
    for image in (array, first, torch.from_numpy(array), torch.from_numpy(first), array / 255, first[None]):
        for grouping in (True, False):
            pixel_values = processor(image, disable_grouping=not grouping, return_tensors="np")["pixel_values"]
            assert pixel_values.dtype == np.float32
            np.testing.assert_allclose(pixel_values, expected, atol=1e-5)
    batch = processor([array, first], return_tensors="np", input_data_format=None)["pixel_values"]
    np.testing.assert_allclose(batch, np.concatenate([expected, expected]), atol=1e-5)


@pytest.mark.parametrize("depth", ["uint8", "float"])
@pytest.mark.parametrize("num_channels", [2, 4, 5])
def test_channels_are_resized_each_by_itself(backend, photo, num_channels, depth):
    """PIL and others would take four channels for RGBA and weigh three of them by the last."""
    array = with_channels(photo, num_channels)
    array = array if depth == "uint8" else array / 255
    options = {"size": 23, "do_center_crop": True, "crop_size": 20, "do_pad": True, "pad_size": 21}
    means = statistics(num_channels)
    together = backend(**options, **means)(array, return_tensors="pt")["pixel_values"][0]
    for number in range(num_channels):
        own = {name: [values[number]] for name, values in means.items()}
        alone = backend(**options, **own)(array[..., number], return_tensors="pt")["pixel_values"][0]
        assert alone.shape == (1, 21, 21) and alone.std() > 0.1
        torch.testing.assert_close(together[number : number + 1], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "RGBX"])
def test_grey_is_what_pil_makes_of_colours(backend, photo, mode):
    grey = backend(**RAW, image_mean=[0.5], image_std=[0.5])
    image = Image.fromarray(photo).convert(mode)
    expected = np.array(image.convert("RGB").convert("L"))
    given = [image, np.array(image.convert("RGB")), torch.from_numpy(np.array(image.convert("RGB")))]
    for image in given:
        pixel_values = grey(image, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(pixel_values[0, 0], expected)
        assert pixel_values.shape == (1, 1, 40, 30)


def test_grey_of_what_is_transparent_is_grey_on_white(backend, photo):
    grey = backend(**RAW, image_mean=[0.5], image_std=[0.5])
    rgba = np.dstack([photo, photo[::-1, :, 0]])
    on_white = 255 + (photo @ [0.299, 0.587, 0.114] - 255) * rgba[..., 3] / 255
    for image in (rgba, Image.fromarray(rgba), rgba.astype(np.uint16) * 257):
        np.testing.assert_allclose(grey(image, return_tensors="np")["pixel_values"][0, 0], on_white, atol=0.51)
    deep = grey(np.arange(40 * 30, dtype=np.uint16).reshape(40, 30) * 50, return_tensors="np")["pixel_values"]
    assert len(np.unique(deep)) == 1200, "grey keeps its depth"


def test_pil_images_of_four_bands_come_as_they_are_where_four_are_wanted(backend, photo):
    rgba = np.dstack([photo, photo[::-1, :, 0]])
    processor = backend(**RAW, **statistics(4))
    bands = processor(Image.fromarray(rgba), return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(bands, rgba.transpose(2, 0, 1))
    cmyk = Image.fromarray(photo).convert("CMYK")
    bands = processor(cmyk, do_convert_rgb=False, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(bands, np.array(cmyk).transpose(2, 0, 1))


def test_any_number_of_channels_passes_where_nothing_is_converted_or_normalized_by_channel(backend, photo):
    array = with_channels(photo, 4)
    for options in ({"do_normalize": False}, {"do_min_max": True}, {"image_mean": 0.5, "image_std": 0.5}):
        processor = backend(size=16, do_convert_rgb=False, **options)
        assert processor(array, return_tensors="pt")["pixel_values"].shape == (1, 4, 16, 16)
        assert processor(photo[..., 0], return_tensors="pt")["pixel_values"].shape == (1, 1, 16, 16)
        wide = processor(photo.transpose(1, 2, 0), input_data_format="channels_first", return_tensors="pt")
        assert wide["pixel_values"].shape == (1, 30, 16, 16)


def test_the_number_of_channels_tells_layouts_apart(backend, photo, monkeypatch):
    warnings = []
    monkeypatch.setattr("transformers.image_utils.logger.warning", warnings.append)
    strip = with_channels(photo, 4)[:3]  # (3, 30, 4)
    processor = backend(**RAW, **statistics(4))
    np.testing.assert_array_equal(processor(strip, return_tensors="np")["pixel_values"][0], strip.transpose(2, 0, 1))
    assert not warnings
    strip = with_channels(photo, 4)[:4]
    np.testing.assert_array_equal(processor(strip, return_tensors="np")["pixel_values"][0], strip)
    assert "ambiguous" in warnings[0]


@pytest.mark.parametrize("num_channels", [1, 4])
def test_a_model_of_other_channels_is_fed_by_its_processor(backend, photo, tmp_path, num_channels):
    size = {"height": STUDENT_SIZE, "width": STUDENT_SIZE}
    backend(size=size, **statistics(num_channels)).save_pretrained(tmp_path)
    processor = backend.from_pretrained(tmp_path)
    assert list(processor.image_mean) == statistics(num_channels)["image_mean"]
    model = APMModel(student_config(num_channels=num_channels))
    inputs = processor([with_channels(photo, num_channels)] * 2, return_tensors="pt")
    assert len(model(**inputs).last_hidden_state) == 2


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ("photo", statistics(4), r"4 channels \(as `image_mean` has entries\) on the first or last axis, got shape"),
        ("grey", statistics(4), r"4 channels \(as .* entries\), got 1 in shape \(40, 30\)"),
        ("photo", statistics(2), "2 channels .* on the first or last axis"),
        ("PIL", statistics(4), r"4 channels .*, got 3 in shape \(40, 30, 3\) read as channels_last"),
        ("five", {}, "1, 3 or 4 channels on the first or last axis"),
        ("five", {"input_data_format": "channels_last"}, "1, 3 or 4 channels, got 5"),
        ("five", statistics(1), "1, 3 or 4 channels on the first or last axis"),
        ("five", statistics(4) | {"input_data_format": "channels_last"}, "4 channels .*, got 5"),
        ("photo", statistics(1) | {"do_convert_rgb": False}, "1 channel .* on the first or last axis"),
        ("five", {"do_convert_rgb": False, "do_normalize": False}, "1, 3 or 4 channels on the first or last axis"),
        ("palette", {"do_convert_rgb": False}, "`do_convert_rgb=False`, got palette indices, mode P"),
        (
            "four",
            statistics(4) | {"do_flip_channel_order": True},
            "3 channels with `do_flip_channel_order=True`, got 4",
        ),
    ],
)
def test_channels_that_do_not_fit_are_named_in_one_line(backend, photo, image, options, message):
    image = {
        "photo": photo,
        "grey": photo[..., 0],
        "PIL": Image.fromarray(photo),
        "palette": Image.fromarray(photo).convert("P"),
        "four": with_channels(photo, 4),
        "five": with_channels(photo, 5),
    }[image]
    with pytest.raises(ValueError, match=f"^images: expected .*{message}") as raised:
        backend(size=8)(image, **options)
    assert "\n" not in str(raised.value)


def test_images_of_one_batch_have_as_many_channels(backend, photo):
    processor = backend(do_resize=False, do_convert_rgb=False, do_normalize=False)
    with pytest.raises(ValueError, match=r"^images\[1\]: expected 3 channels, as the first image has, got 1\.$"):
        processor([photo, photo[..., 0]])


# --- what is refused ----------------------------------------------------------------------------------------------


def truncated_jpeg():
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    return Image.open(io.BytesIO(buffer.getvalue()[:900]))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "expected a PIL image, NumPy array or torch tensor, got NoneType"),
        (b"bytes", "got bytes"),
        ({"image": 1}, "got dict"),
        (3.5, "got float"),
        (np.zeros((0, 5, 3), np.uint8), r"at least one pixel, got shape \(0, 5, 3\)"),
        (Image.new("RGB", (0, 4)), r"at least one pixel, got a PIL image of size \(0, 4\)"),
        (np.zeros((9, 9, 2), np.uint8), r"1, 3 or 4 channels on the first or last axis, got shape \(9, 9, 2\)"),
        (torch.zeros(5, 9, 9), r"1, 3 or 4 channels .* got shape \(5, 9, 9\)"),
        (np.zeros(7), r"got \(7,\)"),
        (np.full((6, 7), np.nan), "finite pixels, got 42 NaN or infinite"),
        (torch.tensor([[1.0, float("inf")]]), "finite pixels, got 1 NaN or infinite"),
        (np.full((6, 7, 3), 1.5), r"floating-point pixels .* got \[1.5, 1.5\]"),
        (np.full((6, 7, 3), -0.5), r"got \[-0.5, -0.5\]"),
        (np.full((6, 7, 3), 256.0), r"got \[256, 256\]"),
        (np.full((6, 7, 3), 300), r"16-bit pixels as uint16, got torch.int64 in \[300, 300\]"),
        (np.full((6, 7, 3), -1, np.int8), r"got torch.int8 in \[-1, -1\]"),
        (np.full((6, 7), "x"), "got a NumPy array of <U1"),
        (torch.zeros(6, 7, dtype=torch.complex64), "got a tensor of torch.complex64"),
        (Image.fromarray(np.full((2, 2), 70000, np.int32)), r"in a PIL image of mode I, got \[70000, 70000\]"),
        (truncated_jpeg(), "PIL cannot decode: image file is truncated"),
        ("no such file.png", "Incorrect image source"),
        ([], "expected at least one image, got none"),
    ],
)
def test_a_bad_image_is_named_by_its_place_and_what_it_is(backend, photo, bad, message):
    with pytest.raises(ValueError, match=rf"^images\[1\]: .*{message}"):
        backend(size=8)([photo, bad, photo])


def test_errors_name_the_place_in_batches_and_nests(backend, photo):
    batch = np.stack([photo, photo]) / 255
    batch[1, 3, 4, 0] = np.nan
    for images, place in ((batch, r"images\[1\]"), ([[photo], [photo, None]], r"images\[1\]\[1\]"), (None, "images")):
        with pytest.raises(ValueError, match=f"^{place}: expected"):
            backend(size=8)(images)


def test_without_conversion_only_three_channels_pass(backend, photo):
    for image in (photo[..., 0], np.dstack([photo, photo[..., 0]]), Image.fromarray(photo).convert("L")):
        with pytest.raises(ValueError, match=r"expected 3 channels \(as `image_mean` has entries\).*, got .*40, 30"):
            backend(size=8, do_convert_rgb=False)(image)
    hsv = Image.fromarray(photo).convert("HSV")
    np.testing.assert_array_equal(raw_pixels(backend, hsv, do_convert_rgb=False), np.array(hsv))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_data_format": "channels_middle"}, "channels_middle"),
        ({"input_data_format": "channels_first"}, "1, 3 or 4 channels, got 40"),
        ({"data_format": "channels_last"}, "must be 'channels_first'"),
        ({"image_mean": [0.5, 0.5]}, r"as many finite ones as images have channels.*\(0.5, 0.5\) and \(0.229,"),
        ({"image_mean": [], "image_std": []}, "as many finite ones as images have channels"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "as many finite ones as images have channels"),
        ({"image_std": [1.0, 0.0, 1.0]}, "the std positive"),
        ({"image_std": [1.0, float("inf"), 1.0]}, "the std positive"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(backend, photo, options, message):
    with pytest.raises(ValueError, match=message):
        backend(size=8)(photo, **options)


def test_a_misspelt_option_is_refused(backend, photo):
    with pytest.raises(TypeError, match="do_minmax"):
        backend(size=8)(photo, do_minmax=True)


# --- saving, loading, choosing ------------------------------------------------------------------------------------

OTHER_OPTIONS = {
    "do_resize": False,
    "size": {"height": 32, "width": 48},
    "resample": 2,
    "do_rescale": False,
    "rescale_factor": 0.5,
    "do_normalize": False,
    "image_mean": (0.1, 0.2, 0.3),
    "image_std": (0.4, 0.5, 0.6),
    "do_convert_rgb": False,
    "do_min_max": True,
    "do_flip_channel_order": True,
    "do_center_crop": True,
    "crop_size": {"height": 16, "width": 8},
}


@pytest.mark.parametrize("options", [{}, OTHER_OPTIONS])
def test_all_options_survive_saving(backend, tmp_path, options):
    processor = backend(**options)
    processor.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "preprocessor_config.json").read_text())["image_processor_type"] == "APMImageProcessor"
    )
    loaded = backend.from_pretrained(tmp_path)
    for name in APMImageProcessorKwargs.__annotations__:
        assert getattr(loaded, name) == getattr(processor, name), name
    for name, value in options.items():
        assert getattr(loaded, name) == value, name
    assert backend.from_pretrained(tmp_path, do_min_max=True).do_min_max


def test_auto_image_processor_takes_the_backend_at_hand(backend, tmp_path, monkeypatch):
    class Config(PreTrainedConfig):
        model_type = "apm-test"

    monkeypatch.setattr(IMAGE_PROCESSOR_MAPPING, "_extra_content", {})
    classes = {"torchvision": APMImageProcessor, "pil": APMImageProcessorPil}
    AutoImageProcessor.register(Config, image_processor_classes=classes)
    backend(do_flip_channel_order=True).save_pretrained(tmp_path)
    for name, expected in ((None, APMImageProcessor), ("pil", APMImageProcessorPil)):
        loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=name)
        assert type(loaded) is expected and loaded.do_flip_channel_order


def test_without_torchvision_the_name_stands_for_the_pil_backend():
    assert (APMImageProcessor is APMImageProcessorPil) is not is_torchvision_available()


@needs_torchvision
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": 16},
        {"do_normalize": False, "resample": 2},
        {"do_normalize": False, "resample": 0},
        {"do_min_max": True, "do_flip_channel_order": True},
        {"size": {"shortest_edge": 24}, "do_center_crop": True, "crop_size": 20},
        {"do_resize": False, "image_mean": 0.5, "image_std": 0.25},
        {"size": 16, "image_mean": [0.5], "image_std": [0.2]},
        {"size": 50, "image_mean": [0.5] * 4, "image_std": [0.2] * 4, "do_pad": True, "pad_size": 51},
        {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 51, "width": 33}},
    ],
)
def test_the_backends_agree_up_to_resampling(photo, options):
    four = with_channels(photo, 4)
    images = [photo, photo / 255, Image.fromarray(photo[..., 0]), photo.astype(np.uint16) * 257]
    if np.size(options.get("image_mean")) == 4:
        images = [four, four / 255, four.astype(np.uint16) * 257]
    for image in images:
        by_pil, by_torchvision = (
            backend(**options)(image, return_tensors="pt")["pixel_values"]
            for backend in (APMImageProcessorPil, APMImageProcessor)
        )
        assert by_pil.shape == by_torchvision.shape
        difference = (by_pil - by_torchvision).abs()
        levels = 255 * (0.2 if options.get("do_normalize", True) and not options.get("do_min_max") else 1)
        assert difference.max() * levels < 3 and difference.mean() * levels < 0.1


def test_read_image_returns_eight_bits_where_there_are_no_more(photo):
    assert read_image(photo).dtype == read_image(Image.fromarray(photo).convert("CMYK")).dtype == torch.uint8
    assert read_image(photo / 255).dtype == read_image(photo.astype(np.uint16)).dtype == torch.float32
