"""Define ready-made evaluations for `apm evaluate --suite NAME`.

`smoke` needs only this package; `photos` takes a folder of labelled photos; `ood` and `fine_grained` are the paper's
tables (arXiv:2410.20535), on data sets from the Hub.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...assets import DEMO_MODEL, DEMO_TEACHER
from ...data.corruptions import CORRUPTION_NAMES
from ...runs.processes import process_state
from ..plan import CLEAN, Sweep, short_name
from ..report import write_model_index, write_report
from .runner import EvaluationConfig, run_evaluation

TEACHER_METHODS = ("zero_shot", "ensemble", "mean_views", "recentred_batch", "recentred_stream")
VIEW_METHODS = ("zero", "mta")
APM_METHODS = ("apm_fast", "apm_fast_stable", "apm_fast_views", "apm_fast_filtered_views", "apm_fast_recentred")
CONTROLS = ("apm_output_bias", "apm_random")  # the second queries the complete grid: as slow as TPT
DISTILLED_METHODS = ("apm_distilled", "apm_distilled_fast")
# Seconds per image on a CPU with a thousand classes and a grid of a thousand locations.
SLOW_METHODS = ("tpt", "apm_paper")

NATURAL_SHIFTS = ("imagenet", "imagenet_a", "imagenet_v2", "imagenet_r", "imagenet_sketch")
FINE_GRAINED = (
    "flowers102",
    "dtd",
    "pets",
    "stanford_cars",
    "ucf101",
    "caltech101",
    "food101",
    "sun397",
    "aircraft",
    "eurosat",
)


def smoke(benchmark: str, teachers: tuple[str, ...], distilled: bool) -> list[Sweep]:
    """Return sweeps of every method over a few drawn scenes: a minute, no network."""
    methods = (*TEACHER_METHODS, *VIEW_METHODS, "tpt", "apm_fast", *CONTROLS, *(DISTILLED_METHODS * distilled))
    common: dict[str, Any] = {"benchmarks": (benchmark,), "teachers": teachers}
    return [
        Sweep(methods=methods, max_images=24, **common),
        Sweep(
            methods=("zero_shot", "recentred_batch", "apm_fast"),
            corruptions=("gaussian_noise", "contrast"),
            severities=(1, 3, 5),
            max_images=12,
            **common,
        ),
    ]


def photos(benchmark: str, teachers: tuple[str, ...], distilled: bool) -> list[Sweep]:
    """Return sweeps over 1,000 clean photos, 64 under every corruption, 24 for slow methods: 30 min on two cores."""
    methods = (*TEACHER_METHODS, *VIEW_METHODS, *APM_METHODS, CONTROLS[0], *(DISTILLED_METHODS * distilled))
    common: dict[str, Any] = {"benchmarks": (benchmark,), "teachers": teachers}
    return [
        Sweep(methods=methods, max_images=1000, **common),
        Sweep(methods=(*SLOW_METHODS, CONTROLS[1]), max_images=24, **common),
        Sweep(
            methods=("zero_shot", "recentred_batch", "recentred_stream", "apm_fast", "apm_fast_recentred"),
            corruptions=CORRUPTION_NAMES,
            severities=(1, 3, 5),
            max_images=64,
            **common,
        ),
    ]


def ood(benchmark: str, teachers: tuple[str, ...], distilled: bool) -> list[Sweep]:
    """Return sweeps over the paper's natural shifts and ImageNet-C; needs a GPU."""
    methods = (*TEACHER_METHODS, *VIEW_METHODS, "tpt", "apm_paper", *APM_METHODS, *(DISTILLED_METHODS * distilled))
    return [
        Sweep(benchmarks=NATURAL_SHIFTS, teachers=teachers, methods=methods),
        Sweep(
            benchmarks=("imagenet",),
            teachers=teachers,
            corruptions=CORRUPTION_NAMES,
            severities=(5,),
            methods=methods,
        ),
    ]


def fine_grained(benchmark: str, teachers: tuple[str, ...], distilled: bool) -> list[Sweep]:
    """Return sweeps over the paper's fine-grained data sets."""
    methods = (*TEACHER_METHODS, *VIEW_METHODS, "tpt", "apm_paper", *APM_METHODS, *(DISTILLED_METHODS * distilled))
    return [Sweep(benchmarks=FINE_GRAINED, teachers=teachers, methods=methods)]


SUITES: dict[str, Callable[[str, tuple[str, ...], bool], list[Sweep]]] = {
    "smoke": smoke,
    "photos": photos,
    "ood": ood,
    "fine_grained": fine_grained,
}
CUSTOM = "custom"
FOR_CARDS = ("apm_distilled_fast", "apm_distilled", "apm_fast")  # the first one that ran goes into the card


