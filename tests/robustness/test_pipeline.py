"""From folders to rows with planted answers: what is counted, kept, compared and refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import Planted, paint, planted
from torch import Tensor

from vmoe_momentum.robustness import BENCHMARK, SEVERITIES, Settings, evaluate, labels, make_plan, write_report
from vmoe_momentum.robustness.attacks import ATTACKS, attack
from vmoe_momentum.robustness.cells import Cell, Outcome, routing_change
from vmoe_momentum.robustness.imagenet_c import ALEXNET, ALEXNET_CLEAN
from vmoe_momentum.robustness.models import check_model
from vmoe_momentum.robustness.pictures import Pictures
from vmoe_momentum.robustness.summary import WORST, compare, make_rows, warnings_of

INDEX = {wnid: place for place, wnid in enumerate(labels.wnids())}
TWO = ("n01440764", "n02123045")  # classes 0 and 281
PLAIN = Settings(attacks=(), regenerate=False)


def report(settings: Settings, models, out: Path, **options) -> dict[tuple[str, ...], float]:
    evaluation = evaluate(make_plan(settings, models), models, out, **options)
    rows = write_report(evaluation, out, {}).rows
    return {(r.model, r.dataset, r.condition, r.severity_or_eps, r.metric): r.value for r in rows} | {
        ("n", *r[:5]): r.n for r in rows
    }


def val_tree(root: Path, wrong: int, total: int = 20) -> Path:
    """`total` pictures of two classes, `wrong` of them answered 7."""
    for i in range(total):
        wnid = TWO[i % 2]
        paint(root / "val" / wnid / f"ILSVRC2012_val_{i + 1:08d}.png", 7 if i < wrong else INDEX[wnid])
    return root


# ---- the sets


def test_published_corruptions_give_planted_errors(tmp_path: Path) -> None:
    """Errors differ by corruption and severity; CE, mCE and relative mCE from their definitions."""
    val_tree(tmp_path / "in", wrong=6)
    share = {}
    for i, name in enumerate(BENCHMARK):
        for severity in SEVERITIES:
            wrong = (i + 2 * severity) % 11
            share[name, severity] = wrong / 10
            for k in range(10):
                wnid = TWO[k % 2]
                paint(tmp_path / "c" / name / str(severity) / wnid / f"{k}.png", 9 if k < wrong else INDEX[wnid])
    settings = PLAIN._replace(data=str(tmp_path / "in"), imagenet_c=str(tmp_path / "c"))
    found = report(settings, [planted()], tmp_path / "out")
    ces = {n: 100 * np.mean([share[n, s] for s in SEVERITIES]) / ALEXNET[n] for n in BENCHMARK}
    start = ("planted", "imagenet_c")
    for name in BENCHMARK:
        assert found[(*start, name, "mean", "ce")] == pytest.approx(ces[name])
        assert found[(*start, name, "3", "top1")] == pytest.approx(1 - share[name, 3])
    assert found[(*start, "15 corruptions", "mean", "mce")] == pytest.approx(np.mean(list(ces.values())))
    relative = [
        100 * (np.mean([share[n, s] for s in SEVERITIES]) - 0.3) / (ALEXNET[n] - ALEXNET_CLEAN) for n in BENCHMARK
    ]
    assert found[(*start, "15 corruptions", "mean", "relative_mce")] == pytest.approx(np.mean(relative))
    assert found[(*start, "15 corruptions", "mean", "top1")] == pytest.approx(1 - np.mean(list(share.values())))
    assert found["planted", "data", "clean", "", "top1"] == pytest.approx(0.7)


def test_a_part_of_the_tree_is_labelled_a_part(tmp_path: Path) -> None:
    for severity in (1, 5):
        paint(tmp_path / "c" / "weather" / "fog" / str(severity) / TWO[0] / "a.png", 0 if severity == 1 else 5)
    settings = PLAIN._replace(imagenet_c=str(tmp_path / "c"), corruptions=("fog",), severities=(1, 5))
    found = report(settings, [planted()], tmp_path / "out")
    assert found["planted", "imagenet_c", "2 of 75 corruptions x severities", "mean", "top1"] == 0.5
    assert not any(key[-1] in ("mce", "ce", "relative_mce") for key in found)
    with pytest.raises(ValueError, match="gaussian_noise/1"):
        make_plan(PLAIN._replace(imagenet_c=str(tmp_path / "c")), [planted()])
    paint(tmp_path / "c" / "weather" / "fog" / "1" / TWO[0] / "b.png", 0)
    with pytest.raises(ValueError, match="1 to 2 pictures a corruption and severity; a part is missing"):
        make_plan(settings, [planted()])


@pytest.mark.parametrize("which", ["a", "r"])
def test_200_classes_count_and_nothing_else(which: str, tmp_path: Path) -> None:
    """Restricted to the subset: another class may be likelier, and targets are positions in the sorted subset."""
    own = labels.subset(which)
    wnids = [labels.wnids()[i] for i in (own[0], own[50], own[199])]
    for i, wnid in enumerate(wnids):
        paint(tmp_path / "x" / wnid / "right.png", INDEX[wnid], blue=1)  # 1,000-way argmax would be class 0
        paint(tmp_path / "x" / wnid / "wrong.png", INDEX[wnids[i - 1]])
        paint(tmp_path / "in" / "val" / wnid / "ILSVRC2012_val_00000001.png", INDEX[wnid], blue=1)
    paint(tmp_path / "in" / "val" / "n01440764" / "ILSVRC2012_val_00000002.png", 3)  # not of the subset
    name = f"imagenet_{which}"
    found = report(
        PLAIN._replace(data=str(tmp_path / "in"), **{name: str(tmp_path / "x")}), [planted()], tmp_path / "out"
    )
    assert found["planted", name, "shifted", "", "top1"] == 0.5
    assert found["n", "planted", name, "shifted", "", "top1"] == 6
    assert found["planted", f"data on {name}'s classes", "clean", "", "top1"] == 1.0
    assert found["n", "planted", f"data on {name}'s classes", "clean", "", "top1"] == 3
    assert found["planted", "data", "clean", "", "top1"] == 0.0  # 1,000-way: class 0 wins everywhere, and 3 is not 0
    assert ("planted", name, "shifted", "", "rms_calibration_error") in found


def test_imagenet_o_is_found_by_low_confidence(tmp_path: Path) -> None:
    own = [labels.wnids()[i] for i in labels.subset("o")]
    for k in range(4):
        paint(tmp_path / "o" / own[k] / "x.png", INDEX[own[9]], blue=200 if k else 0)  # three of four unsure
        paint(tmp_path / "in" / "val" / own[k] / "y.png", INDEX[own[k]], blue=40)
    settings = PLAIN._replace(data=str(tmp_path / "in"), imagenet_o=str(tmp_path / "o"))
    found = report(settings, [planted()], tmp_path / "out")
    # ranked by low confidence: three O pictures, four of the validation set, then the confident O picture
    assert found["planted", "imagenet_o", "shifted", "", "aupr"] == pytest.approx((3 / 4) * 1 + (1 / 4) * (4 / 8))
    assert ("planted", "imagenet_o", "shifted", "", "top1") not in found


def test_v2_sketch_and_real_labels(tmp_path: Path) -> None:
    for number in (0, 2, 10, 999):
        paint(tmp_path / "v2" / str(number) / "x.png", number)
    for wnid in TWO:
        paint(tmp_path / "s" / wnid / "x.png", INDEX[TWO[0]])
    val_tree(tmp_path / "in", wrong=0)
    settings = PLAIN._replace(
        data=str(tmp_path / "in"), imagenet_v2=str(tmp_path / "v2"), imagenet_sketch=str(tmp_path / "s")
    )
    found = report(settings, [planted()], tmp_path / "out")
    assert found["planted", "imagenet_v2", "shifted", "", "top1"] == 1.0
    assert found["planted", "imagenet_sketch", "shifted", "", "top1"] == 0.5
    known = labels.real_labels()
    scored = [INDEX[TWO[i % 2]] in known[i] for i in range(20) if known[i]]
    assert found["planted", "data", "real labels", "", "top1"] == pytest.approx(np.mean(scored))
    assert found["n", "planted", "data", "real labels", "", "top1"] == len(scored)


# ---- counting, keeping


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_every_picture_once_whatever_the_batch(batch_size: int, tmp_path: Path) -> None:
    val_tree(tmp_path / "in", wrong=5, total=23)
    settings = Settings(data=str(tmp_path / "in"), attacks=("fgsm",), corruptions=("contrast",), severities=(1,))
    found = report(settings, [planted()], tmp_path / "out", batch_size=batch_size)
    assert found["planted", "data", "clean", "", "top1"] == pytest.approx(18 / 23)
    assert found["n", "planted", "data", "clean", "", "top1"] == 23


def test_workers_change_nothing(tmp_path: Path) -> None:
    val_tree(tmp_path / "in", wrong=5, total=9)
    settings = Settings(data=str(tmp_path / "in"), attacks=(), corruptions=("gaussian_noise", "frost"), severities=(2,))
    first = report(settings, [planted()], tmp_path / "a")
    assert first == report(settings, [planted()], tmp_path / "b", workers=2)


def test_finished_cells_are_not_run_again_and_damaged_ones_are(tmp_path: Path) -> None:
    val_tree(tmp_path / "in", wrong=5)
    settings = Settings(data=str(tmp_path / "in"), attacks=("fgsm",), corruptions=("contrast",), severities=(1, 2))
    first = report(settings, [planted()], tmp_path / "out")
    again = planted()
    assert report(settings, [again], tmp_path / "out") == first
    assert again.module.calls == 16  # the check of the model only
    victim = sorted((tmp_path / "out" / "cells").glob("*.npz"))[0]
    victim.write_bytes(victim.read_bytes()[:100])
    once_more = planted()
    assert report(settings, [once_more], tmp_path / "out") == first
    assert once_more.module.calls > 16
    other = planted()._replace(provenance={"source": "another checkpoint"})
    report(settings, [other], tmp_path / "out")
    assert other.module.calls > 100
    paint(tmp_path / "in" / "val" / TWO[0] / "ILSVRC2012_val_00000099.png", 0)  # another picture, another cell
    assert report(settings, [planted()], tmp_path / "out")["n", "planted", "data", "clean", "", "top1"] == 21


def test_stopped_in_the_middle_it_keeps_what_it_has(tmp_path: Path) -> None:
    val_tree(tmp_path / "in", wrong=5)
    settings = Settings(data=str(tmp_path / "in"), attacks=(), corruptions=("contrast", "fog"), severities=(1,))

    class Stops(Planted):
        def forward(self, images: Tensor) -> Tensor:
            if self.calls > 50:
                raise KeyboardInterrupt
            return super().forward(images)

    model = planted()._replace(module=Stops().eval())
    with pytest.raises(KeyboardInterrupt):
        report(settings, [model], tmp_path / "out")
    kept = len(list((tmp_path / "out" / "cells").glob("*.npz")))
    assert kept == 2 and not list((tmp_path / "out" / "cells").glob("*.partial"))
    assert not (tmp_path / "out" / "rows.csv").exists()
    rest = planted()
    report(settings, [rest], tmp_path / "out")
    assert rest.module.calls == 16 + 20


def test_limit_takes_the_same_pictures_every_time(tmp_path: Path) -> None:
    val_tree(tmp_path / "in", wrong=5, total=40)
    settings = PLAIN._replace(data=str(tmp_path / "in"), limit=9)
    plans = [make_plan(settings, [planted()])[0].pictures for _ in range(2)]
    assert plans[0] == plans[1] and len(plans[0].paths) == 9
    assert {path.parent.name for path in plans[0].paths} == set(TWO)
    assert make_plan(settings._replace(seed=1), [planted()])[0].pictures != plans[0]


# ---- attacks


@pytest.fixture
def flipper():
    """An attack that makes red one step brighter, so that the planted answer is the next class."""

    @attack("Linf")
    def flip(model, images, labels, budget):
        return images + budget.eps * torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1)

    yield
    del ATTACKS["flip"]


def test_wrong_before_is_never_robust(tmp_path: Path, flipper) -> None:
    """Raising red by 1 of 255 turns 3 -> 4: right answers become wrong, and some wrong ones right."""
    names = [str(i) for i in range(10)]
    for i in range(10):
        paint(tmp_path / "in" / "4" / f"{i}.png", 3 if i < 4 else 4)  # four answer 3: wrong, until attacked
    settings = Settings(data=str(tmp_path / "in"), regenerate=False, attacks=("flip",), eps=(1 / 255,))
    model = planted(num_classes=10, names=names)
    evaluation = evaluate(make_plan(settings, [model]), [model], tmp_path / "out")
    rows = {(r.condition, r.metric): r.value for r in make_rows(evaluation)}
    assert rows["clean", "top1"] == 0.6
    attacked = evaluation.outcomes["planted", [c.condition for c in evaluation.cells].index("flip-20")]
    assert attacked.correct.mean() == 0.4  # the four that were wrong are right now
    assert rows["flip-20", "robust_top1"] == 0.0 and rows[WORST, "robust_top1"] == 0.0
    assert ("flip-20", "top1") not in rows


def outcome(correct: list[int], index: list[int] | None = None, zero: list[int] | None = None) -> Outcome:
    right = np.array(correct, dtype=bool)
    numbers = np.arange(len(right)) if index is None else np.array(index)
    return Outcome(numbers, right, right.astype(int), right * 0.9, {}, np.array(zero or [], dtype=bool))


def evaluation_of(cells: list[tuple[str, str, str, Outcome]]):
    """Cells of one model, `(kind, condition, severity, outcome)`; those with other pictures are of a subset."""
    from vmoe_momentum.robustness import Evaluation

    pictures = Pictures("data", [Path("x.png")] * 6, [0] * 6)
    made = []
    for kind, condition, severity, result in cells:
        order = None if len(result.index) == 6 else tuple(result.index.tolist())
        made.append(
            Cell(pictures, kind, condition, severity, attack=condition if kind == "attack" else None, order=order)
        )
    model = planted("m")
    return Evaluation(made, [model], {("m", i): c[3] for i, c in enumerate(cells)}, {})


def test_worst_case_over_attacks_image_by_image() -> None:
    none = [0] * 6
    cells = [
        ("clean", "clean", "", outcome([1, 1, 1, 1, 1, 0])),
        ("attack", "pgd-20", "4", outcome([1, 1, 0, 1, 1, 1], zero=none)),
        ("attack", "pgd-margin-20", "4", outcome([0, 1, 1, 1, 1, 0], zero=none)),
        ("attack", "square-200q", "4", outcome([0, 1], index=[3, 4], zero=[0, 0])),
    ]
    rows = {(r.condition, r.metric): (r.value, r.n) for r in make_rows(evaluation_of(cells))}
    assert rows["pgd-20", "robust_top1"] == (pytest.approx(4 / 6), 6)
    assert rows["square-200q", "robust_top1"] == (0.5, 2)
    assert rows[WORST, "robust_top1"] == (pytest.approx(2 / 6), 6)  # images 1 and 4


def test_signs_of_masked_gradients() -> None:
    none = [0] * 6
    fine = [
        ("clean", "clean", "", outcome([1] * 6)),
        ("attack", "fgsm", "4", outcome([1, 1, 1, 0, 0, 0], zero=none)),
        ("attack", "pgd-20", "4", outcome([1, 1, 0, 0, 0, 0], zero=none)),
        ("attack", "square-200q", "4", outcome([1, 0], index=[0, 2], zero=[0, 0])),
        ("attack", "sanity-pgd", "64", outcome([0] * 6, zero=none)),
    ]
    evaluation = evaluation_of(fine)
    assert warnings_of(evaluation, make_rows(evaluation)) == []

    def told(place: int, changed) -> str:
        cells = [changed if i == place else cell for i, cell in enumerate(fine)]
        evaluation = evaluation_of(cells)
        return "; ".join(warnings_of(evaluation, make_rows(evaluation)))

    assert "fgsm leaves 16.7 % where the stronger pgd-20 leaves 33.3 %" in told(
        1, ("attack", "fgsm", "4", outcome([1, 0, 0, 0, 0, 0], zero=none))
    )
    assert "square-200q leaves 0.0 %" in told(
        3, ("attack", "square-200q", "4", outcome([0, 0], index=[0, 2], zero=[0, 0]))
    )
    assert "33 % still right under PGD at eps 64/255" in told(
        4, ("attack", "sanity-pgd", "64", outcome([1, 1, 0, 0, 0, 0], zero=none))
    )
    assert "50 % of images have no gradient at all" in told(
        2, ("attack", "pgd-20", "4", outcome([1, 1, 0, 0, 0, 0], zero=[1, 1, 1, 0, 0, 0]))
    )


def test_routing_change_by_hand() -> None:
    before = torch.tensor([[[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]], dtype=torch.bool)
    after = torch.tensor([[[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]], dtype=torch.bool)
    assert float(routing_change(before, after)) == pytest.approx((0 + 2 / 3 + 0 + 1) / 4)
    assert float(routing_change(before, before)) == 0.0


# ---- comparing


def test_groups_of_seeds_are_averaged_and_paired(tmp_path: Path) -> None:
    """Three models of two labels: one label's seeds disagree on some pictures."""
    val_tree(tmp_path / "in", wrong=4, total=20)

    class Worse(Planted):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images).roll(1, dims=1)  # always wrong

    first = planted("good")
    second = planted("bad")._replace(name="bad#1", provenance={"source": 1})
    third = planted("bad")._replace(name="bad#2", provenance={"source": 2}, module=Worse().eval())
    models = [first, second, third]
    evaluation = evaluate(make_plan(PLAIN._replace(data=str(tmp_path / "in")), models), models, tmp_path / "out")
    (line,) = compare(evaluation)
    assert line.groups["good"].value == pytest.approx(0.8) and line.groups["bad"].value == pytest.approx(0.4)
    assert line.seeds == {"good": None, "bad": pytest.approx(np.std([0.8, 0.0], ddof=1))}
    assert line.differences["bad"].images.value == pytest.approx(-0.4)
    write_report(evaluation, tmp_path / "out", {})
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| **80.0** [" in text and "bad - good" in text


def test_the_page_stands_alone_and_everything_is_in_it(tmp_path: Path) -> None:
    val_tree(tmp_path / "in", wrong=4)
    settings = Settings(
        data=str(tmp_path / "in"), corruptions=("fog", "contrast"), severities=(1, 3), attacks=("fgsm",)
    )
    models = [planted("<b>&"), planted("two")]
    evaluation = evaluate(make_plan(settings, models), models, tmp_path / "out")
    rows = write_report(evaluation, tmp_path / "out", {"seed": 3}).rows
    page = (tmp_path / "out" / "report.html").read_text()
    assert "http" not in page and 'src="data:image/png;base64,' in page
    assert "&lt;b&gt;&amp;" in page and "<b>&<" not in page
    assert page.count("<img") >= 4
    with (tmp_path / "out" / "rows.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["provenance"] == {"seed": 3} and len(told["rows"]) == len(rows)


# ---- refusing


def wrapped(function) -> torch.nn.Module:
    class Wrapped(Planted):
        def forward(self, images: Tensor) -> Tensor:
            return function(super().forward(images))

    return Wrapped().eval()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda logits: logits.softmax(dim=1), r"gives probabilities \(rows sum to 1\)"),
        (lambda logits: logits[:, :10], r"gives \(8, 10\) for 8 images; wanted logits \(8, 1000\)"),
        (lambda logits: logits * float("nan"), "not finite"),
        (lambda logits: logits + torch.rand(1), "two passes over the same images differ"),
        (lambda logits: (logits, 1), "gives tuple"),
    ],
)
def test_models_that_give_something_else_are_refused(function, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_model(planted()._replace(module=wrapped(function)), "cpu")


def test_models_of_different_tasks_are_refused(tmp_path: Path) -> None:
    val_tree(tmp_path / "in", wrong=0)
    settings = PLAIN._replace(data=str(tmp_path / "in"))
    with pytest.raises(ValueError, match=r"different numbers of classes \(planted 1000, ten 10\)"):
        make_plan(settings, [planted(), planted("ten", 10)])
    names = [str(i) for i in range(10)]
    paint(tmp_path / "ten" / "3" / "x.png", 3)
    models = [planted("a", 10, names), planted("b", 10, names[::-1])]
    with pytest.raises(ValueError, match="a and b number their classes differently"):
        make_plan(settings._replace(data=str(tmp_path / "ten")), models)
    with pytest.raises(ValueError, match="imagenet_a=.*1,000 classes, not 10"):
        make_plan(PLAIN._replace(imagenet_a=str(tmp_path)), models[:1])
    with pytest.raises(ValueError, match="nothing to evaluate"):
        make_plan(PLAIN, models)
