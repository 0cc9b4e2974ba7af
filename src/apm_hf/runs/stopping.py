"""Let a run that is asked to stop end its step, save and leave.

SIGTERM is what schedulers send before they take a computer away; SIGINT is Ctrl-C.
"""

import signal
import threading
from types import FrameType
from typing import Any

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
    """Ignore SIGTERM and SIGINT where images are loaded (a `worker_init_fn`): the training process handles them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
