"""Between two images: ends, middles, what a blend is, and the pictures."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from apm_hf.islands.interpolation import blend, interpolate
from apm_hf.islands.interpolation_pictures import InterpolationConfig, interpolation_picture
from apm_hf.ttt.photos import query_map
from fixtures_tiny import FEATURE_SIZE, STUDENT_SIZE, photo, student

WIDE = {"initializer_range": 0.3}
SIZE = (5, 7)


def images():
    """Two of them, `(1, 3, S, S)` each."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 1, 3, STUDENT_SIZE, STUDENT_SIZE, generator=generator).unbind()


def vectors(width=40):
    return torch.randn(2, 1, width, generator=torch.Generator().manual_seed(1)).unbind()


@pytest.mark.parametrize("blending", ["linear", "spherical"])
def test_the_ends_of_a_blend_are_the_vectors_themselves(blending):
    first, second = vectors()
    torch.testing.assert_close(blend(first, second, 0.0, blending=blending), first)
    torch.testing.assert_close(blend(first, second, 1.0, blending=blending), second)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_a_spherical_blend_turns_evenly_and_its_length_changes_evenly(alpha):
    first, second = vectors()
    second = 3 * second
    blended = blend(first, second, alpha, blending="spherical")
    angle = F.cosine_similarity(first, second).acos()
    torch.testing.assert_close(F.cosine_similarity(first, blended).acos(), alpha * angle)
    torch.testing.assert_close(F.cosine_similarity(second, blended).acos(), (1 - alpha) * angle)
    torch.testing.assert_close(blended.norm(), (1 - alpha) * first.norm() + alpha * second.norm())


@pytest.mark.parametrize("second", [2.0, -1.0, 0.0])
def test_directions_without_a_circle_of_their_own_are_blended_linearly(second):
    first, _ = vectors()
    blended = blend(first, second * first, 0.25, blending="spherical")
    torch.testing.assert_close(blended, (0.75 + 0.25 * second) * first)


@pytest.mark.parametrize("local_patch", [False, True])
@pytest.mark.parametrize("blending", ["linear", "spherical"])
def test_the_ends_are_what_the_model_answers_about_each_image(local_patch, blending):
    model = student(local_patch=local_patch, **WIDE)
    frames = list(interpolate(model, *images(), 4, SIZE, blending=blending))
    assert [frame.alpha for frame in frames] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    for frame, pixel_values in ((frames[0], images()[0]), (frames[-1], images()[1])):
        features, rgb = query_map(model, pixel_values, SIZE)
        torch.testing.assert_close(frame.features, features[0])
        torch.testing.assert_close(frame.rgb, rgb[0])
        assert frame.features.shape == (*SIZE, FEATURE_SIZE) and frame.rgb.shape == (*SIZE, 3)
    assert (frames[1].features - frames[0].features).abs().max() > 0.01


def test_a_linear_blend_is_the_models_answer_to_the_cross_faded_image():
    model, (first, second) = student(local_patch=True, **WIDE), images()
    middle = list(interpolate(model, first, second, 3, SIZE))[1]
    features, _ = query_map(model, (first + second) / 2, SIZE)
    torch.testing.assert_close(middle.features, features[0])
    spherical = list(interpolate(model, first, second, 3, SIZE, blending="spherical"))[1]
    assert (spherical.features - middle.features).abs().max() > 0.01


@pytest.mark.parametrize("kept", ["a", "b"])
def test_the_patches_of_one_image_can_be_kept(kept):
    model, pair = student(local_patch=True, **WIDE), images()
    frames = list(interpolate(model, *pair, 2, SIZE, patches=kept))
    pixel_values = pair["ab".index(kept)]
    for frame, own in zip(frames, pair, strict=True):
        features, _ = query_map(model, pixel_values, SIZE, trigger_column=model.fold(own).detach())
        torch.testing.assert_close(frame.features, features[0])


