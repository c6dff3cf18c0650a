"""What becomes of a run of several ranks when one of them fails: as programs, under torchrun and Lightning's launcher.

configs/scale/README.md has the table; the last test holds it to these.
"""

import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from faults import Job, lines
from test_interrupted import arguments

TESTS = Path(__file__).parents[1]
TABLE = TESTS.parent / "configs" / "scale" / "README.md"

STRATEGIES = ["ddp", "fsdp2"]


def words(
    pictures: Path, folder: Path, what: str = "nothing", ranks: int = 2, strategy: str = "ddp", **settings: object
) -> list[str]:
    """A long run that saves after every other step. Settings of the fault start with `fault_`."""
    fault = {"folder": folder / "ranks", "what": what}
    fault |= {name[6:]: settings.pop(name) for name in list(settings) if name.startswith("fault_")}
    more = {
        "trainer.devices": ranks, "trainer.max_epochs": 300, "data.batch_size": 8 // ranks,
        "data.eval_batch_size": 4, "model.mixup": 0, "model.cutmix": 0, **settings,
    }  # fmt: skip
    put = ["--trainer.callbacks+=faults.Fault", *(f"--trainer.callbacks.{name}={v}" for name, v in fault.items())]
    command, *rest = arguments("FolderDataModule", pictures, folder, **more)
    return [command, f"--config={TABLE.with_name(f'{strategy}.yaml')}", *rest, *put]


def saved(folder: Path) -> dict:
    return torch.load(next(folder.rglob("stopped.ckpt")), weights_only=True)


FAULTS = {
    "killed": r"rank 1 \(process \d+ on .*\) died without a word: killed",
    "memory": r"rank 1: out of memory .*data.batch_size=4 at data.image_size=16 is too much; lower it",
    "loss": r"rank 1: step 4, batch 1 of epoch 1: the loss \(nan\) is not finite, first in the loss itself",
    "disk": r"rank 0: .*last.ckpt: File too large \(about .* bytes needed, .* bytes free\)",
    "loader": r"rank \d: .*train/.*; replace it",
}


@pytest.mark.long
@pytest.mark.parametrize(
    ("fault", "launcher", "strategy"),
    [(fault, launcher, kind) for kind in STRATEGIES for launcher in ("torchrun", "lightning") for fault in FAULTS],
)
def test_a_rank_that_fails_ends_all_and_one_line_says_which_and_why(fault, launcher, strategy, pictures, tmp_path):
    """Within 60 seconds, with an exit code that is not 0, and the command that goes on from the last checkpoint."""
    if fault == "loader":  # seen by one rank, in a process that reads for it
        root = Path(shutil.copytree(pictures, tmp_path / "data"))
        torn = sorted((root / "train").rglob("*.jpg"))[5]
        torn.write_bytes(b"\xff\xd8" + bytes(torn.stat().st_size - 2))
    else:
        root = pictures
    what = {"loader": "nothing"}.get(fault, fault)
    argv = words(root, tmp_path, what, fault_rank=0 if fault == "disk" else 1, strategy=strategy)
    with Job(tmp_path, argv, launcher=launcher) as job:
        job.wait_for("rank1")
        code, told = job.end(90)  # the fault comes some steps later
    (line,) = lines(told)
    assert code == (1 if launcher == "torchrun" or fault == "killed" else 2), told
    assert re.search(FAULTS[fault], line), line
    if fault == "loader":  # in the first epoch, whatever its order
        assert "goes on" in line or "go on" in line or "same command starts again" in line
    else:
        assert str(tmp_path / "checkpoints" / "last.ckpt") in line
        assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