def evaluate(
    suite: str,
    *,
    output_dir: str,
    data: Sequence[str] = (),
    teachers: Sequence[str] = (),
    model: str | None = None,
    methods: Sequence[str] = (),
    corruptions: Sequence[str] = (),
    severities: Sequence[int] = (),
    seeds: Sequence[int] = (),
    max_images: int | None = None,
    max_unreadable_images: int = 0,
    batch_size: int = 16,
    num_views: int = 16,
    allow_chance: bool = False,
    command: str = "",
) -> Path:
    """Run a suite, or with `suite="custom"` the sweep that the other arguments describe, and write the report.

    Args:
        suite: one of `SUITES`, or `"custom"`.
        output_dir: folder of results and report; an interrupted run is resumed there.
        data: benchmarks: registered names, folders, files, Hub names, or `NAME=FOLDER` for a local copy of a
            registered benchmark. Suites over Hub data sets accept only the last form.
        teachers: names or folders.
        model: a distilled APM.
        methods: methods of a custom sweep; for a suite, the subset of its methods to run.
        corruptions, severities: replace the suite's, in its corrupted sweeps.
        seeds, max_images: replace the suite's, in every sweep.
        max_unreadable_images, batch_size, num_views, allow_chance, command: see [`EvaluationConfig`].

    Returns:
        The folder with `report.md` and, if an APM was evaluated, `model_index.json` for a model card.

    Raises:
        ValueError: for an unknown suite, or one that lacks its data or its teacher; see also [`run_evaluation`].
    """
    places = dict(entry.split("=", 1) for entry in data if "=" in entry)
    benchmarks = [entry for entry in data if "=" not in entry] + ([*places] if suite in ("photos", CUSTOM) else [])
    if suite == "smoke" and not teachers:
        teachers, model = [DEMO_TEACHER], model or DEMO_MODEL
    if suite not in (*SUITES, CUSTOM):
        raise ValueError(f"suite: expected one of {sorted([*SUITES, CUSTOM])}, got {suite!r}")
    if not teachers:
        raise ValueError(f"teachers: expected one or more for suite {suite!r}, got none")
    if suite in ("photos", CUSTOM) and not benchmarks:
        raise ValueError(f"data: expected labelled images for suite {suite!r}, got none")
    if suite == CUSTOM:
        if not methods:
            raise ValueError("methods: expected one or more for suite 'custom', got none")
        sweeps = [Sweep(benchmarks=tuple(benchmarks), teachers=tuple(teachers), methods=tuple(methods))]
    else:
        sweeps = SUITES[suite]((benchmarks or ["scenes"])[0], tuple(teachers), model is not None)
        sweeps = _narrow(sweeps, methods)
    given = (corruptions, severities, seeds, max_images)
    sweeps = [changed for sweep in sweeps if (changed := _changed(sweep, suite == CUSTOM, *given)) is not None]
    config = EvaluationConfig(
        output_dir=output_dir,
        data=places,
        batch_size=batch_size,
        num_views=num_views,
        max_unreadable_images=max_unreadable_images,
        model=model,
        allow_chance=allow_chance,
        command=command,
    )
    folder = run_evaluation(sweeps, config)
    if process_state().is_main_process:
        write_report(folder)
        ran = {name for sweep in sweeps for name in sweep.methods}
        if method := next((name for name in FOR_CARDS if name in ran), None):
            write_model_index(folder, method, short_name(model or "apm"), teacher=short_name(teachers[0]))
    return folder


def _changed(
    sweep: Sweep,
    is_custom: bool,
    corruptions: Sequence[str],
    severities: Sequence[int],
    seeds: Sequence[int],
    max_images: int | None,
) -> Sweep | None:
    """Replace a sweep's own settings by those that are given; None where nothing is left of it.

    A suite's clean sweeps serve `"none"` among the corruptions, so its other sweeps go without.
    """
    changes: dict[str, Any] = {"seeds": tuple(seeds), "max_images": max_images}
    if is_custom:
        changes |= {"corruptions": tuple(corruptions), "severities": tuple(severities)}
    elif set(sweep.corruptions) != {CLEAN}:
        wanted = tuple(name for name in corruptions if name != CLEAN)
        if corruptions and not wanted:
            return None
        changes |= {"corruptions": wanted, "severities": tuple(severities)}
    return replace(sweep, **{name: values for name, values in changes.items() if values not in ((), None)})


def _narrow(sweeps: Sequence[Sweep], methods: Sequence[str]) -> list[Sweep]:
    """Return the sweeps with only the named methods; with all of them if none is named."""
    known = list(dict.fromkeys(name for sweep in sweeps for name in sweep.methods))
    if unknown := [name for name in methods if name not in known]:
        raise ValueError(f"methods: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    chosen = [tuple(name for name in sweep.methods if name in methods or not methods) for sweep in sweeps]
    return [replace(sweep, methods=names) for sweep, names in zip(sweeps, chosen, strict=True) if names]
