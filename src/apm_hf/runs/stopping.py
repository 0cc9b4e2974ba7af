"""A run that is asked to stop ends its step, saves and leaves; and nobody else writes where it does.

SIGTERM is what schedulers send before they take a machine away; SIGINT is Ctrl-C.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

LOCK = ".lock"
LOCK_PATIENCE = 6.0  # seconds: processes that load images for a run that was killed hold its lock for up to five more
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again


class RunStopped(SystemExit):
    """Raised, in all processes, by a run that was asked to stop, after it has saved a checkpoint.

    A program that lets it pass ends with status [`EXIT_STOPPED`].
    """

    def __init__(self, message: str) -> None:
        super().__init__(EXIT_STOPPED)
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopRequests:
    """While entered, SIGTERM and SIGINT are remembered instead of obeyed; the second SIGINT interrupts at once.

    Signals come to a process's main thread: entered in another, this does nothing.
    """

    received: str | None = None  # name of the last signal

    def __enter__(self) -> "StopRequests":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is signal.SIG_IGN:
                    continue  # as shells start what runs in the background: it is not meant
                before = signal.signal(number, self._remember)
                self._before[number] = signal.SIG_DFL if before is None else before  # None: not set from Python
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])


def ignore_stop_requests(worker: int) -> None:
    """A `worker_init_fn`: signals to a whole group of processes are the training process's to answer, which still
    needs the images."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def only_writer(output_dir: Path, state: Any) -> Iterator[None]:
    """Hold the folder for this run; it is made. The lock dies with its process, however that ends.

    Args:
        state: [`apm_hf.runs.processes.process_state`]; the main process holds the lock for all.

    Raises:
        ValueError: in all processes, where another run holds it.
    """
    from accelerate.utils import broadcast_object_list
    from filelock import FileLock, Timeout

    lock, refused = FileLock(output_dir / LOCK), [False]
    if state.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_PATIENCE, poll_interval=0.2)
        except Timeout:
            refused = [True]
    try:
        if broadcast_object_list(refused)[0]:
            raise ValueError(
                f"output_dir: expected a folder that no other run writes, got {output_dir}, where one does; wait for "
                "its end, or give another folder"
            )
        yield
    finally:
        lock.release()
