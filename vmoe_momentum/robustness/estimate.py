"""How long a plan will take, said before its first cell."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch

from ..progress import clock
from .attacks import ATTACKS, Budget, run_attack
from .cells import Cell
from .models import Model
from .protocol import cost, count_pictures

LONG = 600.0  # seconds from which on the line says what would take less
LOWERED_BY = {"steps": ("--limit", "--steps"), "queries": ("--query_images", "--queries"), None: ("--limit",)}


class Pace(NamedTuple):
    """Seconds a picture."""

    forward: float
    backward: float  # a third of forward and backward, as costs count backward as two


def measure(model: Model, count: int, device: str, gradients: bool) -> Pace:
    """A pass over one batch of noise, and where attacks follow gradients one there and back."""
    side = model.view.size
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        forward = _seconds(lambda: model.module(images)) / count
    if not gradients:
        return Pace(forward, forward)
    labels = torch.zeros(count, dtype=torch.long, device=device)
    both = _seconds(lambda: run_attack("fgsm", model.module, images, labels, Budget(1 / 255))) / count
    return Pace(forward, both / 3)


def _seconds(run: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    float(run().flatten()[0])  # also waits for a GPU
    return time.perf_counter() - start


def estimate(left: Iterable[tuple[Cell, Mapping[str, int]]], paces: dict[str, Pace]) -> dict[str | None, float]:
    """Seconds by attack, None for what is none. left: cells, and the pictures that each model has yet to answer."""
    found: dict[str | None, float] = {}
    for cell, names in left:
        by_gradient = cell.attack is not None and ATTACKS[cell.attack].spends != "queries"
        for name, pictures in names.items():
            forward, backward = paces[name]
            made = forward + (cost(cell, len(paces)) - 1) * (backward if by_gradient else forward)
            found[cell.attack] = found.get(cell.attack, 0.0) + pictures * made
    return found


def tell(seconds: dict[str | None, float], processes: int = 1) -> str:
    """One line; of a long run it names the attack that takes most of it, and what lowers that. processes: at it."""
    total = sum(seconds.values())
    told = f"about {clock(total)} of passes through the models to come, reading and corrupting pictures aside"
    if processes > 1:
        told += f"; shared by {processes} processes, about {clock(total / processes)}"
    name = max(seconds, key=seconds.__getitem__)
    if name is None or total <= LONG or seconds[name] <= total / 2:
        return told
    less = " or ".join(LOWERED_BY[ATTACKS[name].spends])
    early = " at most" if ATTACKS[name].parts else ""  # what has fallen is not asked about again
    return f"{told}; {name} takes {clock(seconds[name])} of it{early}: lower {less}"


def estimate_line(
    left: Sequence[tuple[Cell, Mapping[str, int]]],
    models: Sequence[Model],
    batch_size: int,
    device: str,
    processes: int = 1,
) -> str | None:
    """None where nothing is left to do."""
    left = [(cell, names) for cell, names in left if names]
    if not left:
        return None
    count = min(batch_size, max(count_pictures(cell) for cell, _ in left))
    gradients = any(cell.attack and ATTACKS[cell.attack].spends != "queries" for cell, _ in left)
    waiting = {name for _, names in left for name in names}
    paces = {model.name: measure(model, count, device, gradients) for model in models if model.name in waiting}
    return tell(estimate(left, paces), processes)
