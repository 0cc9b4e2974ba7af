"""Make maps of features at any resolution: an APM is queried at each location, a teacher's grid is interpolated.

Source: arXiv:2410.20535, section 3: an APM can be queried at any coordinate, independent of its training grid.

Legend: B images, L locations, F feature width, N levels, (rows, cols) a map of locations, row-major; coordinates are
(y, x) in [-1, 1].
"""

import torch
from torch import Tensor, nn

from ..modeling_apm import APMModel, APMModelOutput
from ..position_encoding import grid_coordinates
from . import Adapted

# Fields of `APMModelOutput` with an entry for every location, which may be queried.
OUTPUTS = ("last_hidden_state", "rgb", "levels")


def feature_map(
    model: nn.Module | Adapted,
    pixel_values: Tensor | None,
    size: tuple[int, int] | None = None,
    *,
    trigger_column: Tensor | None = None,
    chunk_size: int | None = None,
    output: str = "last_hidden_state",
) -> Tensor:
    """Query a map of features, at the centres of `rows` x `cols` equal cells.

    Args:
        model: an [`APMModel`], a model that contains one, or models adapted to B images.
        pixel_values: `(B, C, S, S)`; None for adapted models, which hold their images.
        size: `(rows, cols)`; None is the model's grid.
        trigger_column: `(B, D)`; by default it is computed from `pixel_values`. None for adapted models.
        chunk_size: locations per chunk.
        output: `"last_hidden_state"`, `"rgb"` or `"levels"`.

    Returns:
        `(B, rows, cols, F)`, `(B, rows, cols, 3)` or, as a teacher's levels are, `(B, N, rows, cols, F)`; without
        gradients.

    Raises:
        ValueError: for a size that is not positive, for an output that is unknown or that the model does not have.
    """
    if output not in OUTPUTS:
        raise ValueError(f"output: expected one of {list(OUTPUTS)}, got {output!r}")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size: expected a positive (rows, cols), got {size}")
    grid = bare_model(model).config.grid_size
    # The model's grid needs no coordinates, and is cheaper without.
    coordinates = None if size in (None, (grid, grid)) else grid_coordinates(*size)
    outputs = query(model, pixel_values, coordinates, trigger_column=trigger_column, chunk_size=chunk_size)
    values = getattr(outputs, output, None)
    if values is None:
        raise ValueError(f"output: expected one that the model gives, got {output!r}, for which it has no head")
    values = values.unflatten(1, size or (grid, grid))  # (B, L, ...) -> (B, rows, cols, ...)
    return values.movedim(3, 1) if output == "levels" else values


def query(
    model: nn.Module | Adapted,
    pixel_values: Tensor | None,
    coordinates: Tensor | None,
    *,
    trigger_column: Tensor | None = None,
    chunk_size: int | None = None,
) -> APMModelOutput:
    """Query an APM or adapted models at coordinates `(L, 2)` or `(B, L, 2)`, without gradients."""
    apm = bare_model(model)
    coordinates = None if coordinates is None else coordinates.to(apm.device)
    if isinstance(model, Adapted):
        if pixel_values is not None or trigger_column is not None:
            raise ValueError("pixel_values, trigger_column: expected None for adapted models, which hold theirs")
        return model.query(coordinates, chunk_size=chunk_size)
    with torch.no_grad():
        options = {"trigger_column": trigger_column, "chunk_size": chunk_size, "heads": ()}
        return apm(pixel_values, coordinates, return_dict=True, **options)


def upsample(features: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate a grid of features bilinearly: the usual way to get a teacher's features between its patches.

    Args:
        features: `(..., rows, cols, F)`.
        size: `(rows', cols')`.

    Returns:
        `(..., rows', cols', F)`, of the features' dtype; cells are centred as in `feature_map`
        (`align_corners=False`), and the outermost values are repeated beyond the outermost centres.
    """
    maps = features.detach().flatten(0, -4) if features.ndim > 3 else features.detach()[None]
    maps = maps.movedim(-1, 1).to(torch.promote_types(maps.dtype, torch.float32))  # (M, rows, cols, F) -> (M, F, ...)
    maps = nn.functional.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)
    return maps.movedim(1, -1).reshape(*features.shape[:-3], *size, features.shape[-1]).to(features.dtype)


def bare_model(model: nn.Module | Adapted) -> APMModel:
    """Return the APM itself: the model, the one under a head, or the one that adapted models share."""
    apm = model.model if isinstance(model, Adapted) else getattr(model, "apm", model)
    if not isinstance(apm, APMModel):
        raise ValueError(
            f"model: expected an APMModel, a model that contains one or Adapted, got {type(model).__name__}"
        )
    return apm
