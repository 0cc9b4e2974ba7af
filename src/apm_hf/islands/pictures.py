"""Draw the islands of a photo as a figure, together with controls.

Controls are needed because the position code is smooth and looks like islands, too. Every model is compared with one
with random weights, and with its own outputs for the photo's pixels in random order, which carry no information but
positions.

Source: islands are from GLOM (arXiv:2102.12627); those of an APM, arXiv:2410.20535, section 4.

Legend: F feature width, (rows, cols) a map of locations, row-major; coordinates are (y, x) in [-1, 1].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..modeling_apm import APMModel
from ..runs.files import write_atomically
from ..ttt.maps import feature_map, query, upsample
from ..ttt.photos import map_size, query_map, random_model
from .colours import METHODS, PCAColours, embed_colours
from .figures import png_bytes
from .panels import Panel, draw_panels, draw_regions
from .similarity import similarity_map
from .tree import RegionTree, tree_colours

# Longer side of the maps that trees are fitted on: it takes seconds, finer maps take minutes.
_TREE_SIZE = 96


@dataclass(frozen=True, kw_only=True)
class IslandsConfig:
    """Configure the figure of a photo's islands.

    Args:
        size: locations along the longer side of the maps.
        heights: numbers of regions at which the tree is cut, ascending: wholes, parts, parts of parts.
        colours: how features are coloured: `"pca"`, `"tsne"` or `"umap"`.
        points: (y, x) in [-1, 1]; a similarity map is drawn for each.
        seed: random seed of the controls and of t-SNE and UMAP.

    Raises:
        ValueError: for a value outside its range.
    """

    size: int = 256
    heights: Sequence[int] = (2, 6, 20)
    colours: str = "pca"
    points: Sequence[tuple[float, float]] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 8:
            raise ValueError(f"size: expected at least 8 locations along the longer side, got {self.size}")
        if not self.heights or min(self.heights) < 1 or list(self.heights) != sorted(set(self.heights)):
            raise ValueError(f"heights: expected ascending numbers of regions, got {list(self.heights)}")
        if any(max(abs(y), abs(x)) > 1 for y, x in self.points):
            raise ValueError(f"points: expected (y, x) in [-1, 1], got {list(self.points)}")
        if self.colours not in METHODS:
            raise ValueError(f"colours: expected one of {list(METHODS)}, got {self.colours!r}")


def islands_picture(
    photo: Image.Image,
    output_dir: Path,
    model: APMModel,
    pixel_values: Tensor,
    *,
    config: IslandsConfig,
    trigger_column: Tensor | None = None,
    teacher_features: Tensor | None = None,
    text_embeds: Mapping[str, Tensor] | None = None,
    caption: str = "",
) -> Path:
    """Write `islands.png`: photo, features and tree above; comparisons below.

    The controls are a model with random weights (`random`) and the same model with the photo's pixels, or its trigger
    column, in random order (`shuffled`); each has separate colours, which show its variation best.

    Args:
        photo: the original photo.
        model: the model to query.
        pixel_values: `(1, C, S, S)`, the photo as the model's input.
        trigger_column: `(1, D)`, for `trigger_source="embedding"`.
        teacher_features: `(rows, cols, F)`, the teacher's grid; drawn, together with the model's error to it.
        text_embeds: `(F,)` each, by text; a similarity map is drawn for each.
        caption: text below the figure.

    Raises:
        ValueError: for more regions than locations.
    """
    size = map_size(photo, config.size)
    features, rgb = _one_map(model, pixel_values, size, trigger_column)
    colours = PCAColours.fit(features)
    shown = colours(features)
    if config.colours != "pca":
        shown = embed_colours(features, method=config.colours, seed=config.seed)
    name = {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}[config.colours]
    picture = np.asarray(photo)
    above = [Panel("photo", picture), Panel(f"features ({name})", shown)]
    tree_size = map_size(photo, min(config.size, _TREE_SIZE))
    cuts = RegionTree.fit(_one_map(model, pixel_values, tree_size, trigger_column)[0]).cuts(config.heights)
    above += [
        Panel(_region_title(config.heights, index), draw_regions(picture, cut, fill))
        for index, (cut, fill) in enumerate(zip(cuts, tree_colours(cuts), strict=True))
    ]
    below = []
    if teacher_features is not None:
        below.append(Panel("teacher, upsampled", colours(upsample(teacher_features, size))))
        errors = error_map(model, pixel_values, teacher_features, trigger_column=trigger_column).cpu().numpy()
        unit = f"1 - cosine, mean {errors.mean():.3f}"
        below.append(Panel("error to teacher", errors, unit, colormap="magma", smooth=False))
    if rgb is not None:
        below.append(Panel("RGB decoded", rgb.float().cpu().numpy()))
    below += _controls(model, pixel_values, size, trigger_column, config.seed)
    for point in config.points:
        at_point = query(model, pixel_values, torch.tensor([point]), trigger_column=trigger_column).last_hidden_state
        assert at_point is not None
        similar = similarity_map(features[None], at_point)[0, 0].cpu().numpy()
        below.append(Panel("like the point", similar, "cosine", point=point))
    for text, embeds in (text_embeds or {}).items():
        below.append(Panel(f"“{text}”", similarity_map(features[None], embeds)[0, 0].cpu().numpy(), "cosine"))
    path = output_dir / "islands.png"
    write_atomically(path, png_bytes(draw_panels([above, below], size[0] / size[1], caption)))
    return path


def photos_picture(
    photos: Sequence[Image.Image],
    path: Path,
    model: APMModel,
    control: APMModel,
    pixel_values: Tensor,
    *,
    trigger_column: Tensor | None = None,
    heights: Sequence[int] = (2, 6),
    size: int = 64,
) -> Path:
    """Write a figure with a row for each photo: features, regions, and features of a model with random weights.

    Args:
        photos: B square photos.
        path: of the PNG file.
        control: the model with random weights, see [`apm_hf.APM.control`].
        pixel_values, trigger_column: `(B, C, S, S)` and `(B, ...)`, the model's inputs of these photos.
        heights: numbers of regions, ascending.
        size: locations along a side of the maps.
    """
    rows = []
    for index, photo in enumerate(photos):
        pixels, column = (None if x is None else x[index : index + 1] for x in (pixel_values, trigger_column))
        assert pixels is not None
        features, beside = (_one_map(one, pixels, (size, size), column)[0] for one in (model, control))
        cuts, picture = RegionTree.fit(features).cuts(heights), np.asarray(photo)
        regions = [draw_regions(picture, cut, fill) for cut, fill in zip(cuts, tree_colours(cuts), strict=True)]
        row = [Panel("photo", picture), Panel("features", PCAColours.fit(features)(features))]
        row += [Panel(f"{height} regions", region) for height, region in zip(heights, regions, strict=True)]
        rows.append([*row, Panel("control: random", PCAColours.fit(beside)(beside))])
    write_atomically(path, png_bytes(draw_panels(rows, 1.0, dpi=90)))
    return path


def error_map(model: APMModel, pixel_values: Tensor, teacher_features: Tensor, **options: Any) -> Tensor:
    """Return 1 - cosine of model and teacher at the centres of the teacher's patches: `(rows, cols)`, float32.

    Args:
        teacher_features: `(rows, cols, F)`.
        **options: options of [`feature_map`].
    """
    rows, cols = teacher_features.shape[:2]
    predicted = feature_map(model, pixel_values, (rows, cols), **options)[0]
    return 1 - F.cosine_similarity(predicted.float(), teacher_features.to(predicted.device).float(), dim=-1)


def shuffled(values: Tensor, start_dim: int, *, seed: int) -> Tensor:
    """Shuffle values within the dimensions from `start_dim` on, in the same order for all leading indices."""
    flat = values.flatten(start_dim)
    order = torch.randperm(flat.shape[-1], generator=torch.Generator().manual_seed(seed))
    return flat[..., order.to(values.device)].view_as(values)


def _controls(
    model: APMModel, pixel_values: Tensor, size: tuple[int, int], trigger_column: Tensor | None, seed: int
) -> list[Panel]:
    random = random_model(model.config, seed=seed).to(model.device)
    noise = shuffled(pixel_values, 2, seed=seed)
    column = None if trigger_column is None else shuffled(trigger_column, 1, seed=seed)
    panels = []
    for name, control, pixels, trigger in (
        ("random", random, pixel_values, trigger_column),
        ("shuffled", model, noise, column),
    ):
        predicted, _ = _one_map(control, pixels, size, trigger)
        # Separate colours, which show a control's variation best.
        panels.append(Panel(f"control: {name}", PCAColours.fit(predicted)(predicted)))
    return panels


def _one_map(
    model: APMModel, pixel_values: Tensor, size: tuple[int, int], trigger_column: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return features `(rows, cols, F)` and colours `(rows, cols, 3)` or None of one image."""
    features, rgb = query_map(model, pixel_values, size, trigger_column=trigger_column)
    return features[0], None if rgb is None else rgb[0]


def _region_title(heights: Sequence[int], index: int) -> str:
    names = ("wholes", "parts", "sub-parts")
    return f"{names[index]} ({heights[index]})" if len(heights) == len(names) else f"{heights[index]} regions"
