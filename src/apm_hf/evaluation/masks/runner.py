"""Run every method on every data set, resumable, and write the report (`apm evaluate --task islands`).

A finished job, one method on one data set, is a part of the [`apm_hf.runs.run.Run`], whose name contains a digest of
all that determines it: images, weights, settings. An interrupted run loses only the job in work; a run with other
settings computes only what they change, and damaged parts are computed again.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.utils import logging
from transformers.utils.logging import tqdm

from ...assets import DEMO_MODEL, DEMO_TEACHER
from ...demo.story import demo_layers
from ...distillation.rivals import fitted_rivals
from ...modeling_apm import IGNORE_INDEX
from ...pair import APM
from ...runs import provenance
from ...runs.files import write_atomically
from ...runs.processes import process_state
from ...runs.run import Run, own_folder
from ...runs.unreadable_images import SKIPPED
from ...ttt import TTTConfig
from ..plan import short_name
from .datasets import LEVELS, SCENES, MaskedImages, load_masked_images, without_unreadable
from .methods import Job, Models, make_jobs, titles
from .report import write_report
from .scoring import JobRun, ScoringConfig
from .summary import summarise

logger = logging.get_logger(__name__)

SCORES = "scores.jsonl"
# Fits the teacher's grid, not its pooled embedding, with the settings that `apm islands` uses for a photo.
GRID_TTT = TTTConfig(fit="all", steps=100, learning_rate=1e-3, num_locations=64)


def evaluate_islands(
    *,
    output_dir: str | os.PathLike[str],
    data: str | Sequence[str] = SCENES,
    teacher: str | None = None,
    model: str | None = None,
    methods: Sequence[str] = (),
    max_images: int | None = None,
    max_unreadable_images: int = 0,
    split: str | None = None,
    image_column: str | None = None,
    masks: Sequence[str] = (),
    ignore_labels: Sequence[int] = (IGNORE_INDEX,),
    map_size: int | None = None,
    segments: int | None = None,
    level_layers: Sequence[int] = (),
    ttt: TTTConfig = GRID_TTT,
    ttt_factor: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    command: str = "",
) -> Path:
    """Score islands and dense tasks of an APM, its teacher, rivals and controls, and write the report.

    Args:
        output_dir: folder of the results; finished jobs with the same settings are not computed again.
        data: one or more data sets as [`load_masked_images`] takes them.
        teacher: name or folder; by default the demo's, which knows drawn scenes.
        model: a distilled APM, as wide as the teacher. With a teacher alone, a fresh student's architecture is used
            and the rows of a distilled one are omitted; with neither, the demo's is used.
        methods: rows of the tables to compute, by default all.
        max_images, split, image_column, ignore_labels: see [`load_masked_images`].
        max_unreadable_images: maximum number of rows with unreadable image or masks; they are skipped and listed in
            `skipped_images.jsonl`.
        masks: `"whole=COLUMN"`, `"part=COLUMN"`, if the columns are not found by name.
        map_size: side of all methods' maps; by default 96 for scenes, else 112.
        segments: number of segments for every image, instead of the number in its mask.
        level_layers: the teacher's layers that the model's levels were distilled from; by default the demo's for the
            demo model, for others spread evenly over the teacher's depth.
        ttt: settings of the rows that adapt; `start` is set by the row.
        ttt_factor: refinement of the teacher's grid for their targets: `factor**2` passes of the teacher.
        batch_size: images per batch.
        seed: random seed of scenes, subsets, clusters, probes' pixels, shuffles and random weights.
        command: command line shown in the report.

    Returns:
        The folder with `report.md`, a figure per data set, `results.json` and `scores.jsonl`.

    Raises:
        ValueError: for unknown methods, data that cannot be scored, more unreadable rows than `max_unreadable_images`,
            a folder that another run is writing, or a model that does not fit the teacher.
    """
    sources = [data] if isinstance(data, str) else list(data)
    folder = own_folder(output_dir, data=sources, teacher=teacher, model=model)  # before anything is fetched
    config = ScoringConfig(map_size=map_size, num_segments=segments, batch_size=batch_size, seed=seed)
    models = _load_models(teacher, model, level_layers, ttt, ttt_factor, seed)
    known = titles(models)
    if unknown := [name for name in methods if name not in known]:
        raise ValueError(f"methods: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    rows = [name for name in known if name in methods or not methods]
    sets = [
        found
        for name in sources
        for found in load_masked_images(
            name,
            split=split,
            image_column=image_column,
            mask_columns=_mask_columns(masks),
            ignore_labels=ignore_labels,
            max_images=max_images,
            seed=seed,
        )
    ]
    names = [found.name for found in sets]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"data: expected one or more data sets of different names, got {names}")
    sets, skipped = without_unreadable(sets, max_unreadable_images)
    for found in sets:  # problems are found before anything is computed
        found.check()
    jobs = make_jobs(models, rows)
    results: dict[str, Any] = {
        "command": command,
        "commit": provenance.commit(),
        "computer": provenance.computer(),
        "versions": provenance.versions(),
        "teacher": short_name(models.teacher.name),
        "model": None if not models.apm.is_fitted else short_name(model or DEMO_MODEL),
        "settings": asdict(config) | {"ttt": asdict(ttt)},
        "ttt_factor": ttt_factor,
        "level_layers": models.level_layers,
        "skipped_images": len(skipped),
        "data": {},
    }
    lines = []
    with Run(folder, process_state()).locked() as run:
        identity = {"teacher": models.teacher.identity(), "model": models.apm.identity()}
        for found in sets:
            job_identity = identity | {"images": found.digest()}
            done = _run_jobs(jobs, found, models, config, run, job_identity)
            results["data"][found.name] = summarise(found, {name: known[name] for name in rows}, done, seed=seed)
            lines += [json.dumps({"data": found.name} | row) + "\n" for part in done for row in part["scores"]]
        write_atomically(folder / SCORES, lines)
        run.finish((SCORES,))
        if skipped:
            write_atomically(folder / SKIPPED, (json.dumps(line) + "\n" for line in skipped))
        logger.info(write_report(folder, results))
    return folder


def _run_jobs(
    jobs: Sequence[Job],
    data: MaskedImages,
    models: Models,
    config: ScoringConfig,
    run: Run,
    identity: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the results of every job; those of finished jobs are read from the run."""
    size = {} if config.map_size else {"map_size": data.map_size}
    common = asdict(replace(config, batch_size=1)) | size | dict(identity)  # results do not depend on the batch size
    common |= {"version": version("apm_hf"), "data": data.name, "num_images": len(data), "source": data.source}
    common |= {"masks": data.mask_columns, "image": data.image_column, "ignore": data.ignore_labels}
    named = []
    for job in jobs:
        described = json.dumps(common | {"job": job.name, "rows": job.rows} | job.depends_on, sort_keys=True)
        named.append(f"{data.name}/{job.name}-{hashlib.sha256(described.encode()).hexdigest()[:12]}")
    finished = [run.load(name) for name in named]
    num_finished = sum(found is not None for found in finished)
    logger.info(f"{data.name}: {num_finished} of {len(jobs)} jobs are done, with the same models, images and settings")
    done = []
    with tqdm(total=len(jobs) * len(data), desc=data.name, unit="image") as progress:
        for job, name, found in zip(jobs, named, finished, strict=True):
            progress.set_postfix_str(job.name)
            if found is not None:
                progress.update(len(data))
            else:
                found = {**JobRun(job, data, config, models.teacher_grid, progress.update)(), "subject": job.subject}
                run.save(name, found)
            done.append(json.loads(json.dumps(found)))  # as a finished job is read
    return done


