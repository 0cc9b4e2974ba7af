"""A teacher that is shown moved images answers between its patches."""

import pytest
import torch

from apm_hf import load_teacher
from apm_hf.teachers.dense_grids import encode_densely, moved
from fixtures_tiny import TEACHER_GRID, TEACHER_PATCH, TEACHER_SIZE, save_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return load_teacher(save_clip(tmp_path_factory.mktemp("clip")), device="cpu")


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("factor", [1, 2, 3, 4])
def test_a_fine_cell_is_what_the_teacher_says_where_its_patch_is_centred_there(clip, factor):
    pixels = noise(2, 3, TEACHER_SIZE, TEACHER_SIZE)
    fine = encode_densely(clip, pixels, factor, layers=[0, 2])
    side = TEACHER_GRID * factor
    assert fine.features.shape == (2, side, side, 16) and fine.levels.shape == (2, 2, side, side, 16)
    plain = clip.encode_images(pixel_values=pixels, layers=[0, 2])
    assert torch.equal(fine.image_embeds, plain.image_embeds)
    for row, column in ((0, 0), (factor - 1, 0), (0, factor - 1)):
        down, right = (((number + 0.5) / factor - 0.5) * TEACHER_PATCH for number in (row, column))
        answer = clip.encode_images(pixel_values=moved(pixels, down, right), layers=[0, 2])
        torch.testing.assert_close(fine.features[:, row::factor, column::factor], answer.features)
        torch.testing.assert_close(fine.levels[:, :, row::factor, column::factor], answer.levels)
    if factor % 2:  # the middle cells are the patches themselves
        torch.testing.assert_close(fine.features[:, factor // 2 :: factor, factor // 2 :: factor], plain.features)


def test_layer_zero_of_a_fine_cell_depends_on_the_pixels_around_it(clip):
    """Layer 0 is a patch's own projection: a spot is seen by the fine cells whose windows hold it, and no others."""
    spot = torch.zeros(1, 3, TEACHER_SIZE, TEACHER_SIZE)
    spot[..., 9, 18] = 5.0
    with_spot, without = (
        encode_densely(clip, pixels, 2, layers=[0]).levels[0, 0] for pixels in (spot, torch.zeros_like(spot))
    )
    touched = (with_spot - without).abs().amax(dim=-1) > 1e-6
    centres = (torch.arange(2 * TEACHER_GRID) + 0.5) * TEACHER_PATCH / 2
    rows, cols = ((centres - (place + 0.5)).abs() < TEACHER_PATCH / 2 for place in (9, 18))
    assert torch.equal(touched, rows[:, None] & cols[None]) and touched.any()


def test_a_moved_image_is_the_image_moved_and_reflected_at_its_edges():
    pixels = torch.arange(5 * 6, dtype=torch.float32).view(1, 1, 5, 6)
    window = moved(pixels, 2, -1)[0, 0]
    torch.testing.assert_close(window[:3, 1:], pixels[0, 0, 2:, :-1])
    torch.testing.assert_close(window[:3, 0], pixels[0, 0, 2:, 0])  # beyond the edge, its mirror image
    half = moved(pixels, 0, 0.5)[0, 0]
    torch.testing.assert_close(half[:, :-1], (pixels[0, 0, :, :-1] + pixels[0, 0, :, 1:]) / 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shift", [(3.75, -0.5), (-700.0, 9.0)], ids=["near", "beyond both edges"])
def test_a_moved_image_is_where_it_belongs_whatever_its_dtype(dtype, shift):
    """448 pixels a side: the places of a half-precision grid would be whole pixels apart, or NaN by reflection."""
    pixels = noise(2, 3, 448, 448).to(dtype)
    window = moved(pixels, *shift)
    expected = moved(pixels.double(), *shift)
    assert window.dtype == dtype
    # Positions are float32: a pixel and its neighbour, a few units apart, mix by some 1e-4 more or less.
    torch.testing.assert_close(window.double(), expected, rtol=torch.finfo(dtype).eps, atol=2e-3)


def test_autocast_leaves_the_places_of_a_moved_image_alone():
    pixels = noise(1, 3, 448, 448)
    with torch.autocast("cpu", torch.bfloat16):
        window = moved(pixels, 3.75, -0.5)
    assert torch.equal(window, moved(pixels, 3.75, -0.5))


@pytest.mark.parametrize("factor", [0, TEACHER_PATCH + 1])
def test_a_factor_is_at_least_one_and_at_most_a_patch(clip, factor):
    with pytest.raises(ValueError, match=f"factor: expected 1 to {TEACHER_PATCH}, the patch size, got {factor}"):
        encode_densely(clip, noise(1, 3, TEACHER_SIZE, TEACHER_SIZE), factor)