STOPS = [(target, "torchrun", "ddp") for target in ("rank 0", "all", "launcher")]
STOPS += [(target, "torchrun", "fsdp2") for target in ("rank 0", "rank 1", "all", "launcher")]
STOPS += [(target, "lightning", strategy) for target in ("rank 0", "rank 1", "all") for strategy in STRATEGIES]
NAMES = {"SIGTERM": 143, "SIGINT": 130}


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "launcher", "strategy", "name"),
    [
        ("rank 1", "torchrun", "ddp", "SIGTERM"),
        *((*stop, "SIGTERM") for stop in STOPS),
        ("launcher", "torchrun", "ddp", "SIGINT"),
        ("all", "lightning", "ddp", "SIGINT"),
    ],
)
def test_a_signal_to_any_rank_stops_all_with_a_checkpoint(target, launcher, strategy, name, pictures, tmp_path):
    """And one line with the command that goes on, which does. torchrun has one exit code for all failures, 1; those of
    its ranks it reports."""
    argv = words(pictures, tmp_path, strategy=strategy)
    with Job(tmp_path, argv, launcher=launcher) as job:
        job.wait_for("last.ckpt")
        pids, first = job.pids(), job.process.pid
        told_to = {"rank 0": pids[:1], "rank 1": pids[1:], "all": pids, "launcher": [first]}[target]
        for pid in told_to:
            os.kill(pid, getattr(signal, name))
        code, told = job.end()
    (line,) = lines(told)
    assert code == (1 if launcher == "torchrun" else NAMES[name]), told
    if launcher == "torchrun" and target != "launcher":  # else it waits for nobody's code
        assert f"exitcode  : {NAMES[name]}" in told
    assert f"stopped by {name}: saved " in line and saved(tmp_path)["global_step"] >= 2
    command = shlex.split(line.partition("go on with: ")[2])
    assert command[-1] == f"--ckpt_path={tmp_path / 'checkpoints' / 'stopped.ckpt'}"
    assert (command[0] == "torchrun") == (launcher == "torchrun") and command[command.index("fit") : -1] == argv


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_torchrun_starts_again_and_the_run_goes_on_by_itself(strategy, pictures, tmp_path) -> None:
    argv = words(pictures, tmp_path, "killed", fault_first_attempt=True, strategy=strategy)
    argv += ["--trainer.max_epochs=3"]
    launcher = ["--standalone", "--nproc_per_node=2", "--max-restarts=1"]
    with Job(tmp_path, argv, launcher=launcher) as job:
        code, told = job.end(200)
    assert code == 0, told
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert re.search(rf"restart 1 of torchrun .*: goes on from {path}, step 4", told), told
    assert torch.load(path, weights_only=True)["global_step"] == 9
    assert not list(tmp_path.glob(".*.json"))  # the note of its attempts


@pytest.mark.long
def test_four_ranks_end_as_two_do(pictures, tmp_path) -> None:
    with Job(tmp_path, words(pictures, tmp_path, "killed", 4, fault_rank=2), ranks=4) as job:
        job.wait_for("rank3", 200)
        code, told = job.end(90)
    (line,) = lines(told)
    assert code == 1 and "rank 2 (process" in line and "last.ckpt" in line


@pytest.mark.long
def test_torchrun_that_is_killed_leaves_no_ranks_behind(pictures, tmp_path) -> None:
    """They save, as for any other signal."""
    with Job(tmp_path, words(pictures, tmp_path)) as job:
        job.wait_for("last.ckpt")
        job.process.kill()
        _, told = job.end()
    (line,) = lines(told)
    assert "stopped by SIGTERM: saved" in line and saved(tmp_path)["global_step"] >= 2


@pytest.mark.long
def test_a_first_rank_that_is_killed_before_the_others_join_takes_them_along(pictures, tmp_path) -> None:
    """Lightning's launcher: they look for a store that nobody holds any more."""
    with Job(tmp_path, words(pictures, tmp_path), launcher="lightning") as job:
        until = time.monotonic() + 60
        children = Path(f"/proc/{job.process.pid}/task/{job.process.pid}/children")
        while not (found := children.read_text().split()):
            assert time.monotonic() < until
        job.process.kill()
        job.process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in found):
            assert time.monotonic() < until + 60
            time.sleep(0.2)
    assert not (tmp_path / "ranks" / "rank1").exists()


def test_every_row_of_the_fault_table_names_a_test() -> None:
    part = TABLE.read_text().partition("## What happens when")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|.*\|$", part, re.MULTILINE)[2:]
    assert len(rows) >= 15
    for row in rows:
        names = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert names, row
        for file, name in names:
            assert re.search(rf"^def {name}\(", (TESTS.parent / file).read_text(), re.MULTILINE), (file, name)
