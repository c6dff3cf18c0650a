"""Ranks that look after one another, without a network to train: threads that wait in collectives are ended, too."""

import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from vmoe_momentum.training.peers import Patience, Watch

RANKS = 3
QUICK = Patience(every=0.1, silent=2.0, leaving=0.5, saving=5.0, ending=2.0, stopping=2.0)


def rank(own: int, port: int, fault: str, folder: str) -> None:
    """Waits in a collective that the others never reach, or does what the fault says."""
    os.dup2(os.open(f"{folder}/{own}", os.O_WRONLY | os.O_CREAT), 2)
    store = dist.TCPStore("127.0.0.1", port, RANKS, own == 0, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=own, world_size=RANKS)
    asked = []
    # as on other machines: no handle on a process there
    if fault == "halted":
        del os.pidfd_open
    watch = Watch(
        dist.distributed_c10d._get_default_store(), own, RANKS, way_out=lambda: "start again",
        stopping=lambda: asked[0] if asked else 0, patience=QUICK,
    )  # fmt: skip
    watch.start()
    dist.barrier()
    time.sleep(1.0)
    if fault == "done":
        watch.done()
        dist.barrier()
        time.sleep(own)  # the one that holds the store goes first
        os._exit(0)
    if fault == "killed" and own == 1 or fault == "first killed" and own == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "halted" and own == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "error" and own == 2:
        if watch.end(2):
            os.write(2, b"vmoe-momentum: error: rank 2: its own\n")
        time.sleep(100)  # as what is cleared up may hang
    if fault == "both" and watch.end(3):
        os.write(2, f"vmoe-momentum: error: rank {own}: its own\n".encode())
    if fault == "hangs" and own == 1:
        asked.append(signal.SIGTERM)
        time.sleep(100)
    if own != 1 or fault in ("error", "both"):
        try:
            dist.barrier()
        except RuntimeError as error:
            watch.await_cause(error)
    time.sleep(100)


FAULTS = {  # exit codes, and the one line
    "killed": ([1, -9, 1], r"error: rank 1 \(process \d+ on .*\) died without a word: killed.*; start again"),
    "first killed": ([-9, 1, 1], r"error: rank 0 .*died without a word: killed.*; start again"),
    "halted": ([1, None, 1], r"error: rank 1 .* shows no sign of life for 2 s.*; start again"),
    "error": ([2, 2, 2], r"error: rank 2: its own"),
    "both": ([3, 3, 3], r"error: rank \d: its own"),
    "hangs": ([143, 143, 143], r"stopped by SIGTERM: rank 1 came to no place to save within 2 s; start again"),
    "done": ([0, 0, 0], None),
}


@pytest.fixture(scope="module")
def context():
    """Processes that need not import torch each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="handles on processes are Linux's")
@pytest.mark.parametrize("fault", FAULTS)
def test_all_ranks_end_within_seconds_and_one_says_why(fault, context, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=rank, args=(own, port, fault, str(tmp_path))) for own in range(RANKS)]
    codes, line = FAULTS[fault]
    try:
        for process in ranks:
            process.start()
        until = time.monotonic() + 60
        for process, code in zip(ranks, codes, strict=True):
            if code is not None:
                process.join(max(0.0, until - time.monotonic()))
        assert [process.exitcode for process in ranks] == codes
    finally:
        for process in ranks:
            process.kill()
            process.join()
    said = "".join(Path(tmp_path / str(own)).read_text() for own in range(RANKS))
    told = re.findall("^vmoe-momentum: (.*)$", said, re.MULTILINE)
    assert len(told) == (line is not None), said
    assert line is None or re.fullmatch(line, told[0])
