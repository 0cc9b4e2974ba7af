"""Draw figures and a table of what an APM outputs and how well it performs.

Legend: L locations, F feature width, S image side, (rows, cols) the teacher's grid.
"""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..islands import PCAColours, cluster
from ..islands.figures import load_matplotlib
from ..modeling_apm import APMModel
from ..position_encoding import grid_coordinates
from ..publishing.cards import CardFacts
from ..ttt import Adapted

MAP_SIZE = 48  # side of the map that is queried for a figure: finer than any grid of the demo
NUM_ISLANDS = 5


@dataclass(frozen=True)
class ImagePanels:
    """Hold all outputs for one image: panels `(height, width, 3)` in [0, 1] or label maps `(height, width)`."""

    condition: str
    panels: dict[str, np.ndarray]

    @classmethod
    def from_models(
        cls,
        condition: str,
        image: Any,
        pixel_values: Tensor,
        features: Tensor,
        models: Mapping[str, APMModel],
        adapted: Mapping[str, Adapted],
        *,
        index: int,
        trigger_column: Tensor | None = None,
    ) -> "ImagePanels":
        """Query all models for a fine map of one image.

        Args:
            image: PIL, the original image.
            pixel_values: `(1, 3, S, S)`.
            features: `(1, rows, cols, F)`, the teacher's.
            models: by name; the first is the one whose islands and colours are shown.
            adapted: models after test-time training, for all images of the condition.
            index: index of this image among them.
            trigger_column: `(1, D)` or tokens, where models take it from their teacher.
        """
        coordinates = grid_coordinates(MAP_SIZE, MAP_SIZE, device=pixel_values.device)
        colours = PCAColours.fit(features)
        panels = {"input": np.asarray(image.convert("RGB")) / 255, "teacher": colours(features[0])}
        for number, (name, model) in enumerate(models.items()):
            with torch.no_grad():
                outputs = model(pixel_values, coordinates, trigger_column=trigger_column)
            model_features = outputs.last_hidden_state[0]  # (L, F)
            # The student shares its teacher's colours; a control gets separate ones, which show its variation best.
            panels[name] = _square((colours if number == 0 else PCAColours.fit(model_features))(model_features))
            if number == 0:
                panels["islands"] = _square(cluster(model_features, NUM_ISLANDS))
                if outputs.rgb is not None:
                    panels["RGB decoded"] = _square(outputs.rgb[0].clamp(0, 1).cpu().numpy())
        for name, result in adapted.items():
            model_features = result[index : index + 1].query(coordinates).last_hidden_state
            assert model_features is not None
            panels[name] = _square(colours(model_features[0]))
        return cls(condition, panels)


