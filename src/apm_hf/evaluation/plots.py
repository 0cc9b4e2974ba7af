"""Draw the figures of an evaluation as PNG bytes; equal inputs give equal bytes with the same matplotlib.

Every figure has panels; a method has the same colour, marker and dash in all of them. Reference methods (the teacher)
are black or grey. Accuracies come in as [0, 1] and are drawn in %.

Colours are those of Okabe & Ito, which colour-blind readers can distinguish (https://jfly.uni-koeln.de/color).
"""

import itertools
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..islands.figures import load_matplotlib, png_bytes
from .metrics import NUM_BINS, bin_numbers, expected_calibration_error
from .statistics import Interval, mean_interval

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_GREYS = ("#000000", "#767676", "#A9A9A9")
_DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
_MARKERS = "osD^vPX<>p*h"
_PANEL = 3.1  # inches


@dataclass(frozen=True)
class Curve:
    """Hold the points of one curve: accuracies with intervals.

    Args:
        x: positions, ascending; one value for a single point.
        y: accuracy at each of `x`.
        spread: `(low, high)` of `x`, for points.
        stop: step at which a method stopped by itself, and its accuracy.
    """

    x: Sequence[float]
    y: Sequence[Interval]
    spread: tuple[float, float] | None = None
    stop: tuple[float, Interval] | None = None


@dataclass(frozen=True)
class Panels:
    """Describe the content of one figure.

    Args:
        title: title of the figure.
        methods: title of every method -> whether it is a reference; the order sets colours, so pass all of a run's.
        curves: panel title -> method title -> curve.
        chance: accuracy of guessing, in [0, 1].
        references: panel title -> method title -> accuracy that a horizontal line marks.
    """

    title: str
    methods: Mapping[str, bool]
    curves: Mapping[str, Mapping[str, Curve]]
    chance: float
    references: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)

    @property
    def shown(self) -> list[str]:
        """Return the methods that some panel shows, in order."""
        drawn = {name for part in (self.curves, self.references) for by_method in part.values() for name in by_method}
        return [name for name in self.methods if name in drawn]


def draw_severity(panels: Panels) -> bytes:
    """Draw accuracy against severity, one panel per corruption; severity 0 is the clean image."""
    with _figure(panels.title, list(panels.curves), panels.methods, panels.shown) as (figure, grid, styles):
        for axes, (title, curves) in zip(grid, panels.curves.items(), strict=True):
            for number, (method, curve) in enumerate(curves.items()):
                # Side by side, so that intervals do not hide each other.
                shift = 0.04 * (number - (len(curves) - 1) / 2) * min(1, 8 / len(curves))
                error_bars(axes, [x + shift for x in curve.x], curve.y, label=method, **styles[method])
            axes.set(xlabel="severity (0: clean)", xticks=sorted({x for curve in curves.values() for x in curve.x}))
            axes.set_ylim(bottom=0)
            _finish(axes, title, panels.chance)
        return _png(figure, grid)


def draw_steps(panels: Panels) -> bytes:
    """Draw accuracy against gradient steps, its interval as a band, the end of each method as a large marker.

    `references` are drawn as horizontal lines: the teacher's accuracy without any step.
    """
    with _figure(panels.title, list(panels.curves), panels.methods, panels.shown, wide=True) as (figure, grid, styles):
        for axes, (title, curves) in zip(grid, panels.curves.items(), strict=True):
            for name, accuracy in panels.references.get(title, {}).items():
                line = {key: styles[name][key] for key in ("color", "linestyle")}
                axes.axhline(100 * accuracy.mean, label=name, linewidth=1.5, **line)
            for name, curve in curves.items():
                line = {key: styles[name][key] for key in ("color", "linestyle")}
                axes.plot(curve.x, [100 * value.mean for value in curve.y], label=name, **line)
                band = ([100 * value.low for value in curve.y], [100 * value.high for value in curve.y])
                axes.fill_between(curve.x, *band, color=line["color"], alpha=min(0.13, 0.5 / len(curves)), linewidth=0)
                if curve.stop is not None:
                    error_bars(axes, [curve.stop[0]], [curve.stop[1]], **{**styles[name], "markersize": 8})
            axes.set_xlabel("gradient step")
            axes.xaxis.get_major_locator().set_params(integer=True)
            _finish(axes, title, panels.chance)
        return _png(figure, grid)


