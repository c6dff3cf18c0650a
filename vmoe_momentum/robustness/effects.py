"""Options that were named and change nothing: one forgets --data, and believes that attacks were withstood."""

from collections.abc import Callable, Collection
from typing import NamedTuple

from .attacks import ATTACKS, PLAIN
from .sets import SETS
from .settings import Settings, all_attacks


class Needs(NamedTuple):
    """What an option acts on."""

    there: Callable[[Settings], bool]
    told: str


def _attacks(settings: Settings) -> tuple[str, ...]:
    return all_attacks(settings) if settings.data is not None else ()


def _spending(settings: Settings, what: str) -> bool:
    return any(ATTACKS[name].spends == what for name in _attacks(settings) if name in ATTACKS)


def _corrupts(settings: Settings) -> bool:
    made_here = settings.data is not None and settings.regenerate
    return settings.corruptions != () and (made_here or any(name in settings.sets for name in CORRUPTED))


def _by_spending(what: str) -> str:
    return " or ".join(name for name, found in ATTACKS.items() if found.spends == what)


def _taking(option: str) -> str:
    return ", ".join(name for name, found in ATTACKS.items() if getattr(found, option))


def _takes(option: str) -> Callable[[Settings], bool]:
    return lambda s: any(getattr(ATTACKS[name], option) for name in _attacks(s) if name in ATTACKS)


CORRUPTED = [name for name, each in SETS.items() if each.corruptions]
ALWAYS = Needs(lambda settings: True, "")
NEEDS = {
    **dict.fromkeys(("model", "data", *SETS, "upright", "limit", "out", "help"), ALWAYS),
    **dict.fromkeys(("batch_size", "workers", "processes", "device"), ALWAYS),
    **dict.fromkeys(CORRUPTED, Needs(lambda s: s.corruptions != (), "corruptions: leave out --corruptions=[none]")),
    "corruptions": Needs(
        lambda s: s.corruptions == () or _corrupts(s), "--imagenet_c, or --data without --regenerate=false"
    ),
    "severities": Needs(_corrupts, "corruptions: give --imagenet_c or --data, and no --corruptions=[none]"),
    "regenerate": Needs(
        lambda s: not s.regenerate or (s.data is not None and s.corruptions != ()),
        "--data, and no --corruptions=[none]",
    ),
    "attacks": Needs(lambda s: not s.attacks or s.data is not None, "--data, clean pictures to attack"),
    "ids": Needs(
        lambda s: s.data is not None or any(name in s.sets for name in CORRUPTED),
        "--data, --imagenet_c or one of its kind, whose pictures it names",
    ),
    "transfer": Needs(lambda s: not s.transfer or s.data is not None, "--data, clean pictures to attack"),
    "router_aware": Needs(lambda s: bool(_attacks(s)), "--data and --attacks"),
    **{option: Needs(_takes(option), f"--data and, in --attacks, one of {_taking(option)}") for option in PLAIN},
    "eps": Needs(lambda s: bool(_attacks(s)), "--data and --attacks"),
    "norm": Needs(lambda s: bool(_attacks(s)), "--data and --attacks"),
    "steps": Needs(lambda s: _spending(s, "steps"), f"--data and, in --attacks, {_by_spending('steps')}"),
    "queries": Needs(lambda s: _spending(s, "queries"), f"--data and, in --attacks, {_by_spending('queries')}"),
    "query_images": Needs(lambda s: _spending(s, "queries"), f"--data and, in --attacks, {_by_spending('queries')}"),
    "seed": Needs(
        lambda s: bool(_attacks(s)) or s.limit is not None or (s.data is not None and s.regenerate and _corrupts(s)),
        "something random: attacks or corruptions of --data, or --limit",
    ),
}  # fmt: skip


def named_in(argv: list[str]) -> list[str]:
    """The options of a command line; abbreviations are not allowed there."""
    return [word[2:].partition("=")[0].rstrip("+") for word in argv if word.startswith("--")]


def check_effects(named: Collection[str], settings: Settings) -> None:
    """Raises ValueError: one of the options has nothing to act on. Switching off what is off is no mistake."""
    for name in named:
        needs = NEEDS.get(name, ALWAYS)
        if not needs.there(settings):
            raise ValueError(f"--{name}: has no effect here; it needs {needs.told}. Or leave it out")
