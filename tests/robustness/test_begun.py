"""A cell that was killed goes on where it was, whenever that was, and its answers are to the bit those of one go."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import FORKS
from planted import paint
from test_attacks import Net, data
from test_processes import files
from workers import CELLS, begin, compute, end

from vmoe_momentum.robustness import answering, cells
from vmoe_momentum.robustness.attacks import Budget, Classifier, frozen, project, run_attack
from vmoe_momentum.robustness.begun import Begun, Stages, clear, joined, spans, stop_of
from vmoe_momentum.robustness.cells import Outcome, Store
from vmoe_momentum.robustness.processes import ALONE

pytest.importorskip("torchattacks")
pytest.importorskip("cv2")


# ---- parts


def test_parts_that_join_by_hand() -> None:
    names = ["a.0-4.part", "a.4-8.part", "a.4-12.part", "a.16-20.part", "b.4-8.part", "c.npz", ".a.0-99.part.x.partial"]
    found = spans(names)
    assert found == {"a": {0: 4, 4: 12, 16: 20}, "b": {4: 8}}
    assert joined(found["a"]) == [(0, 4), (4, 12)] and stop_of(found["a"]) == 12
    assert joined(found["b"]) == [] and stop_of(found["b"]) == stop_of({}) == stop_of({0: 0}) == 0


def answers(first: int, stop: int, shift: float = 0.0) -> Outcome:
    index = np.arange(first, stop)
    right = index % 2 == 0
    return Outcome(index, right, index, index / 9 + shift, {"b": index / 7}, np.zeros(len(index), dtype=bool))


def shown(first: int, stop: int) -> torch.Tensor:
    return torch.arange(first, stop, dtype=torch.uint8).view(-1, 1, 1, 1)


def equal(one: Outcome, other: Outcome) -> bool:
    plain = all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in (*Outcome._fields[:4], "zero_gradient")
    )
    return plain and all(np.array_equal(one.routing[block], other.routing[block]) for block in one.routing)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_quick_batches_are_kept_together_and_slow_ones_each(tmp_path: Path) -> None:
    clock, store = Clock(), Store(tmp_path)

    def opened() -> Begun:
        return Begun(store, {"m": tmp_path / "x.npz"}, range(12), every=5.0, clock=clock)

    cell = opened()
    for first, seconds in ((0, 1), (2, 1), (4, 3.5), (6, 6), (8, 1)):
        clock.now += seconds
        cell.add({"m": answers(first, first + 2)}, shown(first, first + 2))
    assert store.names() == {"x.0-6.part", "x.6-8.part"}
    again = opened()
    assert again.done == 8
    clock.now += 9
    again.add({"m": answers(8, 10)}, shown(8, 10))
    clock.now += 9
    again.add({"m": answers(10, 12)}, shown(10, 12))
    assert store.names() == {"x.0-6.part", "x.6-8.part", "x.8-10.part"}  # the last one is the cell's own file
    whole, seen = again.whole()
    assert equal(whole["m"], answers(0, 12)) and torch.equal(seen, shown(0, 12))
    (tmp_path / "x0.4-6.part").touch()
    clear(store, {"x"}, store.names())
    assert store.names() == {"x0.4-6.part"}


def test_damaged_parts_and_those_of_other_pictures_are_made_again(tmp_path: Path) -> None:
    store, paths = Store(tmp_path), {"m": tmp_path / "x.npz"}
    cell = Begun(store, paths, range(9), every=0.0)
    for first in (0, 2, 4, 6):
        cell.add({"m": answers(first, first + 2)}, shown(first, first + 2))
    victim = tmp_path / "x.4-6.part"
    victim.write_bytes(victim.read_bytes()[:-30])
    assert Begun(store, paths, range(9)).done == 4 and not victim.exists()
    assert Begun(store, paths, [0, 1, 3, 2, *range(4, 9)]).done == 2
    assert store.names() == {"x.0-2.part", "x.6-8.part"}


def test_models_go_on_where_all_of_them_are(tmp_path: Path) -> None:
    """Asked alone or together, and kept at other moments."""
    store, paths = Store(tmp_path), {name: tmp_path / f"{name}.npz" for name in "ab"}
    alone = Begun(store, {"b": paths["b"]}, range(9), every=0.0)
    for first, stop in ((0, 2), (2, 4), (4, 6)):
        alone.add({"b": answers(first, stop, shift=1.0)}, shown(first, stop))
    other = Begun(store, {"a": paths["a"]}, range(9), every=0.0)
    for first, stop in ((0, 4), (4, 5), (5, 8)):
        other.add({"a": answers(first, stop)}, shown(first, stop))
    both = Begun(store, paths, range(9))
    assert both.done == 4 and [part.shape[0] for part in both.seen] == [4]
    both.add({"a": answers(4, 9), "b": answers(4, 9, shift=1.0)}, shown(4, 9))
    whole, seen = both.whole()
    assert equal(whole["a"], answers(0, 9)) and equal(whole["b"], answers(0, 9, shift=1.0)) and len(seen) == 9


# ---- killed


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("in")
    for number in range(10):
        paint(root / "n01440764" / f"{number}.png", 0 if number % 3 else 7, blue=number)
    return root


def dies(root: Path, out: Path, writes: int, moment: str) -> None:
    """One process that is killed at its so manyth writing of a file in OUT/cells: before it, in its midst, or after it.

    OUT/batches gets a line for each batch that it answers.
    """
    answer, draft, count = answering._answer, cells.draft_of, [0]

    def noted(cell, model, batch, *rest):
        with (out / "batches").open("a") as log:
            told = (cell.attack, cell.source, cell.condition, cell.severity, model.name, batch.index.tolist())
            log.write(f"{told}\n")
        return answer(cell, model, batch, *rest)

    def counted(path):
        count[0] += 1
        return _Draft(draft(path), moment if count[0] == writes else "")

    answering._answer, cells.draft_of = noted, counted
    compute(root, out)


class _Draft:
    def __init__(self, whole, moment: str) -> None:
        self.whole, self.moment = whole, moment

    def __enter__(self):
        self.end_at("before")
        return self.whole.__enter__()

    def __exit__(self, *error: object):
        self.end_at("amid")
        self.whole.__exit__(*error)
        self.end_at("after")

    def end_at(self, moment: str) -> None:
        if self.moment == moment:
            os.kill(os.getpid(), signal.SIGKILL)


def test_killed_again_and_again_it_loses_a_batch_each_time(pictures: Path, tmp_path: Path) -> None:
    """At every fifteenth writing: of parts, cells and examples, attacks and corruptions, one model's and two's."""
    assert end(begin(pictures, tmp_path / "one", ALONE, "", 60.0, 1e9)) == [0]
    out, deaths = tmp_path / "out", 0
    out.mkdir()
    while True:
        moment = ("before", "amid", "after")[deaths % 3]
        process = FORKS.Process(target=dies, args=(pictures, out, 15, moment))
        process.start()
        (code,) = end(process)
        if code == 0:
            break
        assert code == -signal.SIGKILL and deaths < 30
        deaths += 1
    assert deaths >= 5
    assert files(out) == files(tmp_path / "one")
    batches = (out / "batches").read_text().splitlines()
    assert len(set(batches)) == 2 * 3 * CELLS  # 10 pictures by 4
    assert len(batches) - len(set(batches)) <= 2 * deaths  # of two models at once


# ---- inside a batch of AutoAttack


@pytest.fixture
def short(monkeypatch) -> None:
    """AutoAttack with few steps and queries, ours and the package's alike."""
    package = pytest.importorskip("pyautoattack")
    standard = package.AutoAttack._set_version

    def fewer(self, version: str = "standard") -> None:
        standard(self, version)
        self.apgd.n_iter, self.square.n_queries = 1, 60
        self.apgd_targeted.n_iter = self.fab.n_iter = 3

    monkeypatch.setattr(package.AutoAttack, "_set_version", fewer)