def _load_models(
    teacher: str | None,
    model: str | None,
    level_layers: Sequence[int],
    ttt: TTTConfig,
    ttt_factor: int,
    seed: int,
) -> Models:
    if teacher is None and model is not None:
        raise ValueError(f"teacher: expected the one that model {model!r} was distilled from, got none")
    if teacher is None:
        logger.info("no teacher and no model: using those of the demo, which were trained on drawn scenes only")
        model, teacher = DEMO_MODEL, DEMO_TEACHER
    apm = APM.load(model, teacher=teacher)
    if apm.model is None:
        logger.info("no model: rows of a distilled one are omitted, and a fresh student is adapted")
        apm = apm.fresh(seed=seed)
    rivals = {} if model is None else fitted_rivals(model)
    models = Models(apm, tuple(level_layers), ttt, ttt_factor, seed, rivals)
    num_levels, num_layers = models.model.config.num_levels, models.teacher.num_layers
    if num_levels and level_layers and len(level_layers) != num_levels:
        raise ValueError(f"level_layers: expected one per level, {num_levels}, got {list(level_layers)}")
    if num_levels and not level_layers:
        if model == DEMO_MODEL:
            level_layers = demo_layers(models.teacher)
        else:
            level_layers = [round(number * num_layers / num_levels) for number in range(1, num_levels + 1)]
        logger.info(f"no level_layers: levels are compared with the teacher's layers {level_layers}")
    return replace(models, level_layers=tuple(level_layers))


def _mask_columns(masks: Sequence[str]) -> dict[str, str]:
    columns = dict(entry.partition("=")[::2] for entry in masks)
    if not all(columns.values()) or not set(columns) <= set(LEVELS):
        raise ValueError(f"masks: expected whole=COLUMN, part=COLUMN or both, got {list(masks)}")
    return columns
