"""What attacks cost, and what one needs to know to run them again elsewhere."""

from typing import Any

from .attacks import ATTACKS, FIXED, INSIDE, Budget, step_size
from .cells import Cell, told_condition


def count_pictures(cell: Cell) -> int:
    return len(cell.numbers)


def cost(cell: Cell, models: int = 1) -> float:
    """Forward passes a picture and model, about: the answer, and what the attack needs.

    models: that are asked at once; the pictures of a transfer attack are made once for all of them.
    """
    if cell.attack is None:
        return 1
    needed = passes(cell.attack, cell.allowance, cell.router_aware)
    return 1 + (needed if cell.source is None else needed / models)


def passes(name: str, budget: Budget, router: bool = False) -> int:
    """Forward passes an image, about; a backward one counts as two. What an attack costs, for the time that is left."""
    found = ATTACKS[name]
    made = found.passes or {"steps": found.per_step * budget.steps, "queries": budget.queries, None: 3}[found.spends]
    return made * (2 if router and not found.needs_router else 1) * budget.restarts * budget.eot


def protocols(cells: list[Cell]) -> list[dict[str, Any]]:
    """Of every attack and size of noise, as rows call it."""
    found = []
    for cell in cells:
        if cell.kind not in ("attack", "noise"):
            continue
        told = {"condition": told_condition(cell), "severity_or_eps": cell.severity, "pictures": count_pictures(cell)}
        budget = cell.allowance
        found.append(told | (_protocol(cell.attack, budget) if cell.attack else {
            "norm": budget.norm, "eps": budget.eps, "seed": budget.seed, "dtype": "float32",
        }))  # fmt: skip
    return found


def _protocol(name: str, budget: Budget) -> dict[str, str | int | float]:
    found = ATTACKS[name]
    told: dict[str, str | int | float] = {
        "norm": budget.norm, "eps": budget.eps, "loss": found.loss, "step": found.step, "start": _start(name, budget),
    }  # fmt: skip
    if found.step in (FIXED, "eps"):
        told["step_size"] = budget.eps if found.step == "eps" else step_size(budget)
    if found.spends is not None:
        told[found.spends] = getattr(budget, found.spends)
    told |= {"restarts": budget.restarts, "eot": budget.eot, "seed": budget.seed, "dtype": "float32"}
    return told | {"package": found.package or ""}


def _start(name: str, budget: Budget) -> str:
    if budget.random_start:
        return INSIDE
    told = ATTACKS[name].start
    return f"{told}, then {INSIDE}" if ATTACKS[name].random_start and budget.restarts > 1 else told
