"""Processes forked from a server that has imported everything once: several ranks for little more than one.

Preloaded by name: Python 3.11's server does not look for modules where pytest found the tests.
"""

import multiprocessing
import os
import socket
from pathlib import Path

from vmoe_momentum import cli

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torchattacks", "cv2", "vmoe_momentum.lightning_cli"]
    + [f"vmoe_momentum.robustness.{name}" for name in ("evaluate", "plan", "report")]
)


def run_ranks(folder: Path, commands: list[list[str]], count: int, timeout: float = 120) -> list[int | None]:
    """Runs the commands one after the other, in `folder` and as torchrun would on `count` gloo ranks; exit codes.

    What each rank says is in FOLDER/said<rank>. One that hangs is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [FORKS.Process(target=_run, args=(folder, commands, rank, count, port)) for rank in range(count)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
        process.kill()
        process.join()
    return [process.exitcode for process in ranks]


def _run(folder: Path, commands: list[list[str]], rank: int, count: int, port: int) -> None:
    os.chdir(folder)
    said = os.open(f"said{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    place = {
        "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "forks",
    }  # fmt: skip
    if count > 1:
        os.environ |= {name: str(value) for name, value in place.items()}
    for command in commands:
        cli.main(command)