def draw_cost(panels: Panels) -> bytes:
    """Draw accuracy against seconds per image on a log axis, with intervals both ways."""
    with _figure(panels.title, list(panels.curves), panels.methods, panels.shown, wide=True) as (figure, grid, styles):
        for axes, (title, points) in zip(grid, panels.curves.items(), strict=True):
            for method, point in points.items():
                if panels.methods[method]:
                    line = {key: styles[method][key] for key in ("color", "linestyle")}
                    axes.axhline(100 * point.y[0].mean, linewidth=0.7, **line)
                error_bars(axes, point.x, point.y, spread=point.spread, label=method, **styles[method])
            axes.set(xlabel="seconds per image (log)", xscale="log")
            axes.tick_params(axis="x", which="both", length=3.5, pad=3.5)
            axes.xaxis.set_major_formatter(_plain_numbers())
            axes.xaxis.set_minor_formatter(_plain_numbers(few=True))
            _finish(axes, title, panels.chance)
        return _png(figure, grid)


def draw_reliability(
    title: str, methods: Mapping[str, bool], predictions: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> bytes:
    """Draw accuracy against confidence, a panel per method with its ECE; bars show the share of predictions.

    Args:
        title: title of the figure.
        methods: as in [`Panels`].
        predictions: method title -> `(confidence, correct, images)`, each `(N,)`.
    """
    with _figure(title, list(predictions), methods) as (figure, grid, styles):
        for axes, (method, (confidence, correct, images)) in zip(grid, predictions.items(), strict=True):
            bins = bin_numbers(confidence)
            shares = np.bincount(bins, minlength=NUM_BINS) / len(bins)
            left = 100 * np.arange(NUM_BINS) / NUM_BINS
            colour = styles[method]["color"]
            axes.bar(left, 100 * shares, width=100 / NUM_BINS, align="edge", color=colour, alpha=0.18, linewidth=0)
            axes.plot([0, 100], [0, 100], color="#999999", linewidth=1, linestyle=(0, (4, 2)))
            filled = np.flatnonzero(shares)
            means = [100 * confidence[bins == number].mean() for number in filled]
            accuracies = [mean_interval(correct[bins == number], groups=images[bins == number]) for number in filled]
            error_bars(axes, means, accuracies, **{**styles[method], "linestyle": "-"})
            error = expected_calibration_error(confidence, correct)
            axes.set_title(f"{_wrapped(method)}\nECE {100 * error:.1f} %", fontsize=9)
            axes.set(xlim=(0, 100), ylim=(0, 102), xticks=range(0, 101, 25), yticks=range(0, 101, 25), aspect="equal")
            axes.set(xlabel="confidence, %", ylabel="top-1 accuracy, %")
        figure.supxlabel(
            "Points: accuracy in a bin of confidence, 95 % interval.  Dashed: calibrated; below it, "
            "overconfident.  Bars: share of the predictions, %.",
            fontsize=8,
        )
        return _png(figure, grid)


def error_bars(axes: Any, x: Sequence[float], y: Sequence[Interval], *, spread: Any = None, **style: Any) -> None:
    """Draw means with their intervals as bars, in percent."""
    means = [100 * value.mean for value in y]
    below = [100 * (value.mean - value.low) for value in y]
    above = [100 * (value.high - value.mean) for value in y]
    across = None if spread is None else [[max(0.0, x[0] - spread[0])], [max(0.0, spread[1] - x[0])]]
    axes.errorbar(x, means, yerr=[below, above], xerr=across, elinewidth=0.8, linewidth=1.3, **style)


def _finish(axes: Any, title: str, chance: float) -> None:
    """Set the title and the accuracy axis, and mark the level of chance where it is visible."""
    low, high = axes.get_ylim()
    if low <= 100 * chance <= high:
        axes.axhline(100 * chance, color="#999999", linewidth=1, linestyle=":", zorder=0)
        axes.annotate("chance", (0.01, 100 * chance), xycoords=("axes fraction", "data"), va="bottom", fontsize=7)
    axes.set_title(_wrapped(title), fontsize=9)
    axes.set_ylabel("top-1 accuracy, %")
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)


