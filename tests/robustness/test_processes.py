"""Several processes make the report that one makes, to the byte; killed, stuck and failing ones hold nobody up."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from analysis_helpers import tiny, write_checkpoint
from PIL import Image
from planted import paint, planted
from workers import CELLS, SETTINGS, begin, compute, end, log

from vmoe_momentum import cli
from vmoe_momentum.parsers import pick_device
from vmoe_momentum.robustness import begun, evaluate, make_plan, processes
from vmoe_momentum.robustness.cells import Cell
from vmoe_momentum.robustness.claims import Claims
from vmoe_momentum.robustness.commands import without_processes
from vmoe_momentum.robustness.pictures import Pictures
from vmoe_momentum.robustness.processes import ALONE, Helpers, Place, choose_device, find_place, shared_cores
from vmoe_momentum.robustness.todo import Todo

pytest.importorskip("torchattacks")
pytest.importorskip("cv2")
ROOT = Path(__file__).parents[2]
PICTURES = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("in")
    for number in range(PICTURES):
        paint(root / "n01440764" / f"{number}.png", 0 if number % 3 else 7, blue=number)
    return root


@pytest.fixture(scope="module")
def one(data: Path, tmp_path_factory) -> dict[str, bytes]:
    """What one process writes in one go, and keeps whole cells of."""
    out = tmp_path_factory.mktemp("one")
    assert end(begin(data, out, ALONE, "", 60.0, 1e9)) == [0]
    assert len(log(out)) == 2 * CELLS
    return files(out)


def files(out: Path) -> dict[str, bytes]:
    """The report, but for how long it took."""
    names = ("*.csv", "report.*", "*.png")
    assert {path.suffix for path in (out / "cells").iterdir()} == {"", ".npz", ".npy"}  # nothing that is begun
    return {path.name: path.read_bytes() for name in names for path in out.glob(name)}


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert path.exists()


# ---- all at once


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.long)])
def test_any_number_of_processes_writes_the_same(count: int, data: Path, one: dict[str, bytes], tmp_path: Path) -> None:
    """Every answer is made once, and everybody makes some."""
    workers = [begin(data, tmp_path, Place(rank, count)) for rank in range(count)]
    assert end(*workers) == [0] * count
    assert files(tmp_path) == one
    made = log(tmp_path)
    assert max(Counter(what for _, what in made).values()) == 1 and len(made) == 2 * CELLS
    assert len({process for process, _ in made}) == count


@pytest.mark.parametrize("held", [pytest.param("clean", marks=pytest.mark.long), "pgd-2"])
def test_one_is_killed_and_the_others_do_its_cells(
    held: str, data: Path, one: dict[str, bytes], tmp_path: Path
) -> None:
    victim = begin(data, tmp_path, ALONE, held)
    wait_for(tmp_path / "held")
    other = begin(data, tmp_path)
    while len(log(tmp_path)) < 8:
        time.sleep(0.02)
    os.kill(victim.pid, signal.SIGKILL)
    assert end(other, victim) == [0, -signal.SIGKILL]
    assert files(tmp_path) == one


@pytest.mark.long
def test_one_that_is_stuck_is_not_waited_for(data: Path, one: dict[str, bytes], tmp_path: Path) -> None:
    """Stopped while it holds a claim; it, too, ends well when it is woken."""
    stuck = begin(data, tmp_path, ALONE, "pgd-2")
    wait_for(tmp_path / "held")
    os.kill(stuck.pid, signal.SIGSTOP)
    try:
        assert end(begin(data, tmp_path, ALONE, "", 0.1)) == [0]
        assert files(tmp_path) == one
    finally:
        (tmp_path / "go").touch()
        os.kill(stuck.pid, signal.SIGCONT)
    assert end(stuck) == [0] and files(tmp_path) == one


def test_without_locks_it_is_computed_twice(
    data: Path, one: dict[str, bytes], tmp_path: Path, monkeypatch, capsys
) -> None:
    def nothing(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", nothing)
    monkeypatch.setattr(evaluate, "run_cell", evaluate.run_cell)  # put back what compute sets
    monkeypatch.setattr(begun, "EVERY_SECONDS", begun.EVERY_SECONDS)
    tmp_path.joinpath("out").mkdir()
    compute(data, tmp_path / "out")
    assert files(tmp_path / "out") == one
    assert "no locks here (No locks available), so processes may compute a cell twice" in capsys.readouterr().err


# ---- claims

HOLDER = """
import os, sys, time
from pathlib import Path
from vmoe_momentum.robustness.cells import Cell
from vmoe_momentum.robustness.claims import Claims
claims = Claims(Path(sys.argv[1]))
taken = claims.take("x")
if os.fork() == 0:  # as loaders' workers are
    time.sleep(30)
    os._exit(0)
