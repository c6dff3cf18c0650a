"""What a report is asked for, checked before any model is opened."""

from pathlib import Path
from typing import Any, NamedTuple

from ..ranges import check_all
from .asked import RANGES, TRANSFER_NAMES
from .attacks import ATTACKS, PLAIN, Budget, Norm, check_budget
from .corruptions import REGISTRY
from .ids import read_ids
from .sets import SETS, named_corruptions

DEFAULT_EPS: dict[Norm, tuple[float, ...]] = {"Linf": (1 / 255, 2 / 255, 4 / 255), "L2": (0.5, 1.0, 2.0)}


class Settings(NamedTuple):
    """What was asked for. eps in units of pixels in [0, 1]."""

    data: str | None = None
    sets: dict[str, str] = {}  # name of a published set (sets.SETS) -> its folder
    corruptions: tuple[str, ...] | None = None  # None: the 15
    severities: tuple[int, ...] | None = None  # None: all five
    regenerate: bool = True
    attacks: tuple[str, ...] = ("fgsm", "pgd", "pgd-margin", "square")
    transfer: tuple[str, ...] = ()  # attacks whose pictures, made on each model, are shown to all of them
    eps: tuple[float, ...] = DEFAULT_EPS["Linf"]
    norm: Norm = "Linf"
    steps: int = 20
    queries: int = 5000
    query_images: int | None = None  # None: see query_count
    router_aware: bool = False
    random_start: bool = False
    restarts: int = 1
    eot: int = 1
    limit: int | None = None
    ids: str | None = None  # file that names the pictures of data and imagenet_c to take
    seed: int = 0


def check_settings(settings: Settings) -> None:
    """Whatever needs no model. Raises ValueError, FileNotFoundError: names, numbers, folders that mean nothing."""
    check_all("--", settings._asdict(), RANGES)
    for name, root in {"data": settings.data, **settings.sets}.items():
        if root is not None and not Path(root).is_dir():
            raise FileNotFoundError(f"--{name}={root}: no such folder")
    if settings.ids is not None:
        if settings.limit is not None:
            raise ValueError(f"--ids={settings.ids}: it says which pictures, so leave out --limit={settings.limit}")
        read_ids(settings.ids)
    if "imagenet_o" in settings.sets and settings.data is None:
        raise ValueError(
            f"--imagenet_o={settings.sets['imagenet_o']}: needs --data, pictures of known classes to tell its own from"
        )
    for setting in ("corruptions", "severities", "attacks", "transfer", "eps"):
        values = getattr(settings, setting) or ()
        told = [f"{255 * value:g}/255" for value in values] if setting == "eps" else list(values)
        twice = [value for place, value in enumerate(told) if value in told[:place]]
        if twice:
            raise ValueError(f"--{setting}: {twice[0]} is there twice; name each once")
    if settings.severities is not None and not settings.severities:
        raise ValueError("--severities=[]: use some of 1 to 5, or leave it out for all")
    _check_corruptions(settings)
    if all_attacks(settings) and not settings.eps:
        raise ValueError("--eps=[]: give budgets, such as [1/255], or no attacks (--attacks=[])")
    for name in settings.transfer:
        if name not in TRANSFER_NAMES:
            raise ValueError(f"--transfer={name}: not one of {', '.join(TRANSFER_NAMES)}")
    for name in all_attacks(settings):
        for eps in settings.eps:
            check_budget(name, budget_of(settings, eps, name))
    if settings.router_aware and not any(ATTACKS[name].router for name in all_attacks(settings)):
        knowing = ", ".join(name for name, found in ATTACKS.items() if found.router)
        raise ValueError(f"--router_aware: none of --attacks={list(settings.attacks)} uses it; {knowing} do")


def _check_corruptions(settings: Settings) -> None:
    """Raises ValueError: a name of none of the sets, or of one that was not given."""
    for name in settings.corruptions or ():
        if name not in named_corruptions():
            raise ValueError(f"--corruptions={name}: not one of {', '.join(named_corruptions())}")
        owner = next(key for key, each in SETS.items() if name in (*each.corruptions, *each.extra))
        if name not in REGISTRY and owner not in settings.sets:
            raise ValueError(f"--corruptions={name}: it is of {SETS[owner].title}; give its folder as --{owner}")


def all_attacks(settings: Settings) -> tuple[str, ...]:
    """By their names, each once."""
    return tuple(dict.fromkeys((*settings.attacks, *settings.transfer)))


def budget_of(settings: Settings, eps: float, attack: str | None = None) -> Budget:
    """With what the attack follows and nothing else, so that a kept cell goes on being it; None: noise."""
    plain = Budget(eps, settings.norm, seed=settings.seed)
    if attack is None or attack not in ATTACKS:  # noise, or no attack, as check_budget will say
        return plain
    spends = ATTACKS[attack].spends
    taken: dict[str, Any] = {} if spends is None else {spends: getattr(settings, spends)}
    return plain._replace(**taken, **options_of(attack, settings))


def options_of(attack: str, settings: Settings) -> dict[str, Any]:
    """Those of PLAIN that it takes; none where there is no such attack, as check_budget will say."""
    return {name: getattr(settings, name) for name in PLAIN if getattr(ATTACKS.get(attack), name, None)}


def parse_eps(text: str | float) -> float:
    """`4/255` or `0.0157`. Raises ValueError: neither."""
    above, slash, below = str(text).partition("/")
    try:
        return float(above) / (float(below) if slash else 1.0)
    except (ValueError, ZeroDivisionError) as error:
        raise ValueError(f"--eps={text}: use a number in pixels of [0, 1], such as 4/255") from error
