"""Measure how far features agree between neighbours and between distant locations, and whether they have collapsed.

There are islands if neighbours agree more than distant locations. Effective rank: Roy & Vetterli, EUSIPCO 2007,
"The effective rank: a measure of effective dimensionality".

Legend: L locations, F feature width, (rows, cols) a map of locations, row-major.
"""

import torch
from torch import Tensor

# Locations per chunk, so that no copy in float64 is as large as the features.
CHUNK_LOCATIONS = 2**14
# A difference below this share of its terms is rounding and has no direction.
_ROUNDING = 4 * torch.finfo(torch.float32).eps


def neighbour_agreement(features: Tensor, mean: Tensor | None = None, *, distance: int = 1) -> Tensor:
    """Return the mean cosine similarity of locations that are `distance` cells apart in a row or a column.

    Neighbours on a finer map lie closer together and agree more: compare maps of one resolution, together with
    `distant_agreement`.

    Args:
        features: `(..., rows, cols, F)`.
        mean: `(F,)`, subtracted first, e.g. that of a data set: a common offset is no agreement.
        distance: in cells.

    Returns:
        `(...)`, float32, one number per map; cosines of a feature of norm zero are 0.

    Raises:
        ValueError: for another shape, or if no two locations are that far apart.
    """
    units = _units(features, mean)
    rows, cols = units.shape[-3:-1]
    if not 1 <= distance < max(rows, cols):
        raise ValueError(f"distance: expected 1 to {max(rows, cols) - 1} cells on this map, got {distance}")
    vertical = torch.einsum("...f,...f->...", units[..., distance:, :, :], units[..., :-distance, :, :])
    horizontal = torch.einsum("...f,...f->...", units[..., distance:, :], units[..., :-distance, :])
    cosines = torch.cat([vertical.flatten(-2), horizontal.flatten(-2)], dim=-1)
    return cosines.mean(dim=-1, dtype=torch.float64).float()


def distant_agreement(
    features: Tensor,
    mean: Tensor | None = None,
    *,
    min_distance: int | None = None,
    num_pairs: int = 4096,
    seed: int = 0,
) -> Tensor:
    """Return the mean cosine similarity of random distant locations of the same map: the neighbours' control.

    Args:
        features, mean: as in `neighbour_agreement`.
        min_distance: cells between the two, vertically or horizontally; None is a quarter of the longer side.
        num_pairs: pairs drawn, the same for all maps.
        seed: random seed of the pairs.

    Returns:
        `(...)`, float32, one number per map.

    Raises:
        ValueError: for another shape, or if no two locations are that far apart.
    """
    units = _units(features, mean)
    rows, cols = units.shape[-3:-1]
    if min_distance is None:
        min_distance = max(1, max(rows, cols) // 4)
    if not 1 <= min_distance < max(rows, cols):
        raise ValueError(f"min_distance: expected 1 to {max(rows, cols) - 1} cells on this map, got {min_distance}")
    if num_pairs < 1:
        raise ValueError(f"num_pairs: expected a positive number, got {num_pairs}")
    generator, sizes = torch.Generator().manual_seed(seed), torch.tensor([rows, cols])
    drawn = torch.empty(0, 2, 2, dtype=torch.long)  # (pairs, the two of a pair, row and column)
    while len(drawn) < num_pairs:
        more = (torch.rand(num_pairs, 2, 2, generator=generator, dtype=torch.float64) * sizes).long()
        far = (more[:, 0] - more[:, 1]).abs().amax(dim=-1) >= min_distance
        drawn = torch.cat([drawn, more[far]])
    places = (drawn[:num_pairs] @ torch.tensor([cols, 1])).to(units.device)  # (num_pairs, 2), row-major
    units = units.flatten(-3, -2)  # (..., rows, cols, F) -> (..., L, F)
    total = torch.zeros(units.shape[:-2], dtype=torch.float64, device=units.device)
    for chunk in places.split(CHUNK_LOCATIONS):
        first, second = units[..., chunk[:, 0], :], units[..., chunk[:, 1], :]
        total += torch.einsum("...f,...f->...", first, second).sum(dim=-1, dtype=torch.float64)
    return (total / num_pairs).float()


def mean_pairwise_cosine(features: Tensor) -> float:
    """Return the exact mean cosine similarity of all pairs of different locations, in O(L F).

    The squared norm of the sum of all unit features is the sum over all pairs, so no pairs are formed.

    Args:
        features: `(..., F)`, all of them one set; cosines of a feature of norm zero are 0.

    Raises:
        ValueError: for fewer than two features.
    """
    flat = _flat(features)
    total = torch.zeros(flat.shape[-1], dtype=torch.float64, device=flat.device)
    diagonal = 0.0
    for chunk in flat.split(CHUNK_LOCATIONS):
        units = torch.nn.functional.normalize(chunk.double(), dim=-1)
        total += units.sum(dim=0)
        diagonal += float(units.square().sum())
    return (float(total.square().sum()) - diagonal) / (len(flat) * (len(flat) - 1))


def effective_rank(features: Tensor) -> float:
    """Return the exponential of the entropy of the centred features' singular values, normalised to sum 1.

    From 1, if all variation is along one line, to F, if it is equal in all directions; 0 for constant features.
    The singular values come from the F x F covariance, in float64.

    Args:
        features: `(..., F)`, all of them one set.

    Raises:
        ValueError: for fewer than two features.
    """
    flat = _flat(features)
    chunks = flat.split(CHUNK_LOCATIONS)
    mean = torch.stack([chunk.sum(dim=0, dtype=torch.float64) for chunk in chunks]).sum(dim=0) / len(flat)
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=flat.device)
    for chunk in chunks:
        centred = chunk.double() - mean
        scatter += centred.T @ centred
    # The rounding residual of constant features is no variation.
    if float(scatter.trace()) <= len(flat) * (1e-12**2) * float(mean.square().sum()):
        return 0.0
    values = torch.linalg.eigvalsh(scatter)
    values = values[values > len(mean) * torch.finfo(torch.float64).eps * values.max()].sqrt()
    shares = values / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def collapse(features: Tensor) -> dict[str, float]:
    """Measure whether features `(..., F)` of many images have collapsed to few varying directions or a single one.

    Returns:
        `effective_rank`; `max_effective_rank`, the maximum for this number and width of features; and
        `mean_pairwise_cosine`.
    """
    flat = _flat(features)
    return {
        "effective_rank": effective_rank(flat),
        "max_effective_rank": float(min(flat.shape[1], len(flat) - 1)),
        "mean_pairwise_cosine": mean_pairwise_cosine(flat),
    }


def _units(features: Tensor, mean: Tensor | None) -> Tensor:
    """Return features `(..., rows, cols, F)` minus the mean, scaled to norm 1 (or 0), in float32."""
    if features.ndim < 3:
        raise ValueError(f"features: expected shape (..., rows, cols, F), got {tuple(features.shape)}")
    vectors = features.detach().float()
    if mean is None:
        return torch.nn.functional.normalize(vectors, dim=-1)
    if mean.shape != features.shape[-1:]:
        raise ValueError(f"mean: expected shape ({features.shape[-1]},), got {tuple(mean.shape)}")
    mean = mean.detach().to(vectors)
    vectors = vectors - mean
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / norms.masked_fill(norms <= _ROUNDING * torch.linalg.vector_norm(mean), torch.inf)


def _flat(features: Tensor) -> Tensor:
    flat = features.detach().flatten(0, -2)  # (..., F) -> (L, F)
    if len(flat) < 2:
        raise ValueError(f"features: expected at least two, of shape (..., F), got {tuple(features.shape)}")
    return flat
