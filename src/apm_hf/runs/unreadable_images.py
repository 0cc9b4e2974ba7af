"""Skip, count and list images that cannot be read, up to a limit.

Batches keep their size whatever is in them, since processes that share a step must all take it: a row whose image
cannot be read is a blank picture, and `problem` `(B, W)` uint8 says why, as UTF-8 filled up with zeros; a row of
zeros is an image that was read. Text travels as a tensor because everything that cuts, gathers and sends batches
(worker processes, Accelerate) knows what to do with tensors.

Which images are left out depends on the images alone, so a run that is resumed leaves out the same.

Legend: B images, W bytes of a reason.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from transformers.utils import logging

from .files import write_atomically

logger = logging.get_logger(__name__)

PROBLEM = "problem"  # key of a batch
SKIPPED = "skipped_images.jsonl"  # in the output folder
WIDTH = 384  # W


def packed(text: str) -> Tensor:
    """Encode text as `(1, W)` uint8; longer text is cut."""
    data = text.encode()[:WIDTH]
    return torch.tensor([list(data) + [0] * (WIDTH - len(data))], dtype=torch.uint8)


def problems(batch_or_column: Mapping[str, Tensor] | Tensor) -> list[str]:
    """Return for every row why its image could not be read, empty where it could; [] for batches without `problem`."""
    column = batch_or_column if isinstance(batch_or_column, Tensor) else batch_or_column.get(PROBLEM)
    rows = () if column is None else column.cpu()
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in rows]


def readable(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the rows whose images were read, without `problem`; there may be none."""
    if PROBLEM not in batch:
        return batch
    good = ~batch[PROBLEM].bool().any(dim=1)
    return {name: values[good] for name, values in batch.items() if name != PROBLEM}


def check_limit(unreadable: Sequence[str], limit: int) -> None:
    """Raise a `ValueError` for more unreadable images than the limit.

    Args:
        unreadable: which they are and why, each once.
    """
    if len(unreadable) > limit:
        raise ValueError(
            f"max_unreadable_images: expected at most {limit} unreadable images, got {len(unreadable)}, the last of "
            f"them {unreadable[-1]}"
        )


class SkippedImages:
    """Count and list the images that a run skips, up to a limit; equal in all processes.

    Args:
        folder: where `skipped_images.jsonl` is written, a line `{"step", "image", "reason"}` for each image.
        limit: maximum number of different images that are skipped.
        gather: joins the rows of all processes, as `Accelerator.gather` does.
        is_main_process: whether this is the process that writes.
    """

    def __init__(
        self, folder: Path, limit: int, *, gather: Callable[[Tensor], Tensor], is_main_process: bool = True
    ) -> None:
        self.path, self.limit, self.gather, self.is_main_process = folder / SKIPPED, limit, gather, is_main_process
        self.lines: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.lines)

    def begin(self, step: int) -> None:
        """Reset the list at the start of a run, or to its state at `step` where a run resumes."""
        self.lines = {}
        if step and self.path.exists():
            found = (json.loads(line) for line in self.path.read_text().splitlines())
            self.lines = {line["image"]: line for line in found if line["step"] <= step}
        elif self.is_main_process:
            self.path.unlink(missing_ok=True)

    def sift(self, batch: dict[str, Tensor], step: int) -> tuple[dict[str, Tensor], float]:
        """Return the readable images and the loss's weight 1; if there are none, blank images and weight 0.

        Every process calls this with its part of the same step.

        Raises:
            ValueError: for more unreadable images than the limit, in all processes.
        """
        if PROBLEM not in batch:
            return batch, 1.0
        self._record(problems(self.gather(batch[PROBLEM])), step)
        good = readable(batch)
        if len(good["pixel_values"]):
            return good, 1.0
        return {name: values for name, values in batch.items() if name != PROBLEM}, 0.0

    def sift_figures(
        self, figures: dict[str, dict[str, Tensor]], batch: dict[str, Tensor], gather: Callable[[Any], Any], step: int
    ) -> dict[str, dict[str, Tensor]]:
        """Gather figures by head and name, one row per image, from all processes, without those of unreadable images.

        Args:
            gather: as `Accelerator.gather_for_metrics` does.
        """
        if PROBLEM not in batch:
            return gather(figures)
        found, column = gather((figures, batch[PROBLEM]))
        self._record([reason and f"validation {reason}" for reason in problems(column)], step)
        good = ~column.bool().any(dim=1)
        return {name: {key: rows[good] for key, rows in figures.items()} for name, figures in found.items()}

    def _record(self, reasons: list[str], step: int) -> None:
        known = len(self.lines)
        for reason in filter(None, reasons):
            image, _, why = reason.partition(": ")
            self.lines.setdefault(image, {"step": step, "image": image, "reason": why})
        if len(self.lines) == known:
            return
        new = list(self.lines.values())[known:]
        if self.is_main_process:
            write_atomically(self.path, (json.dumps(line) + "\n" for line in self.lines.values()))
        for line in new:
            logger.warning(f"skipped {line['image']}: {line['reason']} ({len(self)} of at most {self.limit})")
        check_limit([f"{line['image']}: {line['reason']}" for line in self.lines.values()], self.limit)


class Numbered(Dataset):
    """Add to every row its place in the data set, `index`, by which messages name it."""

    def __init__(self, dataset: Any, digest: str | None = None) -> None:
        self.dataset, self._digest = dataset, digest

    def digest(self) -> str | None:
        """Return the digest of the images' contents, if it was given."""
        return self._digest

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"index": index, **self.dataset[index]}

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to data sets that differ from epoch to epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def numbered(dataset: Any, *, digest: str | None = None) -> Any:
    """Add `index` to the rows of a data set, not of a stream, whose order may change and whose files have names.

    Args:
        digest: of the images' contents, by which a run that is resumed knows them again.
    """
    return dataset if isinstance(dataset, IterableDataset) else Numbered(dataset, digest)


__all__ = [
    "PROBLEM", "SKIPPED", "Numbered", "SkippedImages", "check_limit", "numbered", "packed", "problems", "readable",
]  # fmt: skip
