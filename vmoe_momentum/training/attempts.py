"""A job that its launcher starts again goes on by itself: torchrun --max-restarts, SLURM's requeue.

Each attempt logs into a folder of its own, as any run does. A note beside `trainer.default_root_dir`, named by the job,
says where its attempts keep their checkpoints; no other job reads it.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..files.staging import draft_of
from ..models.saved import read_checkpoint
from ..models.sharded import is_checkpoint


def slurm_job() -> str | None:
    """Name of the job that this process belongs to."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    name = os.environ.get("SLURM_JOB_ID") if array is None else f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return None if name is None else re.sub(r"[^\w-]", "_", name)


def job() -> tuple[str, int] | None:
    """Of a job that may be started again its name, and how often it was; None for others."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        run = os.environ.get("TORCHELASTIC_RUN_ID", "none")
        if run == "none":  # torchrun's for who gives it none
            run = f"{os.environ.get('MASTER_ADDR')}_{os.environ.get('MASTER_PORT')}"
        return re.sub(r"[^\w-]", "_", f"torchrun_{run}"), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    name = slurm_job()
    return None if name is None else (f"slurm_{name}", int(os.environ.get("SLURM_RESTART_COUNT", "0")))


class Attempts(Callback):
    """Notes where this attempt keeps its checkpoints, for the next; forgets all once the run is done.

    argv: the command line, which tells one run of a job from another.
    """

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        known = job()
        if known is None or not trainer.is_global_zero:
            return
        folders = _folders(trainer, self.argv) if known[1] else []
        savers = [saver for saver in trainer.checkpoint_callbacks if isinstance(saver, ModelCheckpoint)]
        folders += [str(Path(saver.dirpath).absolute()) for saver in savers if saver.dirpath]
        with draft_of(_note(trainer)) as file:
            file.write(json.dumps({"argv": self.argv, "folders": list(dict.fromkeys(folders))}).encode())

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if job() is not None and trainer.is_global_zero:
            _note(trainer).unlink(missing_ok=True)


def join_attempt(strategy: Any) -> None:
    """Makes the process group of a restarted attempt, whose store must not hold addresses of the one before.

    torchrun of torch 2.4 to 2.15 keeps one store for all attempts and torch no longer tells them apart in it (pytorch
    issue 135712), so none would ever connect. Of several nodes the agents count restarts each for itself; there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1, told to torchrun, helps.
    """
    restarts, nodes = (os.environ.get(name) for name in ("TORCHELASTIC_RESTART_COUNT", "GROUP_WORLD_SIZE"))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts in (None, "0") or nodes != "1" or not shared or dist.is_initialized():
        return
    if not hasattr(strategy, "_get_process_group_backend"):  # one process
        return
    backend = strategy._process_group_backend or strategy._get_process_group_backend()
    timeout = getattr(strategy, "_timeout", None)
    store, rank, size = next(rendezvous("env://", **({"timeout": timeout} if timeout else {})))
    own = PrefixStore(f"attempt{restarts}", store)
    dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=timeout)


def newest_of_job(trainer: pl.Trainer, argv: list[str]) -> str | None:
    """The newest checkpoint that an earlier attempt of this job left and that is whole; None for a first attempt."""
    known = job()
    if known is None:
        return None
    name, restarts = known
    own = Path(trainer.default_root_dir) / f"{name}.ckpt"  # saved at SLURM's warning
    if not restarts and not is_checkpoint(own):
        return None
    found = [path for folder in _folders(trainer, argv) for path in Path(folder).glob("*.ckpt")] if restarts else []
    found += [own] if is_checkpoint(own) else []
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            checkpoint = read_checkpoint(path, tensors=False)
        except ValueError as error:
            rank_zero_warn(f"{error}; an older one is tried")
            continue
        if checkpoint.get("optimizer_states"):
            told = f"restart {restarts} of {name.replace('_', ' ', 1)}"
            rank_zero_info(f"{told}: goes on from {path}, step {checkpoint['global_step']}")
            return str(path)
    rank_zero_info(f"restart {restarts} of {name.replace('_', ' ', 1)}: nothing was saved yet, so it begins anew")
    return None


def _note(trainer: pl.Trainer) -> Path:
    known = job()
    assert known is not None  # only of a job that may be started again
    return Path(trainer.default_root_dir) / f".{known[0]}.attempts.json"


def _folders(trainer: pl.Trainer, argv: list[str]) -> list[str]:
    try:
        note = json.loads(_note(trainer).read_text())
    except (OSError, ValueError):
        return []
    return note["folders"] if note["argv"] == argv else []
