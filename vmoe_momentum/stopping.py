"""Ctrl-C, SIGTERM and SIGHUP end a command in order, with 128 plus the signal's number."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

HELPER = "VMOE_MOMENTUM_HELPER"  # set for those that `--processes` starts; their standard input ends with its process
_LAST_BATCH = 20  # seconds; launchers kill after 30
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """Told to stop. way_out: how to go on, for people; empty where whoever catches it knows."""

    def __init__(self, signum: int, way_out: str = "") -> None:
        super().__init__(f"{signal.Signals(signum).name}{way_out and ': '}{way_out}")
        self.signum, self.way_out = signum, way_out


def in_own_process(handle: Callable[[int], None]) -> Callable[[int, FrameType | None], None]:
    """A signal handler that forked workers do not share: Ctrl-C and a closed terminal reach them, too, and are for the
    process that started them to answer."""
    owner = os.getpid()

    def handler(signum: int, frame: FrameType | None) -> None:
        if os.getpid() == owner:
            handle(signum)
        elif signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)

    return handler


def serve_until_done(worker: int) -> None:
    """As `worker_init_fn` of a DataLoader. Launchers send SIGTERM to whole groups of processes, and a run that is to
    save first needs its batch: workers leave when it is done with them, or some seconds after.
    """

    def leave_later(*_: Any) -> None:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_LAST_BATCH)

    signal.signal(signal.SIGTERM, leave_later)


def is_helper() -> bool:
    return HELPER in os.environ


def heeded() -> list[int]:
    """Of SIGNALS those that are not ignored already, as nohup and shells without job control ask for."""
    return [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]


@contextmanager
def stoppable() -> Iterator[None]:
    """Signals raise Stopped inside; another Ctrl-C after it ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []

    def stop(signum: int) -> None:
        if not asked:
            asked.append(signum)
            raise Stopped(signum)
        if signum == signal.SIGINT:
            end_at_once(signum)

    before: dict[int, Any] = {signum: signal.signal(signum, in_own_process(stop)) for signum in heeded()}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def end_at_once(signum: int) -> None:
    """Without clearing up."""
    os.write(2, b"\nvmoe-momentum: ended at once\n")
    os._exit(128 + signum)
