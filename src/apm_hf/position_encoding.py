"""Compute coordinates, cell indices, the fixed 2-D sin-cos code, and the image patches of locations.

Source: arXiv:2410.20535, section 3 (the code is the fixed one of MAE, arXiv:2111.06377, with the column first).
Coordinates are (y, x) in [-1, 1] as in `torch.nn.functional.grid_sample(align_corners=False)`, except that it takes
(x, y). Positions are computed in float32 or wider, independent of the dtype of the model.

Pure functions. Legend: B images, L locations, P width of the code, (rows, cols) the grid; locations are row-major.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_PERIOD = 10000.0  # arXiv:1706.03762, section 3.5


def cell_centres(size: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the centres of `size` equal cells of [-1, 1]: `(size,)`, float32."""
    return (2 * torch.arange(size, dtype=torch.float32, device=device) + 1) / size - 1


def grid_coordinates(rows: int, cols: int, *, device: torch.device | str | None = None) -> Tensor:
    """Return the cell centres of a grid: `(rows * cols, 2)`, (y, x), row-major, float32."""
    y, x = torch.meshgrid(cell_centres(rows, device=device), cell_centres(cols, device=device), indexing="ij")
    return torch.stack([y, x], dim=-1).flatten(0, 1)  # (rows, cols, 2) -> (L, 2)


def _not_half(coordinates: Tensor) -> Tensor:
    """Return coordinates in float32 at least: in bfloat16, arithmetic on them would be off by full cells."""
    return coordinates.to(torch.promote_types(coordinates.dtype, torch.float32))


def coordinates_to_indices(coordinates: Tensor, rows: int, cols: int) -> Tensor:
    """Return real-valued cell indices `(..., 2)`, (row, column), at least float32: 0 is the first cell's centre.

    Args:
        coordinates: `(..., 2)`, (y, x) in [-1, 1], of any dtype.
    """
    y, x = _not_half(coordinates).unbind(-1)
    return torch.stack([axis_indices(y, rows), axis_indices(x, cols)], dim=-1)


def axis_indices(positions: Tensor, size: int) -> Tensor:
    """Return real-valued cell indices, ((position + 1) n - 1) / 2, of positions in [-1, 1] among n = `size` cells."""
    return positions * (size / 2) + (size - 1) / 2


def sincos_code(indices: Tensor, size: int) -> Tensor:
    """Encode real-valued cell indices along one axis.

    Args:
        indices: `(...)`, in cells.
        size: width of the code, even.

    Returns:
        `(..., size)`: sin and cos interleaved, frequency k is 10000^(-2k/size); float32 or the dtype of the indices
        if wider.
    """
    return axis_codes(size, indices)[0]


def axis_codes(size: int, *axes: Tensor) -> list[Tensor]:
    """Return the `sincos_code` of each tensor of indices, all on one device."""
    if len(axes) > 1 and all(indices.shape == axes[0].shape for indices in axes):  # in one pass
        return list(sincos_code(torch.stack(axes), size).unbind())
    dtype = torch.promote_types(axes[0].dtype, torch.float32)
    last = 2 / size - 1  # the exponent of the last frequency
    frequencies = torch.logspace(0, last, size // 2, base=MAX_PERIOD, dtype=dtype, device=axes[0].device)
    angles = [indices[..., None] * frequencies for indices in axes]  # (...) -> (..., size / 2)
    return [torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2) for angle in angles]  # -> (..., size)