def _styles(methods: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    """Return plot styles by method; a style does not change when other methods are left out of a figure."""
    ordinary, reference = itertools.count(), itertools.count()
    styles = {}
    for name, is_reference in methods.items():
        number = next(reference if is_reference else ordinary)
        colours = _GREYS if is_reference else COLOURS
        styles[name] = {
            "color": colours[number % len(colours)],
            "linestyle": _DASHES[(number if is_reference else number // len(colours)) % len(_DASHES)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "markersize": 4,
            "markerfacecolor": "white" if is_reference else colours[number % len(colours)],
        }
    return styles


@contextmanager
def _figure(
    title: str,
    panels: Sequence[str],
    methods: Mapping[str, bool],
    legend: Sequence[str] = (),
    *,
    wide: bool = False,
) -> Iterator[tuple[Any, list[Any], dict[str, dict[str, Any]]]]:
    """Yield a figure, its axes and the methods' styles, independent of the user's matplotlib settings.

    Wide panels have one accuracy axis each; others share one.
    """
    matplotlib, figure_module = load_matplotlib()
    columns = min(len(panels), max(2, min(4, math.ceil(len(panels) ** 0.5))))
    rows = math.ceil(len(panels) / columns)
    width, height = (1.5 * _PANEL, 1.25 * _PANEL) if wide else (_PANEL, _PANEL)
    with matplotlib.style.context("default", after_reset=True):
        lines = sum(_wrapped(name).count("\n") + 1.4 for name in legend)
        size = (width * columns + (2.4 if legend else 0), max(height * rows + 0.5, 0.2 + 0.145 * lines))
        figure = figure_module.Figure(figsize=size, layout="constrained", dpi=110)
        grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=not wide).flat)
        for axes in grid[len(panels) :]:
            axes.remove()
        # Over the panels, not over the legend next to them.
        wrapped = "\n".join(textwrap.wrap(title, int(10 * width * columns)))
        figure.suptitle(wrapped, x=0.01, horizontalalignment="left", fontsize=11)
        styles = _styles(methods)
        if legend:
            handles = [matplotlib.lines.Line2D([], [], label=_wrapped(name), **styles[name]) for name in legend]
            figure.legend(handles=handles, loc="outside right upper", fontsize=8, frameon=False)
        yield figure, grid[: len(panels)], styles


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 30))


def _plain_numbers(*, few: bool = False) -> Any:
    """Format ticks as 0.05 instead of 5 x 10^-2; of the minor ticks only 2 and 5."""
    from matplotlib.ticker import FuncFormatter

    def text(value: float, _: int) -> str:
        leading = round(value / 10 ** math.floor(math.log10(value)))
        return f"{value:.4g}" if not few or leading in (2, 5) else ""

    return FuncFormatter(text)


def _png(figure: Any, grid: Sequence[Any]) -> bytes:
    for axes in grid:  # axes.label_outer() would leave columns whose last row has no panel without labels
        spec = axes.get_subplotspec()
        columns = spec.get_gridspec().ncols
        is_lowest = spec.num1 + columns >= len(grid)
        axes.tick_params(labelbottom=is_lowest)
        axes.set_xlabel(axes.get_xlabel() if is_lowest else "")
        if spec.num1 % columns:
            axes.set_ylabel("")
    return png_bytes(figure)
