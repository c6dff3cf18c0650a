"""A kept cell goes on being it whatever option changes that it does not follow, and is another where one does."""

import importlib.util
from pathlib import Path

import pytest
from planted import paint, planted

from vmoe_momentum.robustness.attacks import ATTACKS
from vmoe_momentum.robustness.cells import Store
from vmoe_momentum.robustness.plan import make_plan
from vmoe_momentum.robustness.settings import Settings

OTHER = {"steps": 7, "queries": 300, "random_start": True, "restarts": 2, "eot": 3, "query_images": 1, "seed": 5}


def names_of(root: Path, attack: str, **more) -> dict[str, str]:
    """File of each cell by its kind; attacks by their names without the budget."""
    network = planted(num_classes=10)
    settings = Settings(data=str(root), regenerate=False, attacks=(attack,), eps=(2 / 255,), **more)
    found = {}
    for cell in make_plan(settings, [network]):
        if cell.kind in ("attack", "noise"):
            name = "noise" if cell.kind == "noise" else ("sanity" if cell.condition == "sanity-pgd" else "attack")
            found[name] = Store(root / "cells").path(cell, network, 8, "cpu").name
    return found


def follows(attack: str, option: str) -> bool:
    known = ATTACKS[attack]
    if option in ("steps", "queries"):
        return known.spends == option
    return (
        option == "seed" or (option == "query_images" and known.spends == "queries") or bool(getattr(known, option, 0))
    )


@pytest.mark.parametrize("option", OTHER)
@pytest.mark.parametrize("attack", ATTACKS)
def test_other_options_leave_kept_cells_alone(attack: str, option: str, tmp_path: Path) -> None:
    package = ATTACKS[attack].package
    if package and importlib.util.find_spec(package) is None:
        pytest.skip(f"the package {package} is not installed")
    if ATTACKS[attack].needs_router:
        pytest.skip("the planted network has no routers")
    for number in range(3):
        paint(tmp_path / "0" / f"{number}.png", 0)
    before, after = names_of(tmp_path, attack), names_of(tmp_path, attack, **{option: OTHER[option]})
    assert (before["attack"] != after["attack"]) == follows(attack, option)
    assert (before["noise"] != after["noise"]) == (option == "seed")
    if "sanity" in before:
        assert (before["sanity"] != after["sanity"]) == (option in ("steps", "seed", "eot"))


def test_settings_of_a_file_are_decided_by_its_bytes(tmp_path: Path) -> None:
    """A version that has one setting more finds the cells that an earlier one kept; without a file they decide."""
    paint(tmp_path / "0" / "1.png", 0)
    network, store = planted(num_classes=10), Store(tmp_path / "cells")
    (cell, *_) = make_plan(Settings(data=str(tmp_path), regenerate=False, attacks=(), eps=()), [network])

    def name(**told) -> str:
        return store.path(cell, network._replace(provenance=told), 8, "cpu").name

    assert (
        name(sha256="a", settings={"mu": 1}) == name(sha256="a", settings={"mu": 1, "new": False}) != name(sha256="b")
    )
    assert name(settings={"mu": 1}) != name(settings={"mu": 2})
