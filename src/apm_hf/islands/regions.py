"""Convert a label map to a graph of regions and their borders.

Legend: K regions, E edges, F feature width, (rows, cols) a map of locations, row-major; coordinates are (y, x) in
[-1, 1], at the centres of the map's cells.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..position_encoding import grid_coordinates


@dataclass(frozen=True, eq=False)
class RegionGraph:
    """Hold regions and their borders; made by `region_graph`. Rows of `edges` are sorted, with indices 0 to K - 1.

    Args:
        labels: `(K,)`, the regions' labels in the label map, ascending.
        sizes: `(K,)`, in locations.
        centroids: `(K, 2)`, (y, x) in [-1, 1]; may be outside a concave region.
        features: `(K, F)`, float32, means over the region.
        edges: `(E, 2)`, pairs of regions that touch along a side of a cell, the first less than the second.
        boundary_lengths: `(E,)`, in sides of cells.
        similarities: `(E,)`, float32, cosines between the two regions' mean features.
    """

    labels: np.ndarray
    sizes: np.ndarray
    centroids: np.ndarray
    features: np.ndarray
    edges: np.ndarray
    boundary_lengths: np.ndarray
    similarities: np.ndarray

    def to_networkx(self) -> Any:
        """Return a `networkx.Graph`: nodes 0 to K - 1 with `label`, `size` and `centroid`, edges with
        `boundary_length` and `similarity`."""
        try:
            import networkx
        except ImportError as error:
            raise ImportError("to_networkx needs networkx: pip install networkx") from error
        graph = networkx.Graph()
        for node, (label, size, centroid) in enumerate(zip(self.labels, self.sizes, self.centroids, strict=True)):
            graph.add_node(node, label=int(label), size=int(size), centroid=tuple(centroid.tolist()))
        for edge, length, similarity in zip(self.edges, self.boundary_lengths, self.similarities, strict=True):
            graph.add_edge(*edge.tolist(), boundary_length=int(length), similarity=float(similarity))
        return graph


def region_graph(labels: np.ndarray, features: Tensor) -> RegionGraph:
    """Build the graph of a label map's regions, with their mean features and neighbours.

    A region is all locations of one label, connected or not: `skimage.measure.label` would split k-means' clusters
    into connected ones; a `RegionTree`'s are connected.

    Args:
        labels: `(rows, cols)`, integers.
        features: `(rows, cols, F)`.

    Returns:
        [`RegionGraph`].

    Raises:
        ValueError: for other shapes, or labels that are no integers.
    """
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels: expected integers of shape (rows, cols), got {labels.dtype} {labels.shape}")
    if features.ndim != 3 or tuple(features.shape[:2]) != labels.shape:
        raise ValueError(f"features: expected shape {(*labels.shape, 'F')}, got {tuple(features.shape)}")
    names, inverse, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    regions = inverse.reshape(labels.shape)
    means = _means(regions, features.detach().flatten(0, 1), sizes)
    edges, boundary_lengths = _edges(regions)
    units = torch.nn.functional.normalize(means, dim=-1)
    similarities = (units[edges[:, 0]] * units[edges[:, 1]]).sum(dim=-1).clamp(-1, 1)
    return RegionGraph(
        labels=names,
        sizes=sizes,
        centroids=_means(regions, grid_coordinates(*labels.shape), sizes).numpy(),
        features=means.float().numpy(),
        edges=edges,
        boundary_lengths=boundary_lengths,
        similarities=similarities.float().numpy(),
    )


def _means(regions: np.ndarray, values: Tensor, sizes: np.ndarray) -> Tensor:
    """Return `(K, F)`, float64: the mean over each region of values `(rows * cols, F)`."""
    sums = torch.zeros(len(sizes), values.shape[1], dtype=torch.float64)
    sums.index_add_(0, torch.from_numpy(regions.ravel()), values.double().cpu())
    return sums / torch.from_numpy(sizes)[:, None]


def _edges(regions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return `(E, 2)`, pairs of neighbours, and `(E,)`, the number of cell sides that they share."""
    down = np.stack([regions[:-1].ravel(), regions[1:].ravel()], axis=1)
    right = np.stack([regions[:, :-1].ravel(), regions[:, 1:].ravel()], axis=1)
    pairs = np.sort(np.concatenate([down, right]), axis=1)
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0, return_counts=True)
