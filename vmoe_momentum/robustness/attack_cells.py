"""The cells of noise and attacks on the pictures of --data."""

from collections.abc import Sequence

from .attacks import ATTACKS, Budget, Norm
from .cells import Cell
from .pictures import Pictures, subset
from .settings import Settings, all_attacks, budget_of, options_of

LARGE_EPS = 64 / 255  # Linf: any undefended model must fall


def attack_cells(clean: Pictures, settings: Settings, models: Sequence[str]) -> list[Cell]:
    few = tuple(subset(len(clean.paths), query_count(settings, len(clean.paths)), settings.seed))
    cells = []
    if all_attacks(settings):
        noise = "uniform-noise" if settings.norm == "Linf" else "uniform-noise-L2"
        cells += [
            Cell(clean, "noise", noise, severity_of(eps, settings.norm), budget=budget_of(settings, eps))
            for eps in settings.eps
        ]
    for name in all_attacks(settings):
        bought = ATTACKS[name].spends == "queries"  # dear, so run on a part
        for eps in settings.eps:
            cell = Cell(
                clean, "attack", condition_of(name, settings), severity_of(eps, settings.norm), attack=name,
                budget=budget_of(settings, eps, name), router_aware=_drives_routers(name, settings),
                order=few if bought else None,
            )  # fmt: skip
            # of the model they are made on it is the attack itself
            cells += [cell._replace(source=model) for model in models] if name in settings.transfer else [cell]
    if any(ATTACKS[name].spends == "steps" for name in all_attacks(settings)):
        check = tuple(subset(len(clean.paths), 100, settings.seed))
        budget = Budget(LARGE_EPS, steps=settings.steps, seed=settings.seed, eot=settings.eot)
        severity = severity_of(LARGE_EPS, "Linf")
        cells.append(Cell(clean, "attack", "sanity-pgd", severity, attack="pgd-margin", budget=budget, order=check))
    return cells


def query_count(settings: Settings, pictures: int) -> int:
    """Pictures that attacks by queries get: unless it is said, a tenth, 100 at least and 1,000 at most."""
    return min(1000, max(100, pictures // 10)) if settings.query_images is None else settings.query_images


def _drives_routers(name: str, settings: Settings) -> bool:
    return ATTACKS[name].needs_router or (settings.router_aware and ATTACKS[name].router)


def condition_of(name: str, settings: Settings) -> str:
    """The attack with its budget, as rows call it: pgd-20-rs-r5-eot4-router-L2."""
    told = name + {"steps": f"-{settings.steps}", "queries": f"-{settings.queries}q", None: ""}[ATTACKS[name].spends]
    options = options_of(name, settings)
    told += "-rs" if options.get("random_start") else ""
    for option, short in (("restarts", "r"), ("eot", "eot")):
        told += f"-{short}{options[option]}" if options.get(option, 1) > 1 else ""
    router = settings.router_aware and ATTACKS[name].router
    return told + ("-router" if router else "") + ("" if settings.norm == "Linf" else "-L2")


def severity_of(eps: float, norm: Norm) -> str:
    """As rows say it: of 255 in Linf."""
    return f"{255 * eps:g}" if norm == "Linf" else f"{eps:g}"