def position_code(coordinates: Tensor, rows: int, cols: int, size: int) -> Tensor:
    """Encode coordinates in two dimensions.

    Args:
        coordinates: `(..., 2)`, (y, x) in [-1, 1]; the code continues outside.
        rows, cols: the grid that defines the unit of length.
        size: P, a multiple of 4.

    Returns:
        `(..., P)`, values in [-1, 1]: the column index in the first half, the row index in the second.
    """
    indices = coordinates_to_indices(coordinates, rows, cols).flip(-1)  # (..., 2), (column, row)
    return sincos_code(indices, size // 2).flatten(-2)  # (..., 2, P / 2) -> (..., P)


def sample_patches(pixel_values: Tensor, coordinates: Tensor, patch_size: int, scale: int = 1) -> Tensor:
    """Sample the window around each location bilinearly, zero outside the image.

    Args:
        pixel_values: `(B, C, S, S)`.
        coordinates: `(1 or B, L, 2)`, (y, x) in [-1, 1], of any dtype; sampling takes float32 at least.
        patch_size: samples along a side of the window.
        scale: the window is `scale * patch_size` pixels wide, and its samples are means of `scale` x `scale` pixels;
            S is a multiple of it.

    Returns:
        `(B, L, C * patch_size**2)`, channels first; at a cell's centre, with scale 1, it is the cell's patch.
    """
    return _windows(F.avg_pool2d(pixel_values, scale) if scale > 1 else pixel_values, coordinates, patch_size)


def _windows(pixel_values: Tensor, coordinates: Tensor, patch_size: int) -> Tensor:
    coordinates = _not_half(coordinates)
    batch_size, _, height, width = pixel_values.shape
    offsets = torch.arange(patch_size, dtype=coordinates.dtype, device=coordinates.device) - (patch_size - 1) / 2
    y = coordinates[..., 0, None] + offsets * (2 / height)  # (1 or B, L, patch)
    x = coordinates[..., 1, None] + offsets * (2 / width)
    y, x = torch.broadcast_tensors(y[..., :, None], x[..., None, :])  # (1 or B, L, patch, patch)
    window = torch.stack([x, y], dim=-1).flatten(2, 3).expand(batch_size, -1, -1, -1)  # grid_sample takes (x, y)
    patches = F.grid_sample(pixel_values.to(window.dtype), window, align_corners=False)
    return patches.transpose(1, 2).flatten(2).to(pixel_values.dtype)  # (B, C, L, patch**2) -> (B, L, C * patch**2)


def sample_grid(features: Tensor, coordinates: Tensor) -> Tensor:
    """Interpolate a grid of features bilinearly; beyond the outermost centres the outermost values go on.

    Args:
        features: `(B, rows, cols, F)`.
        coordinates: `(1 or B, L, 2)`, (y, x) in [-1, 1], of any dtype; sampling takes float32 at least.

    Returns:
        `(B, L, F)`, of the features' dtype.
    """
    places = _not_half(coordinates).flip(-1)[:, None]  # grid_sample takes (x, y)
    places = places.expand(features.shape[0], -1, -1, -1)  # `len` would be a constant in exported graphs
    maps = features.movedim(-1, 1).to(places.dtype)  # (B, rows, cols, F) -> (B, F, rows, cols)
    sampled = F.grid_sample(maps, places, padding_mode="border", align_corners=False)  # (B, F, 1, L)
    return sampled[:, :, 0].transpose(1, 2).to(features.dtype)


def grid_patches(pixel_values: Tensor, patch_size: int, scale: int = 1) -> Tensor:
    """Extract the window around every cell's centre: `sample_patches` on the grid, without interpolation if possible.

    Args:
        pixel_values: `(B, C, S, S)`, S a multiple of `patch_size` and of `scale`.
        patch_size, scale: as in `sample_patches`.

    Returns:
        `(B, L, C * patch_size**2)`, for the cells of the grid of S / patch_size rows and columns.
    """
    if scale > 1 and patch_size % (2 * scale):  # windows start between the pixels of the averaged image
        side = pixel_values.shape[-1] // patch_size
        coordinates = grid_coordinates(side, side, device=pixel_values.device)[None]
        return sample_patches(pixel_values, coordinates, patch_size, scale)
    averaged = F.avg_pool2d(pixel_values, scale) if scale > 1 else pixel_values
    stride = patch_size // scale
    margin = (patch_size - stride) // 2  # margin of the window around its cell
    return F.unfold(averaged, patch_size, padding=margin, stride=stride).transpose(1, 2)  # (B, Q, L) -> (B, L, Q)


def averaged(pixel_values: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Return the images averaged over s x s pixels for every scale s: `(B, C, S / s, S / s)` each."""
    return [F.avg_pool2d(pixel_values, scale) if scale > 1 else pixel_values for scale in scales]


def sample_local_patches(images: Sequence[Tensor], coordinates: Tensor, patch_size: int) -> Tensor:
    """Sample the windows of [`local_patches`] from images that were [`averaged`] for its scales, once for all."""
    return torch.cat([_windows(image, coordinates, patch_size) for image in images], dim=-1)


def local_patches(
    pixel_values: Tensor, patch_size: int, scales: Sequence[int], coordinates: Tensor | None = None
) -> Tensor:
    """Concatenate the windows of all scales around each location: `(B, L, len(scales) * C * patch_size**2)`.

    Args:
        pixel_values, patch_size: as in `sample_patches`.
        coordinates: `(1 or B, L, 2)`; None is the centres of the image's grid.
    """
    if coordinates is None:
        return torch.cat([grid_patches(pixel_values, patch_size, scale) for scale in scales], dim=-1)
    return sample_local_patches(averaged(pixel_values, scales), coordinates, patch_size)
