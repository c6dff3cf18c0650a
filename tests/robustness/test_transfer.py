"""Pictures made on one model and shown to another: against torchattacks, closed forms, and attacks made by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import VIEW, paint, planted
from synthetic import COUNT, attack_cell, evaluation, pictures
from test_attacks import Net, accuracy, data
from torch import Tensor, nn

from vmoe_momentum.robustness import Settings, make_plan, write_report
from vmoe_momentum.robustness.attacks import Budget, Classifier, run_attack
from vmoe_momentum.robustness.attacks.transferable import DECAY, gathered
from vmoe_momentum.robustness.cells import Cell
from vmoe_momentum.robustness.charts import draw
from vmoe_momentum.robustness.doubts import warnings_of
from vmoe_momentum.robustness.evaluate import evaluate
from vmoe_momentum.robustness.models import View
from vmoe_momentum.robustness.pictures import batches
from vmoe_momentum.robustness.summary import make_rows
from vmoe_momentum.robustness.transfer import ITSELF, transfers

torchattacks = pytest.importorskip("torchattacks")
EPS = 8 / 255
KINDS = {"mi-fgsm": ("MIFGSM", 1.0), "di-fgsm": ("DIFGSM", 0.0), "mi-di-fgsm": ("DIFGSM", 1.0)}


# ---- the attacks


@pytest.mark.parametrize("name", KINDS)
def test_they_are_torchattacks_where_it_is_sound(name: str) -> None:
    """The same random numbers for sizes and places of inputs, too."""
    net = Net()
    images, labels = data(net)
    kind, decay = KINDS[name]
    peer = getattr(torchattacks, kind)(Classifier(net).eval(), eps=EPS, alpha=EPS / 9, steps=9, decay=decay)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        expected = peer(images, labels)
    found = run_attack(name, net, images, labels, Budget(EPS, steps=9, seed=5))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert accuracy(net, found, labels) < accuracy(net, images, labels)


class Line(nn.Module):
    """Two classes, and a gradient that points the same way everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3 * 64, generator=torch.Generator().manual_seed(0)))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


@pytest.mark.parametrize("steps", [1, 7])
def test_on_a_line_they_go_straight_to_the_border(steps: int) -> None:
    net = Line()
    images = 0.3 + 0.4 * torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 0, 1])
    away = ((1 - 2 * labels)[:, None] * (net.weight[1] - net.weight[0])).view(4, 3, 8, 8).detach()
    found = run_attack("mi-fgsm", net, images, labels, Budget(EPS, steps=steps))
    torch.testing.assert_close(found, images + EPS * away.sign(), atol=1e-6, rtol=0)
    found = run_attack("mi-fgsm", net, images, labels, Budget(0.5, "L2", steps=steps))
    torch.testing.assert_close(found, images + 0.5 * away / away.flatten(1).norm(dim=1).view(-1, 1, 1, 1))


