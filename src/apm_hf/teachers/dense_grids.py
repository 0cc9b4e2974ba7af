"""Compute a teacher's features between its patches: shift the image by fractions of a patch and interlace the grids.

A vision transformer outputs one feature per patch. Shifted images have other patches, so features on a finer grid need
no interpolation; FeatUp (arXiv:2403.10516) learns from such jittered views. An APM can be queried at exactly the
coordinates of these features.

Legend: B images, N levels, C width of the vision tower, F width of the teacher's embeddings, (rows, cols) its grid.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..modeling_apm import FINER
from ..position_encoding import cell_centres
from . import Teacher, TeacherOutput


def encode_densely(
    teacher: Teacher, pixel_values: Tensor, factor: int, *, layers: Sequence[int] | None = None
) -> TeacherOutput:
    """Encode images on a grid `factor` times as fine as the teacher's, in factor**2 passes.

    Args:
        pixel_values: `(B, 3, H, W)`, made by the teacher's image processor.
        factor: fine cells along a side of a patch; 1 is one plain pass.
        layers: see [`Teacher.encode_images`].

    Returns:
        [`TeacherOutput`] with `features` `(B, rows * factor, cols * factor, F)` and, if requested, `levels`
        `(B, N, rows * factor, cols * factor, C)`; `image_embeds` are those of the unshifted image.

    Raises:
        ValueError: for a factor below 1 or above the patch's pixels.
    """
    if not 1 <= factor <= teacher.patch_size:
        raise ValueError(f"factor: expected 1 to {teacher.patch_size}, the patch size, got {factor}")
    plain = teacher.encode_images(pixel_values=pixel_values, layers=layers)
    if factor == 1:
        return plain
    finer = {name: _finer(values, factor) for name, values in plain.items() if name != "image_embeds"}
    for row in range(factor):
        for column in range(factor):
            # From the centre of a patch to the centre of the fine cell, in pixels.
            shift = [((number + 0.5) / factor - 0.5) * teacher.patch_size for number in (row, column)]
            outputs = plain
            if any(shift):
                outputs = teacher.encode_images(pixel_values=moved(pixel_values, *shift), layers=layers)
            for name, values in finer.items():  # (..., rows, cols, width)
                values[..., row::factor, column::factor, :] = outputs[name]
    return TeacherOutput(image_embeds=plain.image_embeds, **finer)


def tokens_at_half(teacher: Teacher, pixel_values: Tensor) -> Tensor:
    """Return a teacher's features `(B, rows, cols, F)` of images at half their side, as [`APMModel.fold`] does.

    Args:
        pixel_values: `(B, 3, H, W)`, a dense student's inputs; normalised as the teacher's are.
    """
    features = teacher.encode_images(pixel_values=F.avg_pool2d(pixel_values, FINER)).features
    assert features is not None
    return features


def moved(pixel_values: Tensor, down: float, right: float) -> Tensor:
    """Return the content of a window shifted by `down` and `right` pixels; the image is reflected at its edges.

    Args:
        pixel_values: `(B, C, H, W)`, of any floating-point dtype.
        down, right: in pixels; fractions are interpolated bilinearly.

    Returns:
        `(B, C, H, W)`, of the same dtype; positions and sampling are at least float32.
    """
    height, width = pixel_values.shape[-2:]
    # Half precision would be off by full pixels, so positions and sampling take float32 at least. They are computed as
    # sums, since autocast would round the matrix product in `affine_grid`.
    pixels = pixel_values.to(torch.promote_types(pixel_values.dtype, torch.float32))
    y = cell_centres(height, device=pixels.device) + 2 * down / height
    x = cell_centres(width, device=pixels.device) + 2 * right / width
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], dim=-1)  # (H, W, 2); grid_sample takes (x, y)
    grid = grid.to(pixels.dtype).expand(len(pixels), -1, -1, -1)
    window = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    return window.to(pixel_values.dtype)


def _finer(values: Tensor, factor: int) -> Tensor:
    *leading, rows, cols, width = values.shape
    return values.new_empty(*leading, rows * factor, cols * factor, width)
