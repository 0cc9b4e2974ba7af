"""Cluster features: find locations that agree, anywhere on the map.

Legend: L locations, F feature width, (rows, cols) a map of locations, row-major.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

# Locations normalised and assigned per chunk.
CHUNK_LOCATIONS = 2**16


def cluster(features: Tensor, num_clusters: int, *, seed: int = 0, max_locations: int = 4096) -> np.ndarray:
    """Cluster features with k-means on directions (features of norm 1).

    Args:
        features: `(..., F)`, e.g. `(L, F)` or `(rows, cols, F)`.
        num_clusters: number of clusters; fewer are found if there are fewer distinct features.
        seed: random seed of the initial centres and of the subset.
        max_locations: maximum size of the random subset that centres are fitted to; all locations are then
            assigned to their nearest centre.

    Returns:
        `(...)`, integers from 0 in the order of the clusters' sizes, the largest first.

    Raises:
        ValueError: for more clusters than locations, or than `max_locations`; for features that are not finite.
    """
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError('clustering needs scikit-learn: pip install "apm_hf[viz]"') from error
    flat = features.detach().flatten(0, -2)  # (..., F) -> (L, F)
    check_finite(flat)
    if not 1 <= num_clusters <= len(flat):
        raise ValueError(f"num_clusters: expected 1 to {len(flat)}, the number of locations, got {num_clusters}")
    if max_locations < num_clusters:
        raise ValueError(f"max_locations: expected at least num_clusters={num_clusters}, got {max_locations}")
    fitted = flat
    if len(flat) > max_locations:
        order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
        fitted = flat[order[:max_locations].to(flat.device)]
    # One thread: with several, the order of summation, and so the last bit, would depend on timing.
    with threadpool_limits(1, user_api="openmp"), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct features than clusters
        kmeans = KMeans(num_clusters, n_init=4, random_state=seed).fit(unit_features(fitted))
        labels = [kmeans.predict(unit_features(chunk)) for chunk in flat.split(CHUNK_LOCATIONS)]
    return order_by_size(np.concatenate(labels)).reshape(features.shape[:-1])


def order_by_size(labels: np.ndarray) -> np.ndarray:
    """Renumber a partition `(...)` from 0 by size, the largest first; ties in order of occurrence."""
    _, first, inverse, sizes = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
    rank = np.empty(len(sizes), dtype=np.int64)
    rank[np.lexsort((first, -sizes))] = np.arange(len(sizes))
    return rank[inverse.reshape(labels.shape)]


def unit_features(features: Tensor) -> np.ndarray:
    """Return features `(..., F)` scaled to norm 1, float32, on the CPU; zeros stay zeros."""
    return torch.nn.functional.normalize(features.detach().float().cpu(), dim=-1).numpy()


def check_finite(features: Tensor) -> None:
    """Raise a ValueError for features that are not finite."""
    if not features.isfinite().all():
        raise ValueError("features: expected finite numbers, got NaN or infinity")
