"""Compare a resumed run's settings with those it began with.

Changes that would silently have no effect, or would change the meaning of the place in the data, are refused. Others
change the course of the run from here on, and are logged.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from transformers.utils import logging

from ..configuration_apm import APMConfig
from ..runs.checkpoints import FOLDER, Checkpoints
from ..runs.identity import processor_settings, weights_digest
from ..runs.provenance import versions
from ..runs.run import MANIFEST, Run
from ..runs.unreadable_images import SKIPPED
from ..teachers.licenses import public_name
from .rivals import ATTENTION, BILATERAL, RIDGE

logger = logging.get_logger(__name__)

REFUSED = (
    "seed",
    "num_images",
    "data",
    "teachers",
    "teacher_image_processors",
    "student",
    "image_processor",
    "level_layers",
    "statistics",
    "statistics_images",
    "sharded",
)
# Nothing of these is in the weights.
WITHOUT_EFFECT = (
    "output_dir", "resume", "overwrite", "report_to", "num_workers", "num_pictures", "validation_steps",
    "checkpoint_steps", "keep_checkpoints", "max_unreadable_images", "logging_steps", "peak_tflops",
)  # fmt: skip
# Of a student's configuration: found on the way, not given.
FOUND = ("distilled_from", "feature_mean", "feature_std", "transformers_version", "dtype", "architectures", "auto_map")

# What distillations of any kind make in their folder, but for what trackers write; other files there are left alone.
MADE = (
    FOLDER, "pictures", "metrics.json", "speed.json", SKIPPED, "config.json", "preprocessor_config.json",
    "model.safetensors", RIDGE, BILATERAL, ATTENTION, "README.md", "card.json", "islands.png", MANIFEST,
)  # fmt: skip


def make_room(run: Run, *, overwrite: bool) -> None:
    """Move an earlier distillation in the folder aside, see [`Run.set_aside`]; an empty folder is left as it is.

    Raises:
        ValueError: without `overwrite`, where there is one.
    """
    if Checkpoints(run.folder, keep=1).names() or (run.folder / "config.json").exists():
        run.set_aside(MADE, overwrite=overwrite)


def facts(
    config: Any,
    student: APMConfig,
    teachers: Mapping[str, Any],
    *,
    image_processor: Any,
    num_images: int | None,
    num_processes: int,
    data: str | None = None,
    validation_data: str | None = None,
    sharded: bool = False,
    feature_cache: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return everything that a run's weights depend on, as JSON.

    Args:
        config: a [`apm_hf.distillation.DistillationConfig`].
        teachers: by the names of their heads.
        image_processor: the student's.
        num_images: None for a stream.
        data, validation_data: digests of the images' contents, where the data sets have them.
        sharded: whether checkpoints are those of FSDP2, which nothing else reads.
        feature_cache: settings of the cache that is read instead of running the teachers.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in WITHOUT_EFFECT}
    known = settings | {
        "num_processes": num_processes,
        "num_images": num_images,
        "data": data,
        "validation_data": validation_data,
        "image_processor": processor_settings(image_processor),
        "teacher_image_processors": {name: processor_settings(one.image_processor) for name, one in teachers.items()},
        "sharded": sharded,
        "feature_cache": feature_cache,
        "teachers": {name: f"{public_name(one.name)}, weights {_weights(one)[:16]}" for name, one in teachers.items()},
        "versions": versions(),
        "student": _without_what_was_found(student.to_dict()),
    }
    return json.loads(json.dumps(known))


def _weights(teacher: Any) -> str:
    """Return a digest of a teacher's weights that does not depend on their precision."""
    is_module = isinstance(teacher.model, torch.nn.Module)
    return weights_digest(teacher.model, dtype=torch.bfloat16) if is_module else "unknown"


def check_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Log the settings that changed.

    Raises:
        ValueError: for a change that is refused; names all of them.
    """
    changed = {name: (before.get(name), now.get(name)) for name in {**before, **now}}
    changed = {name: pair for name, pair in changed.items() if pair[0] != pair[1]}
    for name in ("data", "validation_data"):
        if None in changed.get(name, ()):  # a data set without a digest says nothing
            del changed[name]
    if refused := [name for name in changed if name in REFUSED]:
        listed = {name: changed[name] for name in refused if name != "data"}
        others = "other images" * ("data" in refused) + ", " * ("data" in refused and bool(listed))
        raise ValueError(
            f"resume: expected what the run began with, got {others}{_listed(listed)}; "
            "give it back, or start a new run in another output_dir"
        )
    if changed:
        logger.warning(f"the resumed run goes on otherwise than it began: {_listed(changed)}")


def _listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    lines = []
    for name, (before, now) in changes.items():
        if isinstance(before, dict) and isinstance(now, dict):
            parts = {f"{name}.{key}": (before.get(key), now.get(key)) for key in {**before, **now}}
            lines.append(_listed({key: pair for key, pair in parts.items() if pair[0] != pair[1]}))
        else:
            lines.append(f"{name} {before} -> {now}")
    return ", ".join(lines)


def _without_what_was_found(fields: Any) -> Any:
    if isinstance(fields, dict):
        return {name: _without_what_was_found(value) for name, value in fields.items() if name not in FOUND}
    return fields