def test_a_model_that_takes_its_columns_from_the_caller_is_given_them():
    model, columns = student(trigger_source="embedding", **WIDE), vectors(FEATURE_SIZE)
    frames = list(interpolate(model, None, None, 3, SIZE, trigger_columns=columns))
    features, _ = query_map(model, None, SIZE, trigger_column=(columns[0] + columns[1]) / 2)
    torch.testing.assert_close(frames[1].features, features[0])


def test_the_grid_is_the_size_where_none_is_given_and_there_may_be_no_colours():
    model = student(use_rgb_head=False, **WIDE)
    frame = next(interpolate(model, *images(), 2))
    grid = model.config.grid_size
    assert frame.features.shape == (grid, grid, FEATURE_SIZE) and frame.rgb is None


def test_the_border_of_a_fine_map_sees_whole_patches_alone():
    model = student(local_patch=True, **WIDE)
    constant = torch.ones(1, 3, STUDENT_SIZE, STUDENT_SIZE)
    column = torch.zeros(1, model.config.trigger_width)
    # Without positions, a constant image is the same everywhere unless a patch reaches over its edge.
    with torch.no_grad():
        for query in (model.decoder.query, model.decoder.rgb_head.query):
            query.row.weight.zero_()
            query.column.weight.zero_()
    features, _ = query_map(model, constant, (20, 30), trigger_column=column)
    torch.testing.assert_close(features, features[:, :1, :1].expand_as(features))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps: expected at least 2"),
        ({"patches": "both"}, "patches: expected one of"),
        ({"blending": "cubic"}, "blending: expected one of"),
        ({"size": (0, 4)}, "size: expected a positive"),
        ({"pixel_values_a": None}, "expected two images"),
        ({"trigger_columns": (torch.zeros(1, 9), torch.zeros(1, 8))}, "second: expected shape"),
        ({"model": torch.nn.Linear(2, 2)}, "expected an APMModel"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_frame(options, message):
    first, second = images()
    given = {
        "model": student(local_patch=True, **WIDE),
        "pixel_values_a": first,
        "pixel_values_b": second,
        "steps": 3,
        **options,
    }
    with pytest.raises(ValueError, match=message):
        interpolate(**given)


def test_a_model_with_local_patch_needs_images_beside_columns():
    model = student(local_patch=True, **WIDE)
    columns = tuple(model.fold(image).detach() for image in images())
    with pytest.raises(ValueError, match="local_patch=True"):
        interpolate(model, None, None, 2, trigger_columns=columns)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps"),
        ({"size": 3}, "size: expected at least 8"),
        ({"blending": "cubic"}, "blending"),
        ({"patches": "c"}, "patches"),
        ({"fps": 60}, "fps"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        InterpolationConfig(**options)


def test_the_pictures_are_the_same_bytes_every_time(tmp_path):
    model, photos = student(local_patch=True, **WIDE), (photo(0), photo(1))
    written = [
        interpolation_picture(
            photos,
            tmp_path / name,
            model,
            torch.cat(images()),
            (8, 10),
            config=InterpolationConfig(steps=3, size=10, fps=5),
            caption="a caption",
        )
        for name in ("first", "second")
    ]
    assert [path.name for path in written[0]][:2] == ["interpolation.png", "interpolation.gif"]
    assert [path.read_bytes() for path in written[0]] == [path.read_bytes() for path in written[1]]
    with Image.open(written[0][1]) as movie:
        num_frames = movie.n_frames
        assert num_frames == 4  # there and back: 0, 1/2, 1, 1/2
        hold = round(5 * 0.8)
        movie.seek(0)
        assert movie.info["duration"] == 200 * (hold + 1)
    strip = np.asarray(Image.open(written[0][0]).convert("RGB"))
    assert len(np.unique(strip.reshape(-1, 3), axis=0)) > 200
    assert math.isclose(strip.shape[1] / strip.shape[0], 5 / 2.6, rel_tol=0.5)
