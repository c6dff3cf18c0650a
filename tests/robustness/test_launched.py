"""`vmoe-momentum robustness` as programs: started by itself, by torchrun and by SLURM; ended, and gone on with."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from analysis_helpers import tiny, write_checkpoint

from vmoe_momentum import cli

pytest.importorskip("torchattacks")
pytest.importorskip("cv2")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "configs" / "scale" / "robustness_array.sbatch"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


class Program:
    """A running command on 100 digits, long enough to be met in the middle. A context manager."""

    def __init__(self, digits: Path, out: Path, *more: str, launcher: list[str] | None = None) -> None:
        self.argv = [
            "robustness", f"--model={out.parent / 'a.ckpt'}", f"--data={digits}", f"--out={out}", "--limit=100",
            "--corruptions=[contrast]", "--severities=[2]", "--attacks=[fgsm,square]", "--eps=[2/255]",
            "--queries=300",
        ]  # fmt: skip
        self.out, self.more, self.launcher = out, more, launcher or []

    def __enter__(self) -> "Program":
        words = [*self.launcher, "-m", "vmoe_momentum", *self.argv, *self.more]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen([sys.executable, *words], env=environment, stderr=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*self.workers(), self.process.pid]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.communicate()

    def workers(self) -> list[int]:
        """Of this report, but for the launcher."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            if f"--out={self.out}" in words and "torch.distributed.run" not in words:
                found.append(int(folder.name))
        return sorted(found)

    def wait(self, ready) -> None:
        limit = time.monotonic() + 120
        while not ready() and self.process.poll() is None and time.monotonic() < limit:
            time.sleep(0.05)
        assert ready()

    def cells(self) -> int:
        return len(list((self.out / "cells").glob("*.npz")))

    def end(self) -> tuple[int, str]:
        """Exit code, and what was said; nobody is left."""
        told = self.process.communicate(timeout=60)[1]
        limit = time.monotonic() + 30
        while self.workers() and time.monotonic() < limit:
            time.sleep(0.05)
        assert not self.workers()
        return self.process.returncode, told


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_checkpoint(tiny(), tmp_path / "a.ckpt")
    return tmp_path


def rows(program: Program, out: Path) -> bytes:
    """Of one process, in another folder."""
    cli.run([*program.argv, f"--out={out}"])
    return (out / "rows.csv").read_bytes()


ENDS = [
    pytest.param("SIGTERM", 143, marks=pytest.mark.long),
    pytest.param("SIGINT", 130, marks=pytest.mark.long),
    pytest.param("SIGKILL", -9, marks=pytest.mark.long),
]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize(("name", "code"), ENDS)
def test_helpers_end_with_who_started_them(name: str, code: int, digits: Path, folder: Path) -> None:
    with Program(digits, folder / "o", "--processes=2") as program:
        program.wait(lambda: len(program.workers()) == 2 and program.cells())
        program.process.send_signal(getattr(signal, name))
        found, told = program.end()
    assert found == code
    assert told.count("stopped by") == (code > 0) and "Traceback" not in told
    assert not (folder / "o" / "rows.csv").exists()


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("seconds", [0.0, 0.2, 0.5, 1.0, 2.0, 4.0])
def test_helpers_are_silent_whenever_they_end(seconds: float, digits: Path, folder: Path) -> None:
    """While they import, read their options, look for cells, compute."""
    with Program(digits, folder / "o", "--processes=2") as program:
        program.wait(lambda: len(program.workers()) == 2)
        time.sleep(seconds)
        program.process.send_signal(signal.SIGTERM)
        found, told = program.end()
    assert found == 143 and told.count("stopped by") == 1 and "Traceback" not in told


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes in /proc")
def test_a_helper_is_killed_and_the_report_is_the_same(digits: Path, folder: Path) -> None:
    with Program(digits, folder / "o", "--processes=2") as program:
        program.wait(lambda: len(program.workers()) == 2 and program.cells())
        (helper,) = set(program.workers()) - {program.process.pid}
        os.kill(helper, signal.SIGKILL)
        code, told = program.end()
    assert code == 0 and "process 1 was ended by SIGKILL; the others go on with its cells" in told
    assert (folder / "o" / "rows.csv").read_bytes() == rows(program, folder / "p")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes in /proc")
def test_under_torchrun_a_killed_one_ends_all_and_the_same_command_goes_on(digits: Path, folder: Path) -> None:
    with Program(digits, folder / "o", launcher=TORCHRUN) as program:
        program.wait(lambda: len(program.workers()) == 2 and program.cells() > 1)
        os.kill(program.workers()[-1], signal.SIGKILL)
        code, _ = program.end()
    assert code not in (0, None) and not (folder / "o" / "rows.csv").exists()
    with Program(digits, folder / "o", launcher=TORCHRUN) as again:
        assert again.process.wait(240) == 0
    assert (folder / "o" / "rows.csv").read_bytes() == rows(program, folder / "p")


# ---- SLURM


def test_the_array_script_is_parsed_and_starts_the_command(tmp_path: Path) -> None:
    """With srun and vmoe-momentum that only say how they were called."""
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    for name, line in (
        ("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"'),
        ("vmoe-momentum", 'printf "%s\\n" "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "3"}
    given = ["--data", "my data", "--model=a.ckpt", "--out=o"]
    done = subprocess.run(["bash", str(SCRIPT), *given], env=environment, capture_output=True, text=True, check=True)
    words = done.stdout.splitlines()
    assert words == ["robustness", "--device=cuda", "--workers=3", *given]
    from vmoe_momentum.robustness.commands import parser

    assert parser().parse_args(words[1:]).workers == 3  # every word is one that the command knows
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: sbatch robustness_array.sbatch --data DATA")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self").exists(), reason="finds processes in /proc")
def test_an_autoattack_that_is_killed_goes_on_inside_its_cell(digits: Path, folder: Path) -> None:
    """As soon as a stage of its one batch is kept, which is here at once; and once more at the next. Then nothing but
    cells is left."""
    pytest.importorskip("pyautoattack")
    code = (
        "import sys; from vmoe_momentum import cli; from vmoe_momentum.robustness import begun; "
        "begun.EVERY_SECONDS = 0; cli.main(sys.argv[3:])"
    )
    more = ("--attacks=[square,autoattack]", "--limit=4", "--queries=9")
    cells, seen = folder / "o" / "cells", set()

    def new() -> set[tuple[str, int]]:
        return {(path.name, path.stat().st_mtime_ns) for path in cells.glob("*.stage")} - seen

    for _ in range(2):
        with Program(digits, folder / "o", *more, launcher=["-c", code]) as program:
            program.wait(new)
            seen |= new()
            program.process.kill()
            assert program.end()[0] == -signal.SIGKILL
    with Program(digits, folder / "o", *more) as program:
        assert program.process.wait(300) == 0
    assert {path.suffix for path in cells.iterdir()} == {"", ".npz", ".npy"}
    with Program(digits, folder / "whole", *more) as program:  # with as many threads
        assert program.process.wait(300) == 0
    assert (folder / "o" / "rows.csv").read_bytes() == (folder / "whole" / "rows.csv").read_bytes()
