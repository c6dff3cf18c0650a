"""Gloo ranks as processes of one test: what takes a second or two to start, and no program."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(number: int, work: Callable[..., None], folder: Path, *args: object) -> None:
    """work(rank, *args) on each, a function of a module; the first that raises ends the test with its traceback."""
    mp.spawn(_rank, (number, work, str(folder / f"meeting_of_{number}"), args), nprocs=number)


def _rank(rank: int, number: int, work: Callable[..., None], meeting: str, args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # a rank that waits in vain fails, rather than the test's time running out
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=number, timeout=wait)
    try:
        work(rank, *args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
