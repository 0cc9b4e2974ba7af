"""Where the machine looks: coordinates, cell indices, the fixed 2-D sin-cos code, and the patch around a place.

Source: arXiv:2410.20535, section 3 (the code is the fixed one of MAE, arXiv:2111.06377, with the column first).
Coordinates are (y, x) in [-1, 1] and mean what `torch.nn.functional.grid_sample(align_corners=False)` means by them,
except that it takes (x, y).

Pure functions. Legend: B images, L locations, P width of the code, (rows, cols) the grid; locations are row-major.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_PERIOD = 10000.0  # arXiv:1706.03762, section 3.5


def cell_centres(size: int, *, device: torch.device | str | None = None) -> Tensor:
    """Centres of `size` equal cells of [-1, 1]: `(size,)`, float32."""
    return (2 * torch.arange(size, dtype=torch.float32, device=device) + 1) / size - 1


def grid_coordinates(rows: int, cols: int, *, device: torch.device | str | None = None) -> Tensor:
    """Cell centres of the grid: `(rows * cols, 2)`, (y, x), row-major, float32."""
    y, x = torch.meshgrid(cell_centres(rows, device=device), cell_centres(cols, device=device), indexing="ij")
    return torch.stack([y, x], dim=-1).flatten(0, 1)  # (rows, cols, 2) -> (L, 2)


def _not_half(coordinates: Tensor) -> Tensor:
    """Return coordinates in float32 at least: in bfloat16, arithmetic on them would be off by whole cells."""
    return coordinates.to(torch.promote_types(coordinates.dtype, torch.float32))


def coordinates_to_indices(coordinates: Tensor, rows: int, cols: int) -> Tensor:
    """Return real-valued cell indices `(..., 2)`, (row, column), at least float32: 0 is the first cell's centre.

    Args:
        coordinates: `(..., 2)`, (y, x) in [-1, 1], of any dtype.
    """
    coordinates = _not_half(coordinates)
    sizes = coordinates.new_tensor([rows, cols])
    return ((coordinates + 1) * sizes - 1) / 2


def sincos_code(indices: Tensor, size: int) -> Tensor:
    """1-D code of real-valued cell indices.

    Args:
        indices: `(...)`, in cells.
        size: width of the code, even.

    Returns:
        `(..., size)`: sin and cos interleaved, frequency k is 10000^(-2k/size); float32 or the dtype of the indices
        if wider.
    """
    indices = _not_half(indices)
    k = torch.arange(size // 2, dtype=indices.dtype, device=indices.device)
    angles = indices[..., None] * MAX_PERIOD ** (-2 * k / size)  # (...) -> (..., size / 2)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)  # (..., size / 2, 2) -> (..., size)


def position_code(coordinates: Tensor, rows: int, cols: int, size: int) -> Tensor:
    """2-D code of any coordinates.

    Args:
        coordinates: `(..., 2)`, (y, x) in [-1, 1]; outside of it the code simply continues.
        rows, cols: the grid that defines the unit of length.
        size: P, a multiple of 4.

    Returns:
        `(..., P)`, values in [-1, 1]: the column index in the first half, the row index in the second.
    """
    indices = coordinates_to_indices(coordinates, rows, cols).flip(-1)  # (..., 2), (column, row)
    return sincos_code(indices, size // 2).flatten(-2)  # (..., 2, P / 2) -> (..., P)


def sample_patches(pixel_values: Tensor, coordinates: Tensor, patch_size: int, scale: int = 1) -> Tensor:
    """The window around each location, sampled bilinearly, zero outside the image.

    Args:
        pixel_values: `(B, C, S, S)`.
        coordinates: `(1 or B, L, 2)`, (y, x) in [-1, 1], of any dtype; sampling takes float32 at least.
        patch_size: samples along a side of the window.
        scale: the window is `scale * patch_size` pixels wide, and its samples are means of `scale` x `scale` pixels;
            S is a multiple of it.

    Returns:
        `(B, L, C * patch_size**2)`, channels first; at a cell's centre, with scale 1, it is the cell's own patch.
    """
    coordinates = _not_half(coordinates)
    pixel_values = F.avg_pool2d(pixel_values, scale) if scale > 1 else pixel_values
    batch_size, _, height, width = pixel_values.shape
    offsets = torch.arange(patch_size, dtype=coordinates.dtype, device=coordinates.device) - (patch_size - 1) / 2
    y = coordinates[..., 0, None] + offsets * (2 / height)  # (1 or B, L, patch)
    x = coordinates[..., 1, None] + offsets * (2 / width)
    y, x = torch.broadcast_tensors(y[..., :, None], x[..., None, :])  # (1 or B, L, patch, patch)
    window = torch.stack([x, y], dim=-1).flatten(2, 3).expand(batch_size, -1, -1, -1)  # grid_sample takes (x, y)
    patches = F.grid_sample(pixel_values.to(window.dtype), window, align_corners=False)
    return patches.transpose(1, 2).flatten(2).to(pixel_values.dtype)  # (B, C, L, patch**2) -> (B, L, C * patch**2)
