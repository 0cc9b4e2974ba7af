"""A stream shared out among processes, shuffled, with a place in it that can be gone back to.

Each process reads its own shards alone where their number is a multiple of the number of processes (of processes
times loading workers, at best); else every one reads all shards and keeps one row in so many: the rule of
`datasets.distributed.split_dataset_by_node`. Shards come in an order that depends on seed and epoch, rows in one
within blocks of 1,000. `datasets`' own shuffle buffer is not used: what is in it is lost when a run goes on.

A reader never ends: epochs follow each other, each reader's at its own pace, so processes with fewer rows never wait
and batches are always full. Its place is (epoch, rows given of it); to go back there, the rows before it in its part
of the epoch are read again, but no image is decoded: `benchmarks/data.py` measures it.
"""

import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info
from transformers.utils import logging

from .streams import Reconnecting

logger = logging.get_logger(__name__)

BLOCK = 1_000  # rows shuffled among each other; their encoded images are in memory
PLACE = "stream_place"  # of a row and of a batch: (worker, epoch, rows given of it)


class SplitStream(IterableDataset):
    """Rows of one process's part of a stream, for ever; each says its `stream_place`.

    Args:
        dataset: a `datasets.IterableDataset`.
        name: for messages.
        seed: of the order.
        whole: whether it is all rows of its shards. Of a part that was made by `take` or `skip`, shards would be other
            rows, so that such a stream is shared out by rows, its shards in their own order.
        block_size: see [`BLOCK`].
    """

    def __init__(self, dataset: Any, *, name: str, seed: int = 0, whole: bool = True, block_size: int = BLOCK) -> None:
        self.dataset, self.name, self.seed, self.block_size = dataset, name, seed, block_size
        self.num_shards = dataset.num_shards if whole else 1
        self.process, self.num_processes, self.num_workers = 0, 1, 1
        self._places: dict[int, tuple[int, int]] = {}  # by worker, where it begins
        self._first_worker = 0
        self.new_epoch = 0

    def digest(self) -> str:
        """Return what is known of a stream without reading it: its name, columns and number of shards."""
        name, columns = os.path.basename(self.name.rstrip(os.sep)), sorted(self.dataset.column_names or [])
        return f"stream {name}, {columns}, {self.dataset.num_shards} shards"

    def share(self, process: int, num_processes: int, num_workers: int) -> None:
        """Set which part this process reads, and with how many workers."""
        self.process, self.num_processes, self.num_workers = process, num_processes, max(1, num_workers)
        if self.num_shards % num_processes:
            logger.warning(
                f"{self.name}: {self.num_shards} shards cannot be shared out evenly among {num_processes} processes: "
                "every one of them reads all rows"
            )

    def go_on(self, state: list[dict[str, Any]]) -> None:
        """Continue from where the readers of all processes stood, given [`StreamPlace.state`] of each.

        With another number of readers there is no such place: a new epoch begins.
        """
        if [len(state), state[0]["num_workers"]] == [self.num_processes, self.num_workers]:
            mine = state[self.process]
            self._places = {int(worker): tuple(place) for worker, place in mine["places"].items()}
            self._first_worker, self.new_epoch = mine["next"], mine["new_epoch"]
            return
        epochs = [place[0] for one in state for place in one["places"].values()]
        self.new_epoch = max([state[0]["new_epoch"] - 1, *epochs]) + 1
        logger.warning(
            f"{self.name}: expected the {len(state)} x {state[0]['num_workers']} readers that the run began with, got "
            f"{self.num_processes} x {self.num_workers}: it goes on with epoch {self.new_epoch} of the stream"
        )

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        workers = info.num_workers if info else 1
        worker = ((info.id if info else 0) + self._first_worker) % workers  # batches come from workers in turn
        epoch, done = self._places.get(worker, (self.new_epoch, 0))
        while True:
            number = done
            for row in itertools.islice(self._epoch(epoch, worker, workers, done // self.block_size), done, None):
                number += 1
                yield {**row, PLACE: (worker, epoch, number)}
            if not number:
                raise ValueError(
                    f"{self.name}: expected at least one image for each of {self.num_processes} processes x {workers} "
                    "readers, got none"
                )
            epoch, done = epoch + 1, 0

    def _epoch(self, epoch: int, worker: int, workers: int, skipped: int) -> Iterator[dict[str, Any]]:
        """A reader's rows of an epoch; those of the first `skipped` blocks come in any order."""
        readers, reader = self.num_processes * workers, self.process * workers + worker
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shards = torch.randperm(self.num_shards, generator=generator).tolist()
        # Groups of readers share shards, and take turns with their rows.
        groups = next(number for number in (readers, self.num_processes, 1) if self.num_shards % number == 0)
        share = readers // groups
        source = _Rows(self.dataset, shards[reader // share :: groups], self.num_shards, self.block_size)
        rows = itertools.islice(iter(Reconnecting(source, name=self.name)), reader % share, None, share)
        generator.manual_seed((self.seed * 1_000_003 + epoch) * 1_000_003 + reader)
        for number in itertools.count():
            block = list(itertools.islice(rows, self.block_size))
            order = torch.randperm(len(block), generator=generator).tolist()
            yield from block if number < skipped else [block[place] for place in order]
            if len(block) < self.block_size:
                return


class _Rows:
    """Rows of some shards, one after the other."""

    def __init__(self, dataset: Any, shards: list[int], num_shards: int, block_size: int) -> None:
        self.dataset, self.shards, self.num_shards, self.block_size = dataset, shards, num_shards, block_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for shard in self.shards:
            part = self.dataset if self.num_shards == 1 else self.dataset.shard(self.num_shards, shard)
            # Not `iter(part)`, which shares it out among a loader's workers once more.
            for columns in part.iter(batch_size=min(self.block_size, 100)):
                for values in zip(*columns.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))


class PlacedCollator:
    """Batches of rows of a [`SplitStream`], with the place of the last one.

    Args:
        collate_fn: of the rows; None is torch's own.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], dict[str, Any]] | None) -> None:
        self.collate_fn = collate_fn or default_collate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        place = rows[-1][PLACE]
        plain = [{name: value for name, value in row.items() if name != PLACE} for row in rows]
        return {**self.collate_fn(plain), PLACE: place}


class StreamPlace:
    """Track how far a process has read: the places of the batches that were taken, not of those read ahead."""

    def __init__(self, stream: SplitStream) -> None:
        self.stream = stream
        self.places: dict[int, tuple[int, int]] = {}
        self.next = 0

    def go_on(self, state: list[dict[str, Any]]) -> None:
        """See [`SplitStream.go_on`]."""
        self.stream.go_on(state)
        self.places, self.next = dict(self.stream._places), self.stream._first_worker

    def take(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch without its place, which is remembered."""
        worker, *place = batch.pop(PLACE)
        self.places[worker], self.next = (place[0], place[1]), (worker + 1) % self.stream.num_workers
        return batch

    def state(self) -> Mapping[str, Any]:
        """Return the place as JSON."""
        places = {str(worker): list(place) for worker, place in self.places.items()}
        stream = self.stream
        return {
            "num_workers": stream.num_workers,
            "new_epoch": stream.new_epoch,
            "next": self.next,
            "places": places,
        }


__all__ = ["PlacedCollator", "SplitStream", "StreamPlace"]
