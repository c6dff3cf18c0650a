"""How long a run will take is said before its first cell, and what takes most of it."""

from pathlib import Path

import pytest
import torch
from planted import paint, planted

from vmoe_momentum.robustness import estimate
from vmoe_momentum.robustness.attack_cells import query_count
from vmoe_momentum.robustness.estimate import Pace, tell
from vmoe_momentum.robustness.evaluate import evaluate
from vmoe_momentum.robustness.plan import make_plan
from vmoe_momentum.robustness.settings import Settings

pytest.importorskip("torchattacks")
PACES = {"planted": Pace(0.01, 0.02)}


def tree(root: Path, total: int) -> None:
    for number in range(total):
        paint(root / "n01440764" / f"{number}.png", 0)


def plan(root: Path, **settings) -> list:
    return make_plan(Settings(data=str(root), regenerate=False, eps=(2 / 255,), **settings), [planted()])


def test_seconds_are_pictures_times_passes(tmp_path: Path) -> None:
    """20 pictures: clean and noise once; PGD 5 steps of 3 passes at its own pace, and at 64/255; Square by queries."""
    tree(tmp_path, 20)
    cells = plan(tmp_path, attacks=("pgd", "square"), steps=5, queries=1000, query_images=4)
    left = [(cell, {"planted": len(cell.numbers)}) for cell in cells]
    found = estimate.estimate(left, PACES)
    assert found == {
        None: pytest.approx(2 * 20 * 0.01), "pgd": pytest.approx(20 * (0.01 + 15 * 0.02)),
        "pgd-margin": pytest.approx(20 * (0.01 + 15 * 0.02)), "square": pytest.approx(4 * 1001 * 0.01),
    }  # fmt: skip
    twice = estimate.estimate([*left, *left], PACES)
    assert twice["square"] == pytest.approx(2 * found["square"])


def test_what_takes_most_of_a_long_run_is_named() -> None:
    assert "0:08:20" in tell({None: 100.0, "square": 400.0}) and "square" not in tell({None: 100.0, "square": 400.0})
    long = tell({None: 100.0, "square": 7000.0})
    assert long.startswith("about 1:58:20 ") and "square takes 1:56:40 of it at most" in long
    assert long.endswith("lower --query_images or --queries")
    assert "aside; shared by 4 processes, about 0:29:35; square takes" in tell({None: 100.0, "square": 7000.0}, 4)
    assert tell({"pgd": 700.0, None: 1.0}).endswith("pgd takes 0:11:40 of it: lower --limit or --steps")
    assert tell({"autoattack": 700.0}).endswith("at most: lower --limit")
    for even in ({"pgd": 400.0, "square": 400.0, "fgsm": 1.0}, {None: 9000.0, "pgd": 1.0}):
        assert "lower" not in tell(even)


def test_it_comes_before_the_first_cell_and_not_where_nothing_is_left(tmp_path: Path, monkeypatch, capsys) -> None:
    tree(tmp_path / "in", 6)
    cells = plan(tmp_path / "in", attacks=("square",), queries=2)
    monkeypatch.setattr(estimate, "measure", lambda *_: Pace(100.0, 100.0))
    evaluate(cells, [planted()], tmp_path / "out")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("robustness: about 0:50:00 ") and "square takes 0:30:00" in lines[0]
    assert lines[1].startswith("robustness: 0 %, data: clean")
    evaluate(cells, [planted()], tmp_path / "out")
    assert "about" not in capsys.readouterr().err


def test_measuring_leaves_random_numbers_and_the_model_alone() -> None:
    model = planted()
    state = torch.get_rng_state()
    pace = estimate.measure(model, 3, "cpu", gradients=True)
    assert pace.forward > 0 and pace.backward > 0
    assert torch.equal(torch.get_rng_state(), state) and not model.module.training


@pytest.mark.parametrize(("pictures", "count"), [(7, 100), (360, 100), (5000, 500), (50_000, 1000)])
def test_pictures_that_queries_are_spent_on(pictures: int, count: int) -> None:
    """By the number of pictures alone, so that another machine gives the same; what is said counts."""
    assert query_count(Settings(), pictures) == count
    assert query_count(Settings(query_images=1000), pictures) == 1000


def test_a_plan_by_default(tmp_path: Path) -> None:
    tree(tmp_path, 120)
    cells = {cell.condition: cell for cell in plan(tmp_path, attacks=("square",))}
    assert len(cells["square-5000q"].order) == 100
    cells = {cell.condition: cell for cell in plan(tmp_path, attacks=("square",), query_images=1000)}
    assert len(cells["square-5000q"].order) == 120
