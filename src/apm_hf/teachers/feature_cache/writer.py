"""Run a teacher once over a data set and write its features to the disk, in any number of processes.

Every shard is computed from its rows alone and renamed into place when it is complete, so its bytes do not depend on
processes and interruptions (same computer, versions and batch size). Existing shards are verified; only missing or
damaged ones are computed.

Legend: n images of a shard, B of a batch, N levels, F feature width, (rows, cols) the teacher's grid, l locations.
"""

import os
from collections.abc import Iterable
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers.utils import logging
from transformers.utils.logging import tqdm

from ...data.images import ImageCollator
from ...runs.files import writable_folder
from ...runs.processes import process_state
from ...runs.run import Run
from ...runs.stopping import RunStopped, StopRequests, ignore_stop_requests
from ...runs.unreadable_images import PROBLEM, problems
from ..targets import normalise_levels
from .checks import check_room, write_index
from .layout import (
    DTYPES,
    INDEX,
    CacheSettings,
    Estimate,
    contents,
    drawn_locations,
    estimate,
    grid_of,
    shard_name,
)
from .reader import FeatureCache

logger = logging.get_logger(__name__)


def write_feature_cache(
    folder: str | os.PathLike[str],
    teacher: Any,
    images: Any,
    *,
    image_column: str = "image",
    settings: CacheSettings | None = None,
    dataset_name: str = "images",
    batch_size: int = 64,
    num_workers: int = 0,
    max_unreadable_images: int = 0,
) -> FeatureCache:
    """Write a cache, or what is missing of one; process r of w writes shards r, r + w, ... of a folder all share.

    Args:
        images: rows with images, by index.
        dataset_name: kept with the cache; of a path its last part.
        batch_size: images that the teacher is shown at a time.
        num_workers: processes that load images, per process.
        max_unreadable_images: unreadable images that are listed and left out.

    Raises:
        ValueError: for another cache in the folder, too little room on its disk, more unreadable images than the
            limit, outputs that are not finite or beyond what `dtype` can hold, a folder that another run is writing.
        OSError: for a folder that cannot be written to, a disk that became full.
        RunStopped: after SIGTERM or SIGINT; shards that are whole stay.
    """
    settings, path, state = settings or CacheSettings(), writable_folder(folder), process_state()
    plan = contents(teacher, images, image_column, settings, dataset_name=dataset_name)
    size = estimate(teacher, len(images), settings)
    with Run(path, state, parts=".").locked() as run:
        run.claim(plan)
        check_room(path, size)
        state.wait_for_everyone()
        if state.is_main_process:
            (path / INDEX).unlink(missing_ok=True)  # what is damaged will be replaced
        writer = _Writer(run, teacher, settings, size)
        mine = range(state.process_index, size.num_shards, state.num_processes)
        with StopRequests() as requests:
            writer.write(
                [number for number in mine if run.load(shard_name(number)) is None],
                _Numbered(images),
                ImageCollator(
                    None,
                    image_column,
                    teacher_image_processor=teacher.image_processor,
                    max_unreadable_images=max_unreadable_images,
                ),
                batch_size=batch_size,
                num_workers=num_workers,
                requests=requests,
                quiet=not state.is_local_main_process,
            )
        state.wait_for_everyone()
        if state.is_main_process:
            write_index(run, plan, size.num_shards, max_unreadable_images)
        state.wait_for_everyone()
    return FeatureCache(path)