print(taken, flush=True)
time.sleep(30)
"""


def test_a_claim_is_one_processs_until_it_dies(tmp_path: Path) -> None:
    """Whatever its workers do; and nobody else's meanwhile."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, start_new_session=True) as holder:
        assert holder.stdout.readline() == b"True\n"
        with Claims(tmp_path) as claims:
            assert claims.missing is None
            assert claims.take("y") and claims.take("y") and not claims.take("x")
            start = time.monotonic()
            claims.wait_for("x", seconds=0.3)
            assert 0.3 <= time.monotonic() - start < 5 and not claims.take("x")
            holder.kill()
            claims.wait_for("x", seconds=20)
            assert claims.take("x")
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdout.close()
    assert [path.name for path in tmp_path.iterdir()] == [".claims"]


def test_the_first_cell_then_the_dearest(data: Path, tmp_path: Path, monkeypatch) -> None:
    models = [planted()]
    cells = make_plan(SETTINGS._replace(data=str(data), attacks=("fgsm", "square"), transfer=(), queries=50), models)
    store = evaluate.Store(tmp_path)
    with Claims(tmp_path) as claims:
        paths = {("planted", number): tmp_path / f"{number}.npz" for number in range(len(cells))}
        meter = evaluate.Meter("", evaluate.Work([]))
        left = Todo(cells, models, store, paths, claims, meter)
        names = [cells[number].condition for number in left.order]
        assert names[:5] == ["clean", "square-50q", "square-50q", "fgsm", "fgsm"]
        assert names[5:] == [cell.condition for cell in cells if cell.attack is None][1:]
        assert sorted(left.order) == list(range(len(cells)))


# ---- which process this is

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
PLACES = [
    ({}, ALONE),
    ({"RANK": "0", "WORLD_SIZE": "1"}, ALONE),
    (TORCHRUN, Place(5, 8, 1, 4, "process 5 of 8")),
    (SRUN, Place(5, 8, 1, 4, "process 5 of 8")),
    ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, ALONE),  # the batch script itself, outside srun
    ({"SLURM_ARRAY_TASK_ID": "3"}, ALONE._replace(name="array task 3")),
    (SRUN | {"SLURM_ARRAY_TASK_ID": "3"}, Place(5, 8, 1, 4, "array task 3, process 5 of 8")),
]


@pytest.mark.parametrize(("environment", "place"), PLACES)
def test_launchers_say_which_process_this_is(environment: dict[str, str], place: Place) -> None:
    assert find_place(environment) == place


def test_each_has_a_gpu_and_a_share_of_the_cores(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    places = [Place(rank, 4, rank, 4) for rank in range(4)]
    assert [choose_device("cuda", place) for place in places] == ["cuda:0", "cuda:1", "cuda:2", "cuda:0"]
    assert {choose_device("cuda:1", place) for place in places} == {"cuda:1"}
    assert choose_device("cuda", ALONE) == "cuda" and choose_device("cpu", places[1]) == "cpu"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        for count, threads in ((1, 8), (3, 2), (99, 1)):
            with shared_cores(count):
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 8
        monkeypatch.setenv("OMP_NUM_THREADS", "5")
        with shared_cores(4):
            assert torch.get_num_threads() == 8  # as it was told
    finally:
        torch.set_num_threads(before)


def test_how_many_there_are_is_no_part_of_the_report() -> None:
    assert without_processes(["--a=1", "--processes=3", "--b", "2"]) == ["--a=1", "--b", "2"]
    assert without_processes(["--processes", "3", "--b"]) == ["--b"]


# ---- the command


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tiny(), tmp_path / "a.ckpt")
    return tmp_path


SHORT = ["--model=a.ckpt", "--corruptions=[none]", "--attacks=[fgsm]", "--eps=[2/255]", "--limit=6"]