def test_gradients_are_gathered_by_hand() -> None:
    """A gradient of one pixel pair that turns round: with momentum the second step still goes on."""

    class Turning(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            x = images.flatten(1).sum(dim=1, keepdim=True)
            return torch.cat([torch.zeros_like(x), -40 * (x - 1.55) ** 2], dim=1)

    images, labels = torch.full((1, 3, 1, 1), 0.5), torch.tensor([0])
    budget = Budget(0.04, steps=2)  # 1.5, then 1.56, past the peak of the loss at 1.55
    plain = gathered(Turning(), images, labels, 0.0, budget)
    torch.testing.assert_close(plain, images)
    torch.testing.assert_close(gathered(Turning(), images, labels, DECAY, budget), images + 0.02)  # 1 - 1 is no way
    torch.testing.assert_close(gathered(Turning(), images, labels, 2.0, budget), images + 0.04)


def test_pictures_without_a_gradient_stay() -> None:
    """torchattacks makes NaN of them; others of the batch are as without them."""
    net = Net(scale=1000.0)
    images, labels = data(net, 40)
    for name in KINDS:
        found = run_attack(name, net, images, labels, Budget(EPS, steps=4))
        assert bool(found.isfinite().all()) and float((found - images).abs().max()) == pytest.approx(EPS, abs=1e-6)
    leaf = images.clone().requires_grad_()
    total = nn.functional.cross_entropy(net(leaf), labels, reduction="sum")
    none = torch.autograd.grad(total, leaf)[0].flatten(1).abs().amax(dim=1) == 0
    found = run_attack("mi-fgsm", net, images, labels, Budget(EPS, steps=4))
    assert 0 < int(none.sum()) < 40 and torch.equal(found[none], images[none])
    rest = run_attack("mi-fgsm", net, images[~none], labels[~none], Budget(EPS, steps=4))
    torch.testing.assert_close(found[~none], rest, atol=1e-6, rtol=0)


# ---- from pictures to rows


class Head(nn.Module):
    """A small smooth network of its own random weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 4))
        self.asked = 0

    def forward(self, images: Tensor) -> Tensor:
        self.asked += len(images) if torch.is_grad_enabled() else 0
        return 5 * self.layers((images - 0.5) / 0.3)


def model(label: str, seed: int, name: str = ""):
    view = View(16, 1.0, "bilinear")
    made = planted(label, num_classes=4)._replace(module=Head(seed).eval(), view=view, name=name or label)
    return made._replace(provenance={"source": f"seed {seed}"}, class_ids=list("abcd"))


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures of noise, labelled as two of the networks agree."""
    folder, rng = tmp_path_factory.mktemp("in"), np.random.default_rng(0)
    from PIL import Image

    nets = [Head(seed).eval() for seed in (0, 1)]
    count = dict.fromkeys(range(4), 0)
    while sum(count.values()) < 14:
        pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
        with torch.no_grad():
            first, second = (int(net(images).argmax()) for net in nets)
        if first == second and count[first] < 6:
            path = folder / "abcd"[first] / f"{count[first]}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(pixels).save(path)
            count[first] += 1
    return folder


PLAIN = Settings(attacks=(), regenerate=False, eps=(2 / 255, 8 / 255), steps=4)


def run(root: Path, out: Path, models: list, **settings):
    evaluation = evaluate(make_plan(PLAIN._replace(data=str(root), **settings), models), models, out, batch_size=5)
    rows = {(r.model, r.condition, r.severity_or_eps, r.metric): r.value for r in make_rows(evaluation)}
    return evaluation, rows


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_what_each_stands_is_what_attacks_by_hand_leave(norm: str, root: Path, tmp_path: Path) -> None:
    """Made once on each, shown to both; on itself it is the attack of --attacks, to the bit."""
    models = [model("a", 0), model("b", 1)]
    eps, name = ((2 / 255, 8 / 255), "mi-fgsm-4") if norm == "Linf" else ((0.3, 1.0), "mi-fgsm-4-L2")
    asked = {"norm": norm, "eps": eps}
    for each in models:
        each.module.asked = 0
    evaluation, rows = run(root, tmp_path / "t", models, transfer=("mi-fgsm",), **asked)
    _, white = run(root, tmp_path / "w", [model("a", 0), model("b", 1)], attacks=("mi-fgsm",), **asked)
    transferred = {key: value for key, value in rows.items() if " from " in key[1] or "transfer" in key[1]}
    assert {key: value for key, value in rows.items() if key not in transferred} == white
    clean = evaluation.cells[0].pictures
    for size in eps:
        severity = f"{255 * size:g}" if norm == "Linf" else f"{size:g}"
        for source in models:
            stood = {each.name: [] for each in models}
            for batch in batches(clean, [source.view], 5, 0):
                images = batch.views[source.view].float() / 255
                made = run_attack("mi-fgsm", source.module, images, batch.labels, Budget(size, norm, steps=4))
                for each in models:
                    with torch.no_grad():
                        right = [each.module(shown).argmax(dim=1) == batch.labels for shown in (images, made)]
                    stood[each.name] += (right[0] & right[1]).tolist()
            for each in models:
                told = name if each is source else f"{name} from {source.name}"
                assert rows[each.name, told, severity, "robust_top1"] == np.mean(stood[each.name])
    assert sum(" from " in key[1] and key[3] == "robust_top1" for key in rows) == 4


def test_pictures_are_made_once_for_all_models(root: Path, tmp_path: Path) -> None:
    models = [model("a", 0), model("b", 1), model("c", 2)]
    _, rows = run(root, tmp_path, models, transfer=("pgd",), eps=(2 / 255,))
    # check_model and the estimate once each, 4 steps of 14 pictures, at 64/255 the same, zero gradients
    counts = {each.module.asked for each in models}
    assert len(counts) == 1 and counts.pop() < 3 * 4 * 14 + 60
    # none of it without --transfer
    assert not any(key[1].startswith("worst-case-transfer") for key in run(root, tmp_path, models, attacks=("pgd",))[1])


def test_cells_are_known_by_the_model_they_come_from(root: Path, tmp_path: Path) -> None:
    """Not by its label: another report finds them again; with another source they are others."""
    models = [model("a", 0), model("b", 1)]
    run(root, tmp_path, models, transfer=("mi-fgsm",))
    before = {path.name for path in (tmp_path / "cells").glob("*.npz")}
    run(root, tmp_path, [model("x", 0), model("y", 1)], transfer=("mi-fgsm",))
    assert {path.name for path in (tmp_path / "cells").glob("*.npz")} == before
    run(root, tmp_path, [model("a", 0), model("b", 2)], transfer=("mi-fgsm",))
    added = {path.name for path in (tmp_path / "cells").glob("*.npz")} - before
    # of the new model clean, noise, 64/255; from and to it 3 of 4 pairs an eps
    assert len(added) == 1 + 2 + 1 + 2 * 3


def test_resumed_in_part_they_give_the_same(root: Path, tmp_path: Path) -> None:
    models = [model("a", 0), model("b", 1)]
    _, first = run(root, tmp_path, models, transfer=("mi-di-fgsm",))
    for path in sorted((tmp_path / "cells").glob("*.npz"))[::3]:
        path.unlink()
    assert run(root, tmp_path, models, transfer=("mi-di-fgsm",))[1] == first


# ---- groups, tables, worst cases


def transfer_cells(names: list[str]) -> list[Cell]:
    """Clean, PGD, Square on a part, and MI-FGSM from each of the models, at two eps."""
    made = [Cell(pictures("data"), "clean", "clean")]
    for eps in (4, 1):
        made += [attack_cell("pgd", "pgd-20", eps), attack_cell("square", "square-9q", eps, order=(3, 8))]
        made += [attack_cell("mi-fgsm", "mi-fgsm-20", eps)._replace(source=name) for name in names]
    return made


LABELS = ["A", "B", "B"]
NAMES = ["A", "B#1", "B#2"]


def test_tables_are_means_over_pairs_of_two_models(tmp_path: Path) -> None:
    made = evaluation(transfer_cells(NAMES), LABELS)
    rows = make_rows(made)
    value = {(r.model, r.condition, r.severity_or_eps): r.value for r in rows if r.metric == "robust_top1"}
    found = transfers(rows, dict(zip(NAMES, LABELS, strict=True)))
    assert set(found) == {("mi-fgsm-20", "4"), ("mi-fgsm-20", "1")}
    for eps in ("4", "1"):
        pairs = {key: sorted(values) for key, values in found["mi-fgsm-20", eps].items()}
        assert pairs == {
            (ITSELF, "A"): [value["A", "mi-fgsm-20", eps]],
            (ITSELF, "B"): sorted(value[name, "mi-fgsm-20", eps] for name in NAMES[1:]),
            ("A", "B"): sorted(value[name, "mi-fgsm-20 from A", eps] for name in NAMES[1:]),
            ("B", "A"): sorted(value["A", f"mi-fgsm-20 from {name}", eps] for name in NAMES[1:]),
            ("B", "B"): sorted([value["B#1", "mi-fgsm-20 from B#2", eps], value["B#2", "mi-fgsm-20 from B#1", eps]]),
        }
    report = write_report(made, tmp_path, {})
    text = (tmp_path / "report.md").read_text()
    mean = 50 * (value["B#1", "mi-fgsm-20 from B#2", "4"] + value["B#2", "mi-fgsm-20 from B#1", "4"])
    there = 50 * sum(value["A", f"mi-fgsm-20 from {name}", "4"] for name in NAMES[1:])
    assert "| attack | made on | A | B |" in text and f"|  | B | {there:.1f} | {mean:.1f} |" in text
    assert "Transfer" in (tmp_path / "report.html").read_text() and (tmp_path / "transfer.png").exists()
    assert not any(" from " in line.what for line in report.comparison)  # a mean over models would mix both
    own = next(line for line in report.comparison if line.what == "mi-fgsm-20, eps 4/255")
    assert own.groups["B"].value == pytest.approx(np.mean(found["mi-fgsm-20", "4"][ITSELF, "B"]))
    told = json.loads((tmp_path / "report.json").read_text())["numbers"]["attacks"]
    assert "mi-fgsm-20 from B#2" in {each["condition"] for each in told}


def test_the_picture_shows_the_table() -> None:
    made = evaluation(transfer_cells(NAMES), LABELS)
    rows = make_rows(made)
    found = transfers(rows, dict(zip(NAMES, LABELS, strict=True)))
    figures = draw(made, rows)
    panels = {axis.get_title(): axis for axis in figures["transfer"].axes}
    assert list(panels) == ["mi-fgsm-20, eps 1/255", "mi-fgsm-20, eps 4/255"]
    for (attack, eps), pairs in found.items():
        shown = panels[f"{attack}, eps {eps}/255"].images[0].get_array().filled(np.nan)
        for down, source in enumerate((ITSELF, "A", "B")):
            for across, target in enumerate(("A", "B")):
                wanted = 100 * np.mean(pairs.get((source, target), np.nan))
                assert shown[down, across] == pytest.approx(wanted, nan_ok=True)
    assert {axis.get_title() for axis in figures["attacks"].axes if axis.axison} == {
        "pgd-20", "square-9q", "mi-fgsm-20", "worst-case", "worst-case-transfer",
    }  # fmt: skip
    told = [text.get_text() for text in figures["examples"].axes[0].get_yticklabels()]
    assert sum("mi-fgsm" in text for text in told) == 1


def test_pictures_of_others_count_in_a_worst_case_of_their_own() -> None:
    """So that the plain one is the same whoever else is in the report."""
    made = evaluation(transfer_cells(NAMES), LABELS)
    alone = [cell for cell in made.cells if cell.source in (None, "A")]
    kept = {("A", new): made.outcomes["A", made.cells.index(cell)] for new, cell in enumerate(alone)}
    single = made._replace(cells=alone, models=made.models[:1], outcomes=kept)
    rows = [
        {(r.condition, r.severity_or_eps): r.value for r in make_rows(each) if r.model == "A"}
        for each in (made, single)
    ]
    for eps in ("1", "4"):
        assert rows[0]["worst-case", eps] == rows[1]["worst-case", eps]
        assert rows[0]["worst-case-transfer", eps] <= rows[0]["worst-case", eps]
        assert ("worst-case-transfer", eps) not in rows[1]
    index = {(c.condition, c.severity, c.source): i for i, c in enumerate(made.cells)}
    stands = made.outcomes["A", 0].correct.copy()
    for eps in ("1", "4"):
        for (condition, severity, _), number in index.items():
            if severity == eps and condition != "square-9q":
                stands &= made.outcomes["A", number].correct
        stands[[3, 8]] &= made.outcomes["A", index["square-9q", eps, None]].correct
        assert rows[0]["worst-case-transfer", eps] == pytest.approx(stands.mean())


@pytest.mark.parametrize("seed", range(20))
def test_no_attack_on_all_pictures_is_stronger_than_the_worst_case(seed: int) -> None:
    """AutoAttack among them: whatever else is made, and whoever stands what."""
    names = ["fgsm", "pgd", "autoattack", "apgd"][seed % 3 :]
    parts = [attack_cell(name, name, eps) for eps in (4, 1, 8) for name in names]
    parts += [
        attack_cell("square", "square-9q", 4, order=(0, 5)),
        attack_cell("pgd-margin", "sanity-pgd", 64, order=(1,)),
    ]
    made = evaluation([Cell(pictures("data"), "clean", "clean"), *parts], ["m"])
    rng = np.random.default_rng(seed)
    for key, outcome in made.outcomes.items():
        made.outcomes[key] = outcome._replace(correct=rng.uniform(size=len(outcome.index)) < 0.8)
    rows = {(r.condition, r.severity_or_eps): r.value for r in make_rows(made) if r.metric == "robust_top1"}
    for eps in ("1", "4", "8"):
        assert rows["worst-case", eps] <= min(rows[name, eps] for name in names)
    assert rows["worst-case", "1"] >= rows["worst-case", "4"] >= rows["worst-case", "8"]


# ---- warnings and refusals


def test_a_model_that_falls_to_others_pictures_more_than_to_its_own_is_doubted() -> None:
    made = evaluation(transfer_cells(NAMES), LABELS)

    def told(**shares: float) -> list[str]:
        """Share of pictures that A stands: pgd, itself (MI-FGSM), and others' pictures, at eps 4/255."""
        for number, cell in enumerate(made.cells):
            share = 1.0
            if cell.severity == "4":
                kind = "pgd" if cell.attack == "pgd" else "itself" if cell.source == "A" else cell.source
                share = shares.get(str(kind).replace("#", ""), 1.0)
            for name in NAMES:
                outcome = made.outcomes[name, number]
                right = np.arange(len(outcome.index)) < (share if name == "A" else 1.0) * COUNT
                made.outcomes[name, number] = outcome._replace(correct=right)
        return [line for line in warnings_of(made, make_rows(made)) if " from " in line]

    assert told(pgd=0.2, itself=0.5, B1=0.2, B2=0.6) == []
    assert told(pgd=0.5, itself=0.2, B1=0.2, B2=0.6) == []
    assert told(pgd=0.5, itself=0.5, B1=0.4, B2=0.1) == [
        "A, eps 4/255: mi-fgsm-20 from B#2 leaves 10.0 % where pgd-20, by its own gradients, leaves 50.0 %; "
        "its gradients may be masked"
    ]
    assert (
        len(told(pgd=0.5, itself=0.3, B1=0.25, B2=0.9)) == 1 and "mi-fgsm-20, by its own" in told(itself=0.3, B1=0.2)[0]
    )


@pytest.mark.parametrize(
    ("settings", "models", "message"),
    [
        ({"transfer": ("mi-fgsm",)}, [planted()], "--transfer: pictures made on one model are shown to the others"),
        ({"transfer": ("square",)}, [planted("a"), planted("b")], "--transfer=square: not one of mi-fgsm, di-fgsm"),
        ({"transfer": ("pgd", "pgd")}, [planted("a"), planted("b")], "--transfer: pgd is there twice"),
        ({"transfer": ("pgd",), "eps": ()}, [planted("a"), planted("b")], r"--eps=\[\]: give budgets"),
        (
            {"transfer": ("pgd",)}, [planted("a"), planted("b")._replace(view=VIEW._replace(crop_pct=0.9))],
            r"models see other cuts of a picture \(a \(32, 0.875, 'bilinear', False, False\), b \(32, 0.9",
        ),
        (
            {"transfer": ("mi-fgsm",), "router_aware": True}, [planted("a"), planted("b")],
            "--router_aware: none of the models has routers",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_transferred_is_said_first(settings: dict, models: list, message: str, tmp_path: Path) -> None:
    paint(tmp_path / "n01440764" / "x.png", 0)
    with pytest.raises(ValueError, match=message):
        make_plan(Settings(data=str(tmp_path), attacks=(), **settings), models)
