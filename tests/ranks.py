"""Gloo ranks as processes of one test: what takes a second or two to start, and no program."""

import faulthandler
import os
import socket
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn
from unittest.mock import patch

import lightning.pytorch as pl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import Callback

Program = tuple[str, list[str]]  # the folder it runs in, and its words


def on_ranks(number: int, work: Callable[..., None], folder: Path, *args: object) -> None:
    """work(rank, *args) on each, a function of a module; the first that raises ends the test with its traceback."""
    mp.spawn(_rank, (number, work, str(folder / f"meeting_of_{number}"), args), nprocs=number)


def _rank(rank: int, number: int, work: Callable[..., None], meeting: str, args: tuple[object, ...]) -> None:
    _begin()
    torch.manual_seed(0)
    # a rank that waits in vain fails, rather than the test's time running out
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=number, timeout=wait)
    try:
        work(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    _end()


def _begin() -> None:
    faulthandler.enable()  # where a rank was, should a signal end it
    torch.set_num_threads(1)


def _end() -> NoReturn:
    """While an interpreter is cleared up gloo's threads may still let go of tensors, and abort it (pytorch issue
    190489; the command ends its ranks in the same way)."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def run_on_ranks(number: int, folder: Path, programs: list[Program]) -> None:
    """One after the other on the same ranks, as torchrun starts them: importing takes longer than a small run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_programs, (number, port, str(folder), programs), nprocs=number)


def _programs(rank: int, number: int, port: int, folder: str, programs: list[Program]) -> None:
    _begin()
    told = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number}
    told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    with patch.dict(os.environ, {name: str(value) for name, value in told.items()}), patch.object(sys, "argv", [""]):
        for name, words in programs:
            run_in(Path(folder) / name, words)
        dist.destroy_process_group()
    _end()


def run_in(folder: Path, words: list[str]) -> None:
    from vmoe_momentum import cli

    folder.mkdir(parents=True, exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        cli.run(words)
    finally:
        os.chdir(before)


class Losses(Callback):
    """Keeps each training batch's loss, of each rank, in the folder that the run is in."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: object, outputs: dict, *_: object) -> None:
        self.seen.append(float(outputs["loss"]))

    def on_train_end(self, trainer: pl.Trainer, pl_module: object) -> None:
        torch.save(self.seen, f"losses_{trainer.global_rank}.pt")


def losses(folder: Path, ranks: int) -> torch.Tensor:
    """[rank, batch]"""
    return torch.tensor([torch.load(folder / f"losses_{rank}.pt") for rank in range(ranks)], dtype=torch.float64)
