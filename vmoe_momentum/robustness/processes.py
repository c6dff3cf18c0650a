"""The processes that make one report: which of them this is, and those that `--processes` starts beside it.

They know of each other by the cells they share only (claims.py), so it does not matter who started them.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from ..stopping import HELPER

_GRACE = 30.0  # seconds to end in order


class Place(NamedTuple):
    """Of a process among those that were started together; the first one tells how far all are, and writes."""

    rank: int = 0
    count: int = 1  # type: ignore[assignment]  # hides the tuple's method
    local_rank: int = 0  # on its machine
    local_count: int = 1
    name: str = ""  # for messages; "" where it was started by itself


ALONE = Place()


def find_place(environment: Mapping[str, str]) -> Place:
    """As torchrun or SLURM (srun, job arrays) say it."""
    found = ALONE
    if int(environment.get("WORLD_SIZE", 1)) > 1 and "RANK" in environment:
        rank, count = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = (int(environment.get("LOCAL_RANK", 0)), int(environment.get("LOCAL_WORLD_SIZE", 1)))
        found = Place(rank, count, *local, f"process {rank} of {count}")
    elif int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        rank, count = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
        tasks = environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]  # 4(x2),3
        local = (int(environment.get("SLURM_LOCALID", 0)), int(tasks))
        found = Place(rank, count, *local, f"process {rank} of {count}")
    task = environment.get("SLURM_ARRAY_TASK_ID")
    return found if task is None else found._replace(name=f"array task {task}{found.name and ', '}{found.name}")


def choose_device(device: str, place: Place) -> str:
    """Each process of a machine a GPU of its own, in turn, where none was named."""
    if device != "cuda" or place.local_count == 1:
        return device
    import torch

    return f"cuda:{place.local_rank % max(1, torch.cuda.device_count())}"


@contextmanager
def shared_cores(count: int) -> Iterator[None]:
    """Each of the `count` processes of this machine computes on its share, unless OMP_NUM_THREADS says on how many."""
    import torch

    before = torch.get_num_threads()
    if count > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, before // count))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def end_with_parent() -> None:
    """Of a helper: SIGTERM once whoever started it is gone, however that ended."""

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


class Helpers:
    """The processes 1 to count - 1, which run the same command on the same cells. A context manager; at its end, good
    or bad, they end, too."""

    def __init__(self, argv: list[str], count: int) -> None:
        """argv: of `robustness`, without --processes."""
        self.argv, self.count = argv, count
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Helpers":
        for rank in range(1, self.count):
            place = {"RANK": rank, "WORLD_SIZE": self.count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.count}
            environment = os.environ | {name: str(value) for name, value in place.items()}
            environment |= {HELPER: "1", "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
            command = [sys.executable, "-m", __name__.partition(".")[0], "robustness", *self.argv]
            # its own session: Ctrl-C is for this process to answer
            self.running[rank] = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, start_new_session=True
            )
        return self

    def check(self) -> list[str]:
        """Of those that were killed since the last call, a line each: the others do what they did not.

        Raises ValueError: one ended with an error, which it has told itself.
        """
        ended = {rank: code for rank, helper in self.running.items() if (code := helper.poll()) is not None}
        for rank in ended:
            self._forget(rank)
        signals = {rank: _signal(code) for rank, code in ended.items() if code}
        for rank, name in signals.items():
            if name is None:
                raise ValueError(
                    f"--processes={self.count}: process {rank} ended with an error; mend it and run the same command "
                    "again: what is done is kept"
                )
        return [
            f"process {rank} was ended by {name}; the others go on with its cells" for rank, name in signals.items()
        ]

    def _forget(self, rank: int) -> None:
        pipe = self.running.pop(rank).stdin
        assert pipe is not None  # __enter__ asks for one
        pipe.close()

    def __exit__(self, *_: object) -> None:
        for helper in self.running.values():
            helper.terminate()
        try:
            for rank, helper in list(self.running.items()):
                try:
                    helper.wait(_GRACE)
                except subprocess.TimeoutExpired:
                    helper.kill()
                    helper.wait()
                self._forget(rank)
        finally:
            for helper in self.running.values():  # a second Ctrl-C
                helper.kill()


def _signal(code: int) -> str | None:
    """What ended a process of this exit code, by the kernel's hand or its own."""
    number = -code if code < 0 else code - 128
    return signal.Signals(number).name if number in set(signal.Signals) else None
