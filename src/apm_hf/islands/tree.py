"""Build trees of wholes, parts and sub-parts: merge neighbouring locations step by step, and cut at any level.

The locations of a map are its leaves; at every step the two neighbouring regions that are closest merge (Ward's
method, or another linkage, with the grid as the only neighbourhood), so a region is always connected. Cuts are
nested: this is the part-whole hierarchy that GLOM expects of islands (Hinton 2021, arXiv:2102.12627).

Legend: F feature width, (rows, cols) a map of locations, L = rows * cols, K regions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from .clusters import check_finite, order_by_size, unit_features

LINKAGES = ("ward", "average", "complete", "single")

# Okabe & Ito's colours for all kinds of colour vision (https://jfly.uni-koeln.de/color/), without black.
_WHOLES = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (240, 228, 66), (213, 94, 0), (86, 180, 233))
# Half widths, in CIE L* and in degrees, of the range of lightness and hue of a whole's parts: lightness varies most,
# since it is visible with any colour vision. The range of hues narrows at every level.
_LIGHTNESS, _HUE, _HUE_SHRINK = 28.0, 28.0, 0.6
_DARKEST, _LIGHTEST = 25.0, 95.0


@dataclass(frozen=True, eq=False)
class RegionTree:
    """Hold all merges of neighbouring regions, from single locations to the complete map; made by `fit`.

    Args:
        shape: rows and columns.
        merge_heights: `(L - 1,)`, float64, the distance at which each merge happened: for Ward's method the
            square root of twice the growth of the summed squares, else the linkage's distance between unit features.
            Since only neighbours merge, a later merge can be closer than earlier ones; it then gets their height,
            so that heights never decrease.
    """

    shape: tuple[int, int]
    merge_heights: np.ndarray
    _parents: np.ndarray = field(repr=False)  # (2 L - 1,): leaves, then merges; the last is its own parent

    @classmethod
    def fit(cls, features: Tensor, *, linkage: str = "ward") -> "RegionTree":
        """Merge the locations of one map, by features of norm 1.

        Deterministic. Takes about a second for 96 x 96 locations of width 192, and slightly more than linear time in
        their number: for a fine figure fit a coarser map and show its cuts with `upsample_labels`.

        Args:
            features: `(rows, cols, F)`.
            linkage: `"ward"`, or `"average"`, `"complete"` or `"single"`: as in scikit-learn with a connectivity,
                which uses only the distances across the two regions' common border.

        Raises:
            ValueError: for another shape, an unknown linkage, or features that are not finite.
        """
        try:
            from sklearn.cluster import linkage_tree, ward_tree
            from sklearn.feature_extraction.image import grid_to_graph
        except ImportError as error:
            raise ImportError('region trees need scikit-learn: pip install "apm_hf[viz]"') from error
        if features.ndim != 3 or features.shape[0] * features.shape[1] < 2:
            raise ValueError(
                f"features: expected shape (rows, cols, F) with at least 2 locations, got {tuple(features.shape)}"
            )
        if linkage not in LINKAGES:
            raise ValueError(f"linkage: expected one of {list(LINKAGES)}, got {linkage!r}")
        check_finite(features)
        rows, cols = features.shape[:2]
        options = {"connectivity": grid_to_graph(rows, cols), "return_distance": True}
        vectors = unit_features(features).reshape(rows * cols, -1)
        if linkage == "ward":
            children, _, num_leaves, _, heights = ward_tree(vectors, **options)
        else:
            children, _, num_leaves, _, heights = linkage_tree(vectors, linkage=linkage, **options)
        parents = np.arange(2 * num_leaves - 1)
        parents[np.asarray(children)] = np.arange(num_leaves, 2 * num_leaves - 1)[:, None]  # (L - 1, 2)
        return cls((rows, cols), np.maximum.accumulate(heights), parents)

    @property
    def num_locations(self) -> int:
        """L, the number of leaves."""
        return self.shape[0] * self.shape[1]

    def cut(self, num_regions: int) -> np.ndarray:
        """Return `(rows, cols)`, regions 0 to `num_regions - 1`, the largest first, by undoing the last merges.

        Every region of a finer cut lies within one region of any coarser cut.

        Raises:
            ValueError: for less than one region or more than locations.
        """
        self._check(num_regions, "num_regions")
        num_nodes = 2 * self.num_locations - num_regions  # leaves and remaining merges
        roots = np.arange(num_nodes)
        inside = self._parents[:num_nodes] < num_nodes
        roots[inside] = self._parents[:num_nodes][inside]
        while (changed := roots[roots] != roots).any():
            roots[changed] = roots[roots][changed]
        return order_by_size(roots[: self.num_locations].reshape(self.shape))

    def cuts(self, nums_regions: Sequence[int]) -> list[np.ndarray]:
        """Return one label map `(rows, cols)` per number of regions."""
        return [self.cut(num_regions) for num_regions in nums_regions]

    def cut_at(self, height: float) -> np.ndarray:
        """Return `(rows, cols)`, the regions after all merges up to this height."""
        return self.cut(self.num_locations - int(np.searchsorted(self.merge_heights, height, side="right")))

    def height(self, num_regions: int) -> float:
        """Return the height at which `num_regions` regions were left, 0 if nothing has merged.

        Raises:
            ValueError: for less than one region or more than locations.
        """
        self._check(num_regions, "num_regions")
        num_merges = self.num_locations - num_regions
        return float(self.merge_heights[num_merges - 1]) if num_merges else 0.0

    def parents(self, coarse: int, fine: int) -> np.ndarray:
        """Return `(fine,)`: the region of `cut(coarse)` that contains each region of `cut(fine)`.

        Raises:
            ValueError: for a coarse cut with more regions than the fine one, or numbers that `cut` rejects.
        """
        self._check(coarse, "coarse")
        self._check(fine, "fine")
        if coarse > fine:
            raise ValueError(f"coarse: expected at most fine={fine} regions, got {coarse}")
        return _parents(self.cut(coarse), self.cut(fine))

    def _check(self, num_regions: int, name: str) -> None:
        if not 1 <= num_regions <= self.num_locations:
            raise ValueError(f"{name}: expected 1 to {self.num_locations}, the number of locations, got {num_regions}")


def upsample_labels(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize labels `(rows, cols)` to `size` `(rows', cols')`: every new cell takes the label at its centre."""
    places = [(2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(labels.shape, size, strict=True)]
    return labels[np.ix_(*places)]


def tree_colours(cuts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Colour nested label maps so that parts are recognisable as parts of their whole.

    Regions of the first, coarsest cut get colour-blind safe base colours (seven; then their lighter and darker
    versions). The parts of a region are shades of its colour: they divide its range of lightness by the number of
    regions each splits into in the last cut, and differ slightly in hue. A region that a finer cut does not split
    has the same colour there. Deterministic: equal cuts give equal colours.

    Args:
        cuts: `(rows, cols)` integers each, from coarse to fine, each nested in the one before.

    Returns:
        One `(rows, cols, 3)` per cut, float32 in [0, 1].

    Raises:
        ValueError: for no cuts, or cuts that are not nested.
    """
    try:
        from skimage.color import lab2rgb, lch2lab
    except ImportError as error:
        raise ImportError('colours of region trees need scikit-image: pip install "apm_hf[viz]"') from error
    if not len(cuts):
        raise ValueError("cuts: expected at least one label map, got none")
    maps = [order_by_size(np.asarray(cut)) for cut in cuts]
    colours = _whole_colours(maps[0].max() + 1)
    ranges = (colours[:, :1] + [-_LIGHTNESS, _LIGHTNESS]).clip(_DARKEST, _LIGHTEST)  # (K, 2)
    boxes = np.concatenate([ranges, np.full((len(colours), 1), np.radians(_HUE))], axis=1)
    pictures = []
    for number, labels in enumerate(maps):
        if number:
            weights = np.bincount(_parents(labels, maps[-1]))  # regions that each one splits into in the last cut
            colours, boxes = _part_colours(colours, boxes, _parents(maps[number - 1], labels), weights)
        pictures.append(lab2rgb(lch2lab(colours))[labels].clip(0, 1).astype(np.float32))
    return pictures


def _parents(coarse: np.ndarray, fine: np.ndarray) -> np.ndarray:
    """Return `(K',)`: the coarse region of each fine one, 0 to K' - 1."""
    if coarse.shape != fine.shape:
        raise ValueError(f"cuts: expected maps of one shape, got {coarse.shape} and {fine.shape}")
    pairs = np.unique(np.stack([fine.ravel(), coarse.ravel()], axis=1), axis=0)  # sorted by fine region
    if len(pairs) != fine.max() + 1:
        raise ValueError("cuts: expected every region to lie in one region of the cut before, got one across several")
    return pairs[:, 1]


def _whole_colours(num_wholes: int) -> np.ndarray:
    """Return base colours `(K, 3)`: lightness, chroma, hue in radians."""
    from skimage.color import lab2lch, rgb2lab

    base = lab2lch(rgb2lab(np.array(_WHOLES) / 255))
    wholes = np.arange(num_wholes)
    colours = base[wholes % len(base)]
    turns = wholes // len(base)  # 0, then darker, lighter, darker still, ...
    shift = np.where(turns % 2, -1, 1) * (turns + 1) // 2 * 12.0
    return _set_lightness(colours, np.clip(colours[:, 0] + shift, _DARKEST, _LIGHTEST))


def _part_colours(
    colours: np.ndarray, boxes: np.ndarray, parents: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return colours and boxes of the parts `(K', 3)`, from those of the wholes `(K, 3)`.

    A box is a range of lightness, darkest and lightest, and a half width of hue. Parts divide their whole's range by
    their weights `(K',)`.
    """
    part_colours, part_boxes = colours[parents].copy(), boxes[parents].copy()
    for whole, (darkest, lightest, hue_width) in enumerate(boxes):
        parts = np.flatnonzero(parents == whole)
        if len(parts) < 2:
            continue
        order = np.concatenate([parts[1::2][::-1], parts[::2]])  # the largest in the middle
        ends = darkest + (lightest - darkest) * np.cumsum([0, *weights[order]]) / weights[order].sum()
        turns = 2 * ((np.arange(len(order)) * 0.618034) % 1) - 1  # the golden ratio's multiples: neighbours differ
        part_boxes[order] = np.stack([ends[:-1], ends[1:], np.full(len(order), _HUE_SHRINK * hue_width)], axis=1)
        part_colours[order] = _set_lightness(part_colours[order], (ends[:-1] + ends[1:]) / 2)
        part_colours[order, 2] += hue_width * turns
    return part_colours, part_boxes


def _set_lightness(colours: np.ndarray, lightness: np.ndarray) -> np.ndarray:
    """Change the lightness of colours `(K, 3)`; chroma falls towards black and white, where displays have none."""
    light = colours[:, 0]
    chroma = colours[:, 1] * np.minimum(np.minimum(lightness / light, (100 - lightness) / (100 - light)), 1)
    return np.stack([lightness, chroma, colours[:, 2]], axis=1)
