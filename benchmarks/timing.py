"""Timing two things side by side in one process, and writing what came out."""

import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track

from vmoe_momentum.cli import use_large_pages

use_large_pages()  # as every command does; for all that is timed


class Timing(NamedTuple):
    """Of one function among several, over the rounds: median seconds, and the ratio to the first of them in the same
    round, with its quartiles."""

    seconds: float
    ratio: float
    low: float
    high: float


def interleaved(functions: dict[str, Callable[[], None]], repeats: int, warm_up: int = 2) -> dict[str, Timing]:
    """Each function once a round, in turn: drift of the clock and of what else the machine does meets all of them."""
    rounds = []
    for _ in track(range(repeats + warm_up), "timing"):
        rounds.append({name: _seconds(function) for name, function in functions.items()})
    first, found = next(iter(functions)), {}
    for name in functions:
        ratios = [one[name] / one[first] for one in rounds[warm_up:]]
        low, ratio, high = statistics.quantiles(ratios, n=4)
        found[name] = Timing(statistics.median(one[name] for one in rounds[warm_up:]), ratio, low, high)
    return found


def side_by_side(ours: Callable[[], None], peer: Callable[[], None], repeats: int) -> tuple[float, float, float]:
    """Median seconds of each and the median of the ratios of neighbouring runs, after two warm-up rounds.

    Alternating cancels drift of the clock and of what else the machine does.
    """
    pairs = []
    for _ in range(repeats + 2):
        pairs.append(tuple(_seconds(function) for function in (ours, peer)))
    pairs = pairs[2:]
    mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    return mine, theirs, statistics.median(a / b for a, b in pairs)


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def device_name() -> str:
    """The GPU's name, or the processor's and the number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    """One CSV, the device and torch's version in every row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**row, "device": device_name(), "torch": torch.__version__} for row in rows]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def growth_picture(points: list[tuple[str, float, str, float]], path: Path) -> None:
    """Forward and backward time over each axis that grows, log-log, beside a grey line of slope 1.

    points: axis, its value, whose time, ms.
    """
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(axis for axis, *_ in points))
    figure = Figure(figsize=(4 * len(axes), 3.6), layout="constrained")
    for plot, letter in zip(figure.subplots(1, len(axes), squeeze=False)[0], axes, strict=True):
        own = [(value, name, ms) for axis, value, name, ms in points if axis == letter]
        values = sorted({value for value, *_ in own})
        for name in dict.fromkeys(name for _, name, _ in own):
            line = [(value, ms) for value, whose, ms in own if whose == name]
            plot.loglog(*zip(*line, strict=True), marker="o", markersize=3, label=name)
        lowest = min(ms for *_, ms in own)
        plot.loglog(values, [0.8 * lowest * value / values[0] for value in values], color="0.7", label="slope 1")
        plot.set_xticks(values, [f"{value:g}" for value in values])
        plot.minorticks_off()
        ticks = [tick for power in range(7) for tick in (10**power, 2 * 10**power, 5 * 10**power)]
        low, high = plot.get_ylim()
        inside = [tick for tick in ticks if low <= tick <= high]
        plot.set_yticks(inside, [str(tick) for tick in inside])
        plot.set(xlabel=letter, ylabel="forward and backward, ms")
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(device_name(), fontsize=8)
    figure.savefig(path, dpi=130)
