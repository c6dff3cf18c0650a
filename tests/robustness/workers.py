"""Processes that evaluate one plan together, with planted models: forked from a server that has imported everything."""

import multiprocessing
import os
import time
from pathlib import Path

from forks import FORKS
from planted import Planted, planted
from torch import Tensor

from vmoe_momentum.robustness import Settings, begun, evaluate, make_plan, todo, write_report
from vmoe_momentum.robustness.cells import told_condition
from vmoe_momentum.robustness.processes import ALONE, Place

SETTINGS = Settings(
    attacks=("fgsm", "pgd"), transfer=("mi-fgsm",), eps=(1 / 255, 2 / 255), steps=2,
    corruptions=("contrast", "pixelate"), severities=(1, 2),
)  # fmt: skip
CELLS = 16  # clean, 4 corruptions, 2 of noise, 4 attacks, 2 from each of two models, PGD at 64/255


class Slow(Planted):
    """Takes its time with attacks, so that others come to their share."""

    def forward(self, images: Tensor) -> Tensor:
        time.sleep(0.01 if images.requires_grad else 0.0)
        return super().forward(images)


def compute(
    data: Path, out: Path, place: Place = ALONE, hold: str = "", patience: float = 60.0, every: float = 0.0
) -> None:
    """One of the processes, to the report where it is the first. OUT/log gets a line for each cell and model it runs.

    hold: a condition; when it comes to it, it says so in OUT/held and waits for OUT/go. every: seconds from which on
    what is answered of a cell is kept; here after each batch.
    """
    begun.EVERY_SECONDS = every
    models = [planted(name)._replace(module=Slow().eval()) for name in ("a", "b")]
    todo.PATIENCE, run_cell = patience, evaluate.run_cell

    def noted(cell, models, *rest):
        with (out / "log").open("a") as log:
            log.writelines(f"{os.getpid()} {told_condition(cell)} {cell.severity} {model.name}\n" for model in models)
        if hold and cell.condition == hold and not (out / "go").exists():
            (out / "held").touch()
            while not (out / "go").exists():
                time.sleep(0.02)
        return run_cell(cell, models, *rest)

    evaluate.run_cell = noted
    cells = make_plan(SETTINGS._replace(data=str(data)), models)
    evaluation = evaluate.evaluate(cells, models, out, batch_size=4, place=place)
    if place.rank == 0:
        write_report(evaluation, out, {})


def begin(data: Path, out: Path, *rest: object) -> multiprocessing.Process:
    out.mkdir(parents=True, exist_ok=True)
    process = FORKS.Process(target=compute, args=(data, out, *rest))
    process.start()
    return process


def end(*processes: multiprocessing.Process) -> list[int | None]:
    """Exit codes; a process that hangs is killed and has none of a good end."""
    for process in processes:
        process.join(60)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def log(out: Path) -> list[tuple[str, str]]:
    """(process, what it ran)"""
    return [tuple(line.split(" ", 1)) for line in (out / "log").read_text().splitlines()]
