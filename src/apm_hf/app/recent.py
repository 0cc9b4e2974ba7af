"""Remember what was computed of the last photos, bounded in number, bytes and age.

Sessions of the app hold nothing of their own: what a photo gave is found again by its path, and computed again where
it had to leave.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """Know how many bytes this takes."""

    @property
    def num_bytes(self) -> int: ...


Value = TypeVar("Value", bound=Sized)


class Recent(Generic[Value]):
    """Hold the values that were used last; the one that was not used for the longest time leaves first.

    Args:
        max_entries: values held at most.
        max_bytes: of all values together; a larger one is not held at all.
        max_seconds: after its last use a value leaves, between once and twice this time.
    """

    def __init__(self, *, max_entries: int, max_bytes: int, max_seconds: float) -> None:
        self.max_entries, self.max_bytes, self.max_seconds = max_entries, max_bytes, max_seconds
        self._values: OrderedDict[Hashable, tuple[float, Value]] = OrderedDict()  # with the time of the last use
        self._lock = threading.Lock()
        self._sweeper: threading.Timer | None = None

    def get(self, key: Hashable, compute: Callable[[], Value]) -> Value:
        """Return the value of a key, computed where it is not held."""
        with self._lock:
            held = self._values.pop(key, None)
            if held is not None:
                self._values[key] = (time.monotonic(), held[1])
                return held[1]
        value = compute()  # others need not wait for it
        if value.num_bytes <= self.max_bytes:
            with self._lock:
                self._values[key] = (time.monotonic(), value)
                while len(self._values) > self.max_entries or self.num_bytes > self.max_bytes:
                    self._values.popitem(last=False)
                self._sweep_later()
        return value

    @property
    def num_bytes(self) -> int:
        """Bytes of all values that are held."""
        return sum(value.num_bytes for _, value in self._values.values())

    def __len__(self) -> int:
        return len(self._values)

    def _sweep_later(self) -> None:
        if self._values and self._sweeper is None:
            self._sweeper = threading.Timer(self.max_seconds, self._sweep)
            self._sweeper.daemon = True
            self._sweeper.start()

    def _sweep(self) -> None:
        with self._lock:
            oldest = time.monotonic() - self.max_seconds
            for key in [key for key, (used, _) in self._values.items() if used <= oldest]:
                del self._values[key]
            self._sweeper = None
            self._sweep_later()
