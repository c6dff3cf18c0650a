"""The ranks of a run end together: `peers` as a callback of Lightning's, and what a job that is started again needs."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import Callback

from .finite import last_checkpoint
from .peers import Watch, follow_parent


class EndTogether(Callback):
    """Where one rank of several ends, all do, and one of them says which and why. First among the callbacks.

    ending: an error as (line for people, exit code). argv: the command line, to be repeated with a checkpoint.
    """

    def __init__(self, ending: Callable[[BaseException], tuple[str, int]], argv: list[str]) -> None:
        self.ending, self.argv = ending, argv
        self._watch: Watch | None = None
        self._code: int | None = None

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if trainer.world_size > 1 and self._watch is None:
            self._start(trainer)

    def _start(self, trainer: pl.Trainer) -> None:
        children = getattr(trainer.strategy.launcher, "procs", [])
        self._watch = Watch(
            dist.distributed_c10d._get_default_store(),
            trainer.global_rank,
            trainer.world_size,
            agent=os.getppid() if dist.is_torchelastic_launched() else None,
            saving=getattr(trainer.strategy.checkpoint_io, "writing", None),
            way_out=lambda: way_out(trainer, self.argv),
            stopping=lambda: _asked(trainer),
            children=list(children),
        )
        children.clear()  # or Lightning's observer kills this process, too, and its exit code says nothing of the cause
        self._watch.start()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Before anything is cleared up, which may wait for other ranks."""
        if trainer.world_size == 1:
            return
        line, self._code = self.ending(exception)
        if self._watch is None and dist.is_initialized():  # while the data was looked at
            self._start(trainer)
        if self._watch is not None:
            self._watch.await_cause(exception)
            first = self._watch.end(self._code)
            self._code = self._watch.ended
            if not first:
                return
        kind, _, told = line.partition(": ")
        if kind == "error":
            told = f"rank {getattr(exception, 'rank', trainer.global_rank)}: {told}"
        known = "--ckpt_path=" in told or "same command" in told
        told = told if known else f"{told}; {way_out(trainer, self.argv)}"
        os.write(2, f"\nvmoe-momentum: {kind}: {told}\n".encode())

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if self._watch is not None:
            self._watch.done()
            trainer.strategy.barrier()
            self._watch = None

    def leave(self) -> int | None:
        """The exit code, where the ranks have ended together; None where they have not, and the caller says why."""
        if self._watch is not None:
            self._watch.gather()
        return self._code


def _asked(trainer: pl.Trainer) -> int:
    """The signal that told this process to stop, or 0."""
    signals: Any = trainer._signal_connector  # StopSignals, whose file imports this one
    return signals.stop


def follow_first_rank(trainer: pl.Trainer) -> None:
    """Of a rank that Lightning's launcher started."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if isinstance(environment, LightningEnvironment) and "LOCAL_RANK" in os.environ and environment.local_rank():
        follow_parent(os.getppid())


def way_out(trainer: pl.Trainer, argv: list[str]) -> str:
    """How a run that was cut short goes on."""
    saved = last_checkpoint(trainer)
    if saved is None:
        return "nothing was saved yet: the same command starts again"
    return f"the last checkpoint is {saved}; go on with: {resume_command(argv, saved)}"


def resume_command(argv: list[str], path: Path) -> str:
    """The command line once more, from the checkpoint on."""
    words, skip = [], False
    for word in argv:
        if not skip and not word.startswith("--ckpt_path="):
            skip = word == "--ckpt_path"
            words += [] if skip else [word]
        else:
            skip = False
    program = "python -m vmoe_momentum" if Path(sys.argv[0]).name == "__main__.py" else "vmoe-momentum"
    return f"{_launcher(argv) or program} {shlex.join([*words, f'--ckpt_path={path}'])}"


def _launcher(argv: list[str]) -> str | None:
    """What started the ranks, up to our own words."""
    if "SLURM_PROCID" in os.environ and "SLURM_STEP_ID" in os.environ:
        return "srun vmoe-momentum"
    if not dist.is_torchelastic_launched():
        return None
    try:
        words = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().decode().split("\0")[:-1]
    except OSError:
        words = []
    if len(words) > len(argv) and words[-len(argv) :] == argv:
        words = words[1 : -len(argv)]  # behind the interpreter
        at = next((n + 1 for n, word in enumerate(words) if word.endswith(("torch.distributed.run", "torchrun"))), 0)
        return shlex.join(["torchrun", *words[at:]])
    nodes, ranks = os.environ["GROUP_WORLD_SIZE"], os.environ["LOCAL_WORLD_SIZE"]
    return f"torchrun --nnodes={nodes} --nproc_per_node={ranks} -m vmoe_momentum"
