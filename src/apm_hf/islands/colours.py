"""Map features to colours: principal components as in DINOv2 (arXiv:2304.07193, Fig. 1), t-SNE, UMAP.

t-SNE: van der Maaten & Hinton, JMLR 2008. UMAP: arXiv:1802.03426.

Legend: B images, L locations, F feature width, (rows, cols) a map of locations, row-major.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .clusters import check_finite, unit_features

# Quantiles at which values are clipped before colours are stretched to [0, 1].
CLIPPED = 0.02
METHODS = ("pca", "tsne", "umap")

_BACKGROUND = 0.15  # the grey that the background is blended with
# Number of principal components that neighbour embeddings use, as is usual; the rest is mostly noise.
_NUM_COMPONENTS = 50
_PERPLEXITY, _NUM_NEIGHBOURS = 30.0, 15  # scikit-learn's and umap-learn's defaults
# Colours at (0, 0), (0, 1), (1, 0), (1, 1) of the plane: they differ in lightness or on the blue-yellow axis, which
# nearly all colour-blind people perceive.
_CORNERS = ((0, 60, 160), (200, 40, 20), (70, 200, 220), (255, 225, 60))


@dataclass(frozen=True)
class PCAColours:
    """Map features to colours by three principal directions and one stretch, fitted once so that colours compare.

    Args:
        mean: `(F,)`.
        directions: `(F, 3)`; each one's entry of largest magnitude is positive, so that the same features give the
            same colours everywhere.
        low, high: `(3,)`, the projections that are mapped to 0 and 1.
    """

    mean: Tensor
    directions: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, features: Tensor, foreground: np.ndarray | Tensor | None = None) -> "PCAColours":
        """Fit to features `(..., F)` of any number of images.

        Args:
            foreground: `(...)`, bool, the locations to fit to; the full colour range then goes to them.

        Raises:
            ValueError: for a foreground of another shape or without a location.
        """
        flat = features.detach().flatten(0, -2)
        if foreground is not None:
            flat = flat[_mask(foreground, features).flatten().to(flat.device)]
            if not len(flat):
                raise ValueError("foreground: expected at least one location, got none")
        flat = flat.double().cpu()
        mean = flat.mean(dim=0)
        directions = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:3].T  # (F, 3), or fewer than 3
        directions = torch.nn.functional.pad(directions, (0, 3 - directions.shape[1]))
        directions = directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
        shares = torch.tensor([CLIPPED, 1 - CLIPPED], dtype=flat.dtype)
        low, high = torch.quantile((flat - mean) @ directions, shares, dim=0)
        return cls(mean, directions, low, high)

    def __call__(
        self, features: Tensor, foreground: np.ndarray | Tensor | None = None, *, recede: float = 0.85
    ) -> np.ndarray:
        """Return colours `(..., 3)` in [0, 1] of features `(..., F)`.

        Args:
            foreground: `(...)`, bool; other locations are mixed with a dark grey.
            recede: share of the grey, from 0 (no grey) to 1 (grey only).

        Raises:
            ValueError: for a foreground of another shape.
        """
        projected = (features.detach().double().cpu() - self.mean) @ self.directions
        colours = ((projected - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1)
        if foreground is not None:
            grey = colours.lerp(torch.full_like(colours, _BACKGROUND), recede)
            colours = torch.where(_mask(foreground, features).cpu()[..., None], colours, grey)
        return colours.float().numpy()


def foreground_mask(features: Tensor) -> np.ndarray:
    """Estimate which locations belong to the foreground from one map's features alone.

    A heuristic, as in DINOv2: the first principal component, divided by Otsu's threshold. DINOv2 chooses the side by
    eye; here the background is the side that has more of the map's border. It fails if the background varies more
    than the object, or the object fills the frame.

    Args:
        features: `(rows, cols, F)`.

    Returns:
        `(rows, cols)` bool; true everywhere if all features are equal.

    Raises:
        ValueError: for another shape, or features that are not finite.
    """
    try:
        from skimage.filters import threshold_otsu
    except ImportError as error:
        raise ImportError('the foreground mask needs scikit-image: pip install "apm_hf[viz]"') from error
    if features.ndim != 3:
        raise ValueError(f"features: expected shape (rows, cols, F), got {tuple(features.shape)}")
    check_finite(features)
    if _is_constant(features.flatten(0, 1)):
        return np.ones(features.shape[:2], dtype=bool)
    pca = PCAColours.fit(features)
    first = ((features.detach().double().cpu() - pca.mean) @ pca.directions[:, 0]).numpy()  # (rows, cols)
    values, counts = np.unique(first, return_counts=True)
    # Computed on the values themselves: a histogram's threshold lies within a bin and may misplace a few locations.
    mask = first > threshold_otsu(hist=(counts, values))
    border = np.ones(mask.shape, dtype=bool)
    border[1:-1, 1:-1] = False
    on_border, off_border = np.count_nonzero(mask & border), np.count_nonzero(~mask & border)
    # If both sides touch the border equally, the smaller one is the foreground.
    swap = on_border > off_border or (on_border == off_border and 2 * np.count_nonzero(mask) > mask.size)
    return ~mask if swap else mask


def embed_colours(
    features: Tensor, *, method: str = "pca", components: int = 3, seed: int = 0, max_locations: int = 2048
) -> np.ndarray:
    """Return colours of features embedded in one, two or three dimensions.

    Three dimensions are red, green and blue, with PCA as in [`PCAColours`]. Two are a plane between four corners in
    CIE Lab. One is the colormap viridis. t-SNE and UMAP compare directions (features of norm 1), start from the
    principal components and preserve neighbourhoods: distances between far colours are meaningless, and colours of
    two calls are not comparable. Equal seeds give equal bytes, on the same computer and versions.

    Args:
        features: `(..., F)`.
        method: `"pca"`, `"tsne"` (scikit-learn) or `"umap"` (umap-learn).
        components: 1, 2 or 3 dimensions.
        seed: random seed of t-SNE and UMAP.
        max_locations: maximum number of locations that t-SNE and UMAP embed, evenly spaced in row-major order; each
            other location takes the colour of the one with the nearest feature. t-SNE takes up to half a minute for
            2048 locations in three dimensions, UMAP as long once, to compile, and then seconds.

    Returns:
        `(..., 3)`, float32 in [0, 1].

    Raises:
        ValueError: for an unknown method or number of components; for features that are not finite.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {list(METHODS)}, got {method!r}")
    if components not in (1, 2, 3):
        raise ValueError(f"components: expected 1, 2 or 3, got {components}")
    if max_locations < 4:
        raise ValueError(f"max_locations: expected at least 4, got {max_locations}")
    flat = features.detach().flatten(0, -2)  # (..., F) -> (L, F)
    check_finite(flat)
    if method == "pca":
        colours = _coloured(PCAColours.fit(flat)(flat)[:, :components])
    else:
        colours = _coloured(_neighbour_embedding(flat, method, components, seed, max_locations))
    return colours.reshape(*features.shape[:-1], 3).astype(np.float32)


