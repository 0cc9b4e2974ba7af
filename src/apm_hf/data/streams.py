"""Read streams of rows over a network that fails: try again, then raise one error that says how to resume."""

import itertools
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset
from transformers.utils import logging

logger = logging.get_logger(__name__)

# Libraries below `datasets`, whose errors have no base class in common.
_CLIENTS = ("aiohttp", "httpcore", "httpx", "httpx2", "requests", "urllib3")


class Reconnecting(IterableDataset):
    """The rows of a stream, in its order, with none lost and none twice when its network fails for a while.

    After a failure the stream is read again from its start and the rows that were already given are passed over: that
    is exact for every stream whose order depends on its seed and epoch alone.

    Args:
        dataset: a `datasets.IterableDataset`, or anything else that can be iterated over again.
        name: for messages.
        attempts: readings in a row that may end without one row more.
        wait: seconds before the first new attempt, doubled before each next one.

    Raises:
        ConnectionError: the network stays away.
        ValueError: rows that cannot be read, such as broken bytes of a parquet file.
    """

    def __init__(self, dataset: Any, *, name: str, attempts: int = 5, wait: float = 2.0) -> None:
        if attempts < 1 or not wait >= 0:
            raise ValueError(f"attempts, wait: expected 1 or more, and 0 or more seconds, got {attempts}, {wait}")
        self.dataset, self.name, self.attempts, self.wait = dataset, name, attempts, wait

    def set_epoch(self, epoch: int) -> None:
        """Another order, where the stream is shuffled."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        done, failures = 0, 0
        while True:
            try:
                for row in itertools.islice(iter(self.dataset), done, None):
                    done, failures = done + 1, 0
                    yield row
                return
            except Exception as error:  # the network's errors have no base class in common
                if not _of_the_network(error):
                    if isinstance(error, OSError | ValueError):
                        raise ValueError(f"{self.name}: row {done} of the stream cannot be read: {error}") from error
                    raise
                failures += 1
                said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                if failures >= self.attempts:
                    raise ConnectionError(
                        f"{self.name}: the network was lost after {done} rows of the stream, and {failures} attempts "
                        f"found it gone ({said}); --resume goes on from the last checkpoint"
                    ) from error
                seconds = self.wait * 2 ** (failures - 1)
                logger.warning(f"{self.name}: {said}; attempt {failures + 1} of {self.attempts} in {seconds:g} s")
            time.sleep(seconds)


def _of_the_network(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError):
            return True
        if any(kind.__module__.partition(".")[0] in _CLIENTS for kind in type(error).__mro__):
            status = getattr(getattr(error, "response", None), "status_code", 503)
            return status >= 500 or status == 429  # others say that it is no use asking again
        error = error.__cause__
    return False


__all__ = ["Reconnecting"]
