"""Compute similarity maps: cosines of every location with a point of the image, or with a text.

Text is compared location by location as in MaskCLIP (arXiv:2112.01071): it needs features in the space of the text
embeddings, i.e. an APM distilled from a text-aligned teacher.

Legend: B images, K queries, F feature width, (rows, cols) a map of locations, row-major; coordinates are (y, x) in
[-1, 1].
"""

import torch
from torch import Tensor, nn

from ..ttt import Adapted
from ..ttt.maps import feature_map, query


def similarity_map(features: Tensor, query: Tensor) -> Tensor:
    """Return the cosine similarity of every location with every query.

    Args:
        features: `(B, rows, cols, F)`.
        query: `(F,)`, `(K, F)`, or `(B, K, F)` for per-image queries.

    Returns:
        `(B, K, rows, cols)`, float32 in [-1, 1]; 0 if a feature or a query is zero. K is 1 for a query `(F,)`.

    Raises:
        ValueError: for other shapes.
    """
    if features.ndim != 4:
        raise ValueError(f"features: expected shape (B, rows, cols, F), got {tuple(features.shape)}")
    batch_size, width = len(features), features.shape[-1]
    queries = query[None] if query.ndim == 1 else query  # (F,) -> (1, F)
    queries = queries.expand(batch_size, -1, -1) if queries.ndim == 2 else queries  # (K, F) -> (B, K, F)
    if queries.ndim != 3 or len(queries) != batch_size or queries.shape[-1] != width:
        expected = f"({width},), (K, {width}) or ({batch_size}, K, {width})"
        raise ValueError(f"query: expected shape {expected}, got {tuple(query.shape)}")
    queries = nn.functional.normalize(queries.to(features.device).float(), dim=-1)
    units = nn.functional.normalize(features.float(), dim=-1)
    return torch.einsum("byxf,bkf->bkyx", units, queries).clamp(-1, 1)


def similarity_to_point(
    model: nn.Module | Adapted,
    pixel_values: Tensor | None,
    point: tuple[float, float] | Tensor,
    size: tuple[int, int] | None = None,
    *,
    trigger_column: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Map each location's similarity to the APM's feature at a point.

    The model is queried at exactly this point, not at the nearest cell.

    Args:
        model, pixel_values, size, trigger_column, chunk_size: as in [`feature_map`].
        point: (y, x) in [-1, 1], or `(K, 2)`, the same in all images.

    Returns:
        `(B, K, rows, cols)`, cosines, float32.

    Raises:
        ValueError: for a point outside the image, or inputs that `feature_map` rejects.
    """
    points = torch.as_tensor(point, dtype=torch.float32)
    points = points[None] if points.ndim == 1 else points  # (2,) -> (1, 2)
    if points.ndim != 2 or points.shape[1] != 2 or not (points.abs() <= 1).all():
        raise ValueError(f"point: expected (y, x) in [-1, 1] or several, got {point}")
    options = {"trigger_column": trigger_column, "chunk_size": chunk_size}
    queries = query(model, pixel_values, points, **options).last_hidden_state  # type: ignore[arg-type]  # (B, K, F)
    assert queries is not None
    return similarity_map(feature_map(model, pixel_values, size, **options), queries)  # type: ignore[arg-type]


def similarity_to_text(
    model: nn.Module | Adapted,
    pixel_values: Tensor | None,
    text_embeds: Tensor,
    size: tuple[int, int] | None = None,
    *,
    trigger_column: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Map each location's similarity to text embeddings.

    Cosines with a single text mean little, since texts lie apart from images: compare several texts per location, the
    target class and alternatives.

    Args:
        model, pixel_values, size, trigger_column, chunk_size: as in [`feature_map`].
        text_embeds: `(F,)` or `(K, F)`, by `encode_text` of the text-aligned teacher the model was distilled from.

    Returns:
        `(B, K, rows, cols)`, cosines, float32.

    Raises:
        ValueError: for embeddings of another width, or inputs that `feature_map` rejects.
    """
    features = feature_map(model, pixel_values, size, trigger_column=trigger_column, chunk_size=chunk_size)
    if text_embeds.ndim > 2 or text_embeds.shape[-1] != features.shape[-1]:
        width = features.shape[-1]
        raise ValueError(f"text_embeds: expected shape ({width},) or (K, {width}), got {tuple(text_embeds.shape)}")
    return similarity_map(features, text_embeds)
