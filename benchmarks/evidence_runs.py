"""One run of benchmarks/evidence.py: fit, then everything that is measured, as a row."""

import shutil
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from evidence_arms import ON_GPU, Cell
from evidence_measures import measure
from evidence_rows import ROOT, Row, make_row

from vmoe_momentum import cli
from vmoe_momentum.training import NotFinite

THREADS = 1  # the order of additions, and so the digits, depend on it; a second process uses the second core


def run_cell(cell: Cell, data: Path, corrupted: Path, out: Path, made: Row, extra: list[str]) -> Row:
    """Trained from the start, unless an earlier attempt got through training; what it prints is in its folder."""
    folder = out / name_of(cell)
    torch.set_num_threads(THREADS)
    device = "cuda" if cell.arm.part in ON_GPU and torch.cuda.is_available() else "cpu"
    if device == "cuda":
        made = made | {"machine": f"{torch.cuda.get_device_name()}, {made['machine']}"}
    start, cpu, diverged, found = time.perf_counter(), time.process_time(), "", {}
    if not (folder / "trained").exists():
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            if not (folder / "trained").exists():
                cli.run(["fit", *options(cell, data, out), *extra])
                (folder / "trained").touch()
            found = measure(cell.arm, folder, data, corrupted, device)
        except NotFinite as error:
            diverged = "training"
            print(error)
        except ValueError as error:
            if "not finite" not in str(error):
                raise
            diverged = "answers"
            print(error)
    spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    return make_row(cell, diverged, found, made | {name: f"{value:.0f}" for name, value in spent.items()})


def options(cell: Cell, data: Path, out: Path) -> list[str]:
    """Of fit."""
    own = [word.replace("--config=", f"--config={ROOT}/") for word in cell.arm.options]
    return [
        f"--config={ROOT / 'configs' / 'fashion.yaml'}",
        *[word for word in own if word.startswith("--config=")],
        f"--data.root={data}",
        f"--seed_everything={cell.seed}",
        f"--data.seed={cell.seed}",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={out}",
        f"--trainer.logger.name={name_of(cell)}",
        "--trainer.logger.version=fit",
        "--trainer.enable_progress_bar=false",
        *[word for word in own if not word.startswith("--config=")],
    ]


def name_of(cell: Cell) -> str:
    return f"{cell.arm.name}_seed{cell.seed}"
