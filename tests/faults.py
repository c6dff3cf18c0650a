"""Runs of several ranks that come to grief: a callback that does it, and a job to watch from outside."""

import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

TESTS = Path(__file__).parent


class Fault(Callback):
    """On one rank, before one batch. Writes each rank's process number into FOLDER/rank<r>.

    what: killed, memory, disk (no file grows beyond 10,000 bytes), loss (not a number), SIGNAL, or nothing.
    """

    def __init__(self, folder: str, what: str = "nothing", rank: int = 1, at: int = 5, first_attempt: bool = False):
        self.folder, self.what, self.rank, self.at, self.seen = Path(folder), what, rank, at, 0
        self.on = not (first_attempt and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0")

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"rank{trainer.global_rank}").write_text(str(os.getpid()))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.seen += 1
        if self.seen != self.at or trainer.global_rank != self.rank or not self.on:
            return
        if self.what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.what == "memory":
            torch.empty(2**58, dtype=torch.uint8)
        elif self.what == "disk":
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        elif self.what == "loss":
            losses = pl_module.training_losses

            def spoiled(given: object) -> tuple:
                found, pair = losses(given)
                return found._replace(loss=found.loss * float("nan")), pair

            pl_module.training_losses = spoiled
        elif self.what.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.what))


class Job:
    """A program of several ranks, in FOLDER; a context manager that leaves none of its processes behind.

    launcher: torchrun, lightning (whose first rank starts the others) or torchrun's options.
    """

    def __init__(
        self, folder: Path, argv: list[str], ranks: int = 2, launcher: str | list[str] = "torchrun", **environment: str
    ) -> None:
        standard = {"torchrun": ["--standalone", f"--nproc_per_node={ranks}"], "lightning": []}
        words = standard[launcher] if isinstance(launcher, str) else launcher
        elastic = ["-m", "torch.distributed.run", *words] if words else []
        paths = os.pathsep.join(map(str, (TESTS, TESTS / "training", TESTS.parent)))
        known = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
        self.folder, self.ranks = folder, ranks
        self.process = subprocess.Popen(
            [sys.executable, *elastic, "-m", "vmoe_momentum", *argv],
            env=known, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in (self.process.pid, *self.pids()):
            with suppress(ProcessLookupError):
                os.killpg(process, signal.SIGKILL)
        self.process.stdout.close()
        self.process.wait()

    def pids(self) -> list[int]:
        """Of the ranks that have come as far as `fit`, by rank."""
        files = (self.folder / "ranks" / f"rank{rank}" for rank in range(self.ranks))
        return [int(file.read_text() or 0) for file in files if file.is_file()]

    def wait_for(self, pattern: str, seconds: float = 120) -> Path:
        """A file below the folder that comes while the job runs."""
        until = time.monotonic() + seconds
        while not (found := next(self.folder.rglob(pattern), None)):
            assert self.process.poll() is None and time.monotonic() < until, self.process.stdout.read()
            time.sleep(0.1)
        return found

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """Exit code and all it said, once it and all ranks are gone; fails where they are not in so many seconds."""
        until = time.monotonic() + seconds
        told = self.process.communicate(timeout=seconds)[0]
        while left := [pid for pid in self.pids() if _runs(pid)]:
            assert time.monotonic() < until, f"still there: {left}\n{told}"
            time.sleep(0.1)
        return self.process.returncode, told


def lines(told: str) -> list[str]:
    """Those of our own that say how it ended."""
    return [line for line in told.splitlines() if line.startswith(("vmoe-momentum: error:", "vmoe-momentum: stopped"))]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
