"""The position code against its formula, and coordinates against `torch.nn.functional.grid_sample`."""

import math

import pytest
import torch
from torch.nn import functional as F

from apm_hf.position_encoding import (
    cell_centres,
    coordinates_to_indices,
    grid_coordinates,
    position_code,
    sample_patches,
    sincos_code,
)
from naive_apm import naive_grid_coordinates, naive_position_code


def test_code_of_a_known_location():
    # P = 8 leaves two frequencies a half: 10000^0 = 1 and 10000^(-2 / 4) = 0.01. Row 1, column 2 of a 4 x 4 grid.
    code = position_code(torch.tensor([-0.25, 0.25]), 4, 4, 8)
    column = [math.sin(2), math.cos(2), math.sin(0.02), math.cos(0.02)]
    row = [math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)]
    torch.testing.assert_close(code, torch.tensor(column + row), rtol=0, atol=1e-6)


@pytest.mark.parametrize("reach", [1.0, 5.0], ids=["inside", "outside"])
@pytest.mark.parametrize("size", [4, 20, 64])
def test_code_follows_its_formula_everywhere(size, reach):
    rows, cols = 3, 5
    coordinates = (torch.rand(7, 2, generator=torch.Generator().manual_seed(0)) * 2 - 1) * reach
    expected = torch.stack([naive_position_code(y, x, rows, cols, size) for y, x in coordinates.double()])
    actual = position_code(coordinates, rows, cols, size)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-5)


def test_code_of_whole_cells_is_the_code_of_their_centres():
    by_index = sincos_code(torch.arange(6), 16)
    by_coordinate = position_code(torch.stack([torch.zeros(6), cell_centres(6)], dim=-1), 6, 6, 32)[:, :16]
    torch.testing.assert_close(by_index, by_coordinate, rtol=0, atol=1e-5)


def test_column_stands_in_the_first_half_and_row_in_the_second():
    code = position_code(grid_coordinates(3, 5), 3, 5, 16).unflatten(0, (3, 5))
    torch.testing.assert_close(code[..., :8], code[:1, :, :8].expand(3, -1, -1), rtol=0, atol=0)
    torch.testing.assert_close(code[..., 8:], code[:, :1, 8:].expand(-1, 5, -1), rtol=0, atol=0)
    assert (code[:, 0, :8] - code[:, 1, :8]).abs().max() > 0.1
    assert (code[0, :, 8:] - code[1, :, 8:]).abs().max() > 0.1


def test_every_cell_has_its_own_code():
    code = position_code(grid_coordinates(8, 8), 8, 8, 64)
    distances = torch.cdist(code, code) + torch.eye(64) * 10
    assert distances.min() > 0.5


def test_grid_coordinates_are_row_major_cell_centres():
    torch.testing.assert_close(grid_coordinates(3, 5).double(), naive_grid_coordinates(3, 5), rtol=0, atol=1e-6)


def test_grid_coordinates_are_where_grid_sample_looks():
    rows, cols = 3, 5
    identity = F.affine_grid(torch.eye(2, 3)[None], [1, 1, rows, cols], align_corners=False)[0]
    torch.testing.assert_close(grid_coordinates(rows, cols), identity.flatten(0, 1).flip(-1), rtol=0, atol=1e-6)
    image = torch.arange(15.0).reshape(1, 1, rows, cols)
    window = grid_coordinates(rows, cols).flip(-1).reshape(1, rows, cols, 2)
    torch.testing.assert_close(F.grid_sample(image, window, align_corners=False), image, rtol=0, atol=1e-4)


def test_indices_count_cells_from_the_first_centre():
    indices = coordinates_to_indices(grid_coordinates(3, 5), 3, 5)
    expected = torch.tensor([(float(r), float(c)) for r in range(3) for c in range(5)])
    torch.testing.assert_close(indices, expected, rtol=0, atol=1e-5)
    corners = coordinates_to_indices(torch.tensor([[-1.0, -1.0], [1.0, 1.0]]), 3, 5)
    torch.testing.assert_close(corners, torch.tensor([[-0.5, -0.5], [2.5, 4.5]]), rtol=0, atol=1e-6)


def test_leading_shape_is_kept():
    coordinates = torch.rand(2, 3, 4, 2)
    code = position_code(coordinates, 4, 4, 8)
    assert code.shape == (2, 3, 4, 8)
    torch.testing.assert_close(code[1, 2, 3], position_code(coordinates[1, 2, 3], 4, 4, 8))


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.int64, torch.float32),
    ],
)
def test_code_is_never_computed_in_less_than_float32(given, returned):
    code = sincos_code(torch.arange(200).to(given), 8)
    assert code.dtype == returned
    torch.testing.assert_close(code[:, 0].double(), torch.arange(200.0).double().sin(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_coordinates_are_taken_for_the_places_they_name(dtype):
    """Rounded coordinates are exact numbers; what is worked out from them is not rounded again."""
    coordinates, pixels = grid_coordinates(32, 32).to(dtype), torch.rand(1, 3, 448, 448)
    for derive in (
        lambda places: coordinates_to_indices(places, 32, 32),
        lambda places: position_code(places, 32, 32, 64),
        lambda places: sample_patches(pixels, places[None], 14),
    ):
        derived = derive(coordinates)
        assert derived.dtype == torch.float32 and torch.equal(derived, derive(coordinates.float()))


def test_coordinates_live_on_the_device_asked_for():
    assert cell_centres(3, device="meta").is_meta
    assert grid_coordinates(3, 3, device="meta").is_meta
    assert position_code(torch.empty(5, 2, device="meta"), 3, 3, 8).is_meta