def fails(argv: list[str], capsys) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["robustness", *argv])
    return stopped.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def test_an_error_names_process_and_cell(digits: Path, here: Path, monkeypatch, capsys) -> None:
    def broken(cell, *_: object) -> None:
        if cell.condition == "fgsm":
            raise ValueError("what went wrong")

    def answer(cell, models, *rest):
        broken(cell)
        return run_cell(cell, models, *rest)

    run_cell = evaluate.run_cell
    monkeypatch.setattr(evaluate, "run_cell", answer)
    told = "vmoe-momentum: error: {}data: fgsm 2: what went wrong"
    assert fails([f"--data={digits}", *SHORT], capsys) == (2, told.format(""))
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert fails([f"--data={digits}", *SHORT], capsys) == (2, told.format("process 5 of 8: "))
    code, line = fails([f"--data={digits}", *SHORT, "--processes=2"], capsys)
    assert code == 2 and line.endswith("--processes=2: this is process 5 of 8 already; leave it out, or start one")


def test_the_first_process_writes_the_report_and_one_of_equals_does(
    digits: Path, here: Path, monkeypatch, capsys
) -> None:
    argv = ["robustness", f"--data={digits}", *SHORT, "--out=o"]
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    cli.run(argv)
    assert [path.name for path in (here / "o").iterdir()] == ["cells"]
    said = capsys.readouterr()
    assert said.out == "" and "robustness" not in said.err
    for name in TORCHRUN:
        monkeypatch.delenv(name)
    whole = evaluate.evaluate

    def overtaken(*args, **kwargs):
        """As if the same command, started elsewhere with another device, had ended just before."""
        evaluation = whole(*args, **kwargs)
        monkeypatch.setattr(evaluate, "evaluate", whole)
        cli.run([*argv, "--device=cpu"])
        return evaluation

    monkeypatch.setattr(evaluate, "evaluate", overtaken)
    cli.run(argv)
    out = capsys.readouterr().out
    assert out.count("rows: o/rows.csv") == 1 and out.endswith("report: o/report.html, by another process\n")
    told = json.loads((here / "o" / "report.json").read_text())["provenance"]["command"]
    assert told.endswith("--device=cpu")
    cli.run([*argv, "--batch_size=32"])  # another report is written
    assert json.loads((here / "o" / "report.json").read_text())["provenance"]["batch_size"] == 32


def sleeping(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)


def test_what_becomes_of_helpers() -> None:
    """One that is killed is told of, one that failed ends all, and none outlives the end."""
    helpers = Helpers([], 3)
    helpers.running = {1: sleeping("input()"), 2: sleeping("import time; time.sleep(60)")}
    helpers.running[1].kill()
    helpers.running[1].wait()
    assert helpers.check() == ["process 1 was ended by SIGKILL; the others go on with its cells"]
    assert helpers.check() == []
    last = helpers.running[2]
    helpers.running[1] = sleeping("raise SystemExit(2)")
    helpers.running[1].wait()
    with pytest.raises(ValueError, match="--processes=3: process 1 ended with an error"), _started(helpers):
        helpers.check()
    assert last.poll() == -signal.SIGTERM and not helpers.running
    assert processes._signal(143) == "SIGTERM" and processes._signal(1) is None and processes._signal(255) is None


class _started:
    """The end of helpers without their beginning."""

    def __init__(self, helpers: Helpers) -> None:
        self.helpers = helpers

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        self.helpers.__exit__(*error)


def test_photographs_are_decoded_by_the_share_of_the_cores(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(evaluate, "usable_cores", lambda: 8)
    found = {}
    for side in (16, 64):
        path = tmp_path / f"{side}.png"
        Image.new("RGB", (side, 2 * side)).save(path)
        cell = Cell(Pictures("data", [path], [0]), "clean", "clean")
        found[side] = [evaluate.loader_workers([cell], count) for count in (1, 4, 16)]
    assert found == {16: [0, 0, 0], 64: [8, 2, 1]}
    path.write_bytes(b"nothing")
    assert evaluate.loader_workers([cell], 1) == 0


def test_the_device_is_the_gpu_where_there_is_one(monkeypatch) -> None:
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    for there, taken in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert pick_device(None) == taken and pick_device("cpu") == "cpu"