class _Writer:
    def __init__(self, run: Run, teacher: Any, settings: CacheSettings, size: Estimate) -> None:
        self.run, self.teacher, self.settings, self.size = run, teacher, settings, size
        self.dtype, self.grid = DTYPES[settings.dtype], grid_of(teacher)

    def rows(self, number: int) -> range:
        """Return the rows of a shard, unreadable ones included."""
        start = number * self.size.images_per_shard
        return range(start, min(start + self.size.images_per_shard, self.size.num_images))

    def write(
        self,
        numbers: list[int],
        images: Any,
        collator: ImageCollator,
        *,
        batch_size: int,
        num_workers: int,
        requests: StopRequests,
        quiet: bool,
    ) -> None:
        """Compute and write these shards, one after the other."""
        if not numbers:
            return
        starts = [range(0, len(self.rows(number)), batch_size) for number in numbers]
        batches = [
            list(self.rows(number)[start : start + batch_size])
            for number, places in zip(numbers, starts, strict=True)
            for start in places
        ]
        # One loader for all: its workers read ahead over the ends of shards.
        loader = iter(
            DataLoader(
                images,
                batch_sampler=batches,
                collate_fn=collator,
                num_workers=num_workers,
                worker_init_fn=ignore_stop_requests,
            )
        )
        with tqdm(total=sum(map(len, batches)), desc="cache", unit="image", disable=quiet) as progress:
            for number, places in zip(numbers, starts, strict=True):
                parts: list[dict[str, Tensor]] = []
                bad: list[dict[str, Any]] = []
                for _ in places:
                    batch = next(loader)
                    if requests.received:
                        raise RunStopped(f"stopped by {requests.received}, before shard {number} was whole")
                    bad += _unreadable(batch)
                    parts.append(self._answers(batch))
                    progress.update(len(batch["index"]))
                self._save(number, [part for part in parts if part], bad)

    @torch.inference_mode()
    def _answers(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a shard's tensors for a batch's readable images; empty if there are none."""
        good = ~batch[PROBLEM].bool().any(dim=1) if PROBLEM in batch else torch.ones(len(batch["index"])).bool()
        rows = batch["index"][good]
        if not len(rows):
            return {}
        layers, places = self.settings.level_layers, self.settings.num_locations
        try:
            answer = self.teacher.encode_images(pixel_values=batch["teacher_pixel_values"][good], layers=layers)
        except ValueError as error:
            raise ValueError(f"rows {rows[0]} to {rows[-1]}: {error}") from error
        if tuple(answer.features.shape[1:3]) != self.grid:
            raise ValueError(f"features: expected the grid {self.grid}, got {tuple(answer.features.shape[1:3])}")
        kept = {"features": answer.features, "image_embeds": answer.image_embeds}
        if answer.levels is not None:
            kept["levels"] = normalise_levels(answer.levels)
        if places is not None:
            drawn = drawn_locations(rows.tolist(), places, self.grid[0] * self.grid[1], self.settings.seed)
            index = drawn.long().to(answer.features.device)
            # (B, rows, cols, F) -> (B, l, F), and (B, N, rows, cols, C) -> (B, N, l, C)
            kept["features"] = kept["features"].flatten(1, 2).take_along_dim(index[..., None], dim=1)
            if "levels" in kept:
                kept["levels"] = kept["levels"].flatten(2, 3).take_along_dim(index[:, None, :, None], dim=2)
        kept = {name: self._converted(name, values, rows) for name, values in kept.items()}
        return kept | {"rows": rows} | ({} if places is None else {"locations": drawn})

    def _converted(self, name: str, values: Tensor, rows: Tensor) -> Tensor:
        values = values.to(self.dtype).cpu()
        finite = values.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            raise ValueError(
                f"dtype: expected {name} that {self.settings.dtype} can hold, got NaN or too large ones for rows "
                f"{rows[~finite].tolist()[:5]}; use bfloat16 or float32"
            )
        return values

    def _save(self, number: int, parts: list[dict[str, Tensor]], bad: list[dict[str, Any]]) -> None:
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if parts else {}
        # safetensors' own `save_file` wraps the system's errors. One entry of metadata: their order is not defined.
        content = safetensors.torch.save(tensors, metadata={"format": "pt"})
        noted = {"rows": len(tensors.get("rows", ())), "bad": bad}
        self.run.save(shard_name(number), noted, tensors=content)


class _Numbered(Dataset):
    """Add to every row its number as `index`."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {**self.images[row], "index": row}


def _unreadable(batch: dict[str, Tensor]) -> Iterable[dict[str, Any]]:
    for row, problem in zip(batch["index"].tolist(), problems(batch), strict=False):
        if problem:
            reason = problem.partition(": ")[2]
            logger.warning(f"left out row {row}: {reason}")
            yield {"row": row, "reason": reason}