def write_report(
    folder: Path,
    rows: Mapping[str, Mapping[str, float]],
    panels: Sequence[ImagePanels],
    losses: Mapping[str, Sequence[Tensor]],
    facts: CardFacts,
) -> tuple[str, list[Path]]:
    """Write `report.md`, `panels.png`, `adaptation.png` and `results.json`; return the table and the files."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("report.md", "panels.png", "adaptation.png", "results.json")
    paths = {name: folder / name for name in names}
    _draw_panels(paths["panels.png"], panels)
    _draw_adaptation(paths["adaptation.png"], losses)
    table = _table(rows, "top-1") + "\n" + _table(rows, "cosine")
    paths["results.json"].write_text(json.dumps(rows, indent=2) + "\n")
    paths["report.md"].write_text(
        f"# APM demo\n\nMade by `{facts.command}`; teacher: {facts.teacher}; images: {facts.dataset}.\n\n"
        "![output of each model](panels.png)\n\nColours are the first three principal components of the features; "
        "the distilled models share their teacher's, each control has separate ones.\n\n"
        "Top-1 accuracy on held-out images, and mean cosine between a model's features and its teacher's:\n\n"
        f"{table}"
        "\nLonger adaptation brings a model closer to its teacher, not to the labels: the teacher's row is the "
        "limit of plain test-time training.\n\n![loss against step](adaptation.png)\n"
    )
    return table, list(paths.values())


def write_photo_page(
    folder: Path, panels: Sequence[ImagePanels], words: Mapping[str, Mapping[str, float]], notes: str
) -> list[Path]:
    """Write `photos.md` and `photos.png`, what the embedded pair outputs for sample photos; return the files.

    Args:
        panels: of each photo.
        words: by photo, the teacher's probabilities of words, highest first.
        notes: what the words were chosen from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "photos.md", folder / "photos.png"
    _draw_panels(picture, panels)
    rows = [
        f"| {name} | " + ", ".join(f"{word} {100 * share:.0f} %" for word, share in shares.items()) + " |"
        for name, shares in words.items()
    ]
    page.write_text(
        "# Photographs\n\nThe sample photos of scikit-image and scikit-learn, from which nothing has learnt, seen by "
        "the small teacher of photos in the package and its dense student.\n\n![output of each model](photos.png)\n\n"
        "Colours are the first three principal components of the teacher's features. The control, a student with "
        "random weights beside the same teacher, interpolates the teacher's tokens, and has colours of its own.\n\n"
        f"The teacher's first three words, {notes}; it is often wrong about what it has not learnt:\n\n"
        "| photo | words |\n| --- | --- |\n" + "\n".join(rows) + "\n"
    )
    return [page, picture]


def _square(values: np.ndarray) -> np.ndarray:
    side = int(len(values) ** 0.5)
    return values.reshape(side, side, *values.shape[1:])


def _table(rows: Mapping[str, Mapping[str, float]], kind: str) -> str:
    columns = [column for column in next(iter(rows.values())) if column.startswith(kind)]
    if not columns:  # the teacher has no cosine to itself
        columns = [column for column in list(rows.values())[1] if column.startswith(kind)]
    lines = [f"| {kind} | " + " | ".join(column.split(", ")[1] for column in columns) + " |"]
    lines.append("| --- |" + " ---: |" * len(columns))
    for name, row in rows.items():
        if columns[0] in row:
            cells = (f"{100 * row[column]:.1f}" if kind == "top-1" else f"{row[column]:.3f}" for column in columns)
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _draw_panels(path: Path, panels: Sequence[ImagePanels]) -> None:
    _, figure_module = load_matplotlib()
    names = list(panels[0].panels)
    figure = figure_module.Figure(figsize=(1.5 * len(names), 1.6 * len(panels) + 0.5), layout="constrained", dpi=100)
    grid = figure.subplots(len(panels), len(names), squeeze=False)
    for row, image in zip(grid, panels, strict=True):
        for axes, name in zip(row, names, strict=True):
            axes.imshow(image.panels[name], cmap="tab10", vmin=0, vmax=10, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(image.condition.replace("_", " "))
    for axes, name in zip(grid[0], names, strict=True):
        axes.set_title("\n".join(textwrap.wrap(name, 14)), fontsize=9)
    figure.savefig(path, metadata={"Software": None})


def _draw_adaptation(path: Path, losses: Mapping[str, Sequence[Tensor]]) -> None:
    figure = load_matplotlib()[1].Figure(figsize=(6, 3.5), layout="constrained", dpi=100)
    axes = figure.subplots()
    for name, parts in losses.items():
        values = torch.cat(list(parts)).cpu().numpy()  # (images of all conditions, steps)
        values = values[:, ~np.isnan(values).all(axis=0)]  # steps before all images had stopped
        steps = np.arange(1, values.shape[1] + 1)
        low, middle, high = np.nanquantile(values, (0.25, 0.5, 0.75), axis=0)
        axes.plot(steps, middle, label=name)
        axes.fill_between(steps, low, high, alpha=0.2)
    axes.set(xlabel="step", ylabel="loss before the step (median, quartiles)", yscale="log")
    axes.legend()
    figure.savefig(path, metadata={"Software": None})