def _neighbour_embedding(flat: Tensor, method: str, components: int, seed: int, max_locations: int) -> np.ndarray:
    """Embed features `(L, F)` at positions `(L, components)` in [0, 1]."""
    try:
        from sklearn.decomposition import PCA
        from sklearn.neighbors import NearestNeighbors
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise ImportError('embeddings need scikit-learn: pip install "apm_hf[viz]"') from error
    # Ends included; all locations if there are few.
    chosen = torch.linspace(0, len(flat) - 1, min(len(flat), max_locations), dtype=torch.float64).round().long()
    vectors = unit_features(flat[chosen.to(flat.device)])
    if len(vectors) < 4 or _is_constant(torch.from_numpy(vectors)):
        return np.full((len(flat), components), 0.5)  # nothing to embed
    width = min(_NUM_COMPONENTS, len(vectors), vectors.shape[1])
    # One thread: with several, the order of summation would depend on timing.
    with threadpool_limits(1):
        pca = PCA(width, svd_solver="full").fit(vectors)
        reduced = pca.transform(vectors)
        # Add noise: features may span fewer directions than dimensions, and equal features must not start as one.
        start = 1e-3 * np.random.default_rng(seed).standard_normal((len(reduced), components))
        start[:, : min(components, width)] += reduced[:, :components] / reduced[:, 0].std()
        places = (_tsne if method == "tsne" else _umap)(reduced, start, seed)
        low, high = np.quantile(places, [CLIPPED, 1 - CLIPPED], axis=0)
        places = ((places - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
        if len(vectors) == len(flat):
            return places
        others = pca.transform(unit_features(flat))
        nearest = NearestNeighbors(n_neighbors=1).fit(reduced).kneighbors(others, return_distance=False)
        return places[nearest[:, 0]]


def _tsne(vectors: np.ndarray, start: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.manifold import TSNE

    # The initial scale is scikit-learn's for init="pca".
    perplexity = min(_PERPLEXITY, (len(vectors) - 1) / 3)
    tsne = TSNE(
        start.shape[1], perplexity=perplexity, init=(1e-4 * start).astype(np.float32), random_state=seed, n_jobs=1
    )
    return tsne.fit_transform(vectors)


def _umap(vectors: np.ndarray, start: np.ndarray, seed: int) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ImportWarning)  # warns that TensorFlow, which is not used, is missing
            from umap import UMAP
    except ImportError as error:
        raise ImportError('method="umap" needs umap-learn: pip install "apm_hf[umap]"') from error
    neighbours = min(_NUM_NEIGHBOURS, len(vectors) - 1)
    umap = UMAP(neighbours, start.shape[1], init=10 * start, random_state=seed, n_jobs=1)
    return umap.fit_transform(vectors)


def _coloured(places: np.ndarray) -> np.ndarray:
    """Map positions `(L, 1 to 3)` in [0, 1] to colours `(L, 3)`."""
    if places.shape[1] == 3:
        return places
    if places.shape[1] == 1:
        try:
            from matplotlib import colormaps
        except ImportError as error:
            raise ImportError('colormaps need matplotlib: pip install "apm_hf[viz]"') from error
        return colormaps["viridis"](places[:, 0])[:, :3]
    try:
        from skimage.color import lab2rgb, rgb2lab
    except ImportError as error:
        raise ImportError('the plane of colours needs scikit-image: pip install "apm_hf[viz]"') from error
    corners = rgb2lab(np.array(_CORNERS) / 255)
    y, x = places[:, :1], places[:, 1:]
    shares = np.concatenate([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], axis=1)  # (L, 4)
    return lab2rgb(shares @ corners).clip(0, 1)


def _mask(foreground: np.ndarray | Tensor, features: Tensor) -> Tensor:
    mask = torch.as_tensor(foreground)
    if mask.dtype != torch.bool or mask.shape != features.shape[:-1]:
        shape = tuple(features.shape[:-1])
        raise ValueError(f"foreground: expected bool of shape {shape}, got {mask.dtype} of shape {tuple(mask.shape)}")
    return mask


def _is_constant(flat: Tensor) -> bool:
    """Return whether features `(L, F)` are equal up to the rounding of float32."""
    return bool(((flat - flat[0]).abs() <= 1e-6 * flat.abs().max()).all())