class Kept:
    """Stages in memory; `all` that were kept."""

    def __init__(self, found: dict[str, torch.Tensor] | None = None) -> None:
        self.found, self.all = found or {}, []

    def load(self) -> dict[str, torch.Tensor]:
        return self.found

    def keep(self, found: dict[str, torch.Tensor]) -> None:
        self.all.append(found)


def standard(net: Net, images: torch.Tensor, labels: torch.Tensor, budget: Budget) -> torch.Tensor:
    """By the package's own loop over its four attacks."""
    package = pytest.importorskip("pyautoattack")
    with frozen(net, budget.seed), torch.inference_mode(False), torch.enable_grad():
        peer = package.AutoAttack(Classifier(net).eval(), norm=budget.norm, eps=budget.eps, seed=budget.seed)
        peer.apgd_targeted.n_target_classes = peer.fab.n_target_classes = 3
        found = peer.run_standard_evaluation(images.clone(), labels.clone(), batch_size=len(images))[0]
    return project(images, found.detach(), budget)


BUDGETS = [Budget(2 / 255, seed=3), Budget(0.25, "L2", seed=3)]


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.norm)
def test_autoattack_goes_on_after_each_of_its_stages(budget: Budget, short) -> None:
    net = Net()
    images, labels = data(net, 40)
    labels[1] = (labels[1] + 1) % 4  # wrong before
    kept = Kept()
    whole = run_attack("autoattack", net, images, labels, budget._replace(stages=kept))
    assert torch.equal(whole, standard(net, images, labels, budget))
    assert [len(found["shares"]) for found in kept.all] == [2, 3, 4, 5]
    left = [int(found["standing"].sum()) for found in kept.all]
    assert 39 > left[0] > left[1] >= left[-1] > 0  # more than one finds something, and something stands
    for found in kept.all:
        rest = Kept(found)
        assert torch.equal(run_attack("autoattack", net, images, labels, budget._replace(stages=rest)), whole)
        assert len(rest.all) == 5 - len(found["shares"])


@pytest.mark.long
@pytest.mark.parametrize("budget", BUDGETS, ids=lambda budget: budget.norm)
def test_autoattack_is_the_standard_one(budget: Budget) -> None:
    net = Net()
    images, labels = data(net, 6)
    found = run_attack("autoattack", net, images, labels, budget)
    assert torch.equal(found, standard(net, images, labels, budget)) and not torch.equal(found, images)


def test_stages_lie_beside_the_cell_until_its_batch_is_kept(tmp_path: Path) -> None:
    clock, store = Clock(), Store(tmp_path)
    cell = Begun(store, {"m": tmp_path / "x.npz"}, range(8), every=5.0, clock=clock)
    stages = cell.stages("m")
    found = {"found": torch.rand(2, 3, 4, 4), "standing": torch.tensor([True, False])}
    stages.keep(found)
    assert stages.load() == {} and store.names() == set()  # too soon
    clock.now += 6
    stages.keep(found)
    assert store.names() == {"x.0.stage"}
    loaded = Begun(store, {"m": tmp_path / "x.npz"}, range(8)).stages("m").load()
    assert set(loaded) == set(found) and all(torch.equal(loaded[name], found[name]) for name in found)
    (tmp_path / "x.0.stage").write_bytes(b"damaged")
    assert stages.load() == {}
    cell.add({"m": answers(0, 2)}, shown(0, 2))
    assert store.names() == {"x.0-2.part"} and isinstance(cell.stages("m"), Stages)
    assert cell.stages("m").path.name == "x.2.stage"
