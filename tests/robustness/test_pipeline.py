"""From folders to rows with planted answers: what is counted, kept, compared and refused."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from planted import VIEW, Planted, paint, planted
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from vmoe_momentum.robustness import BENCHMARK, EXTRA, SEVERITIES, Settings, labels, make_plan, write_report
from vmoe_momentum.robustness.answering import _noisy, _without_gradient, routing_change
from vmoe_momentum.robustness.attacks import ATTACKS, Budget, attack
from vmoe_momentum.robustness.cells import Cell, Outcome, Store
from vmoe_momentum.robustness.compare import compare
from vmoe_momentum.robustness.corruptions import corrupt
from vmoe_momentum.robustness.doubts import warnings_of
from vmoe_momentum.robustness.evaluate import evaluate
from vmoe_momentum.robustness.imagenet_c import ALEXNET, ALEXNET_CLEAN
from vmoe_momentum.robustness.models import View, check_model
from vmoe_momentum.robustness.pictures import Change, Pictures, batches
from vmoe_momentum.robustness.sets import SETS
from vmoe_momentum.robustness.summary import WORST, make_rows

INDEX = {wnid: place for place, wnid in enumerate(labels.wnids())}
TWO = ("n01440764", "n02123045")  # classes 0 and 281
CHECKED = 132  # pictures that a model is shown before anything else, where 20 come in batches of 64
TIMED = 20  # and those by which the time is estimated, where any answer is missing
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
    settings = PLAIN._replace(data=str(tmp_path / "in"), sets={"imagenet_c": str(tmp_path / "c")})
    found = report(settings, [planted()], tmp_path / "out")
    ces = {n: 100 * np.mean([share[n, s] for s in SEVERITIES]) / ALEXNET[n] for n in BENCHMARK}
    start = ("planted", "imagenet_c (10 of 50,000)")
    for name in BENCHMARK:
        assert found[(*start, name, "mean", "ce")] == pytest.approx(ces[name] / 100)
        assert found[(*start, name, "3", "top1")] == pytest.approx(1 - share[name, 3])
    assert found[(*start, "15 corruptions", "mean", "mce")] == pytest.approx(np.mean(list(ces.values())) / 100)
    relative = [
        100 * (np.mean([share[n, s] for s in SEVERITIES]) - 0.3) / (ALEXNET[n] - ALEXNET_CLEAN) for n in BENCHMARK
    ]
    assert found[(*start, "15 corruptions", "mean", "relative_mce")] == pytest.approx(np.mean(relative) / 100)
    assert found[(*start, "15 corruptions", "mean", "top1")] == pytest.approx(1 - np.mean(list(share.values())))
    assert found["planted", "data", "clean", "", "top1"] == pytest.approx(0.7)


def test_a_part_of_the_tree_is_labelled_a_part(tmp_path: Path) -> None:
    for severity in (1, 5):
        paint(tmp_path / "c" / "weather" / "fog" / str(severity) / TWO[0] / "a.png", 0 if severity == 1 else 5)
    settings = PLAIN._replace(sets={"imagenet_c": str(tmp_path / "c")}, corruptions=("fog",), severities=(1, 5))
    found = report(settings, [planted()], tmp_path / "out")
    assert found["planted", "imagenet_c (1 of 50,000)", "2 of 75 corruptions x severities", "mean", "top1"] == 0.5
    assert not any(key[-1] in ("mce", "ce", "relative_mce") for key in found)
    with pytest.raises(ValueError, match="gaussian_noise/1"):
        make_plan(PLAIN._replace(sets={"imagenet_c": str(tmp_path / "c")}), [planted()])
    paint(tmp_path / "c" / "weather" / "fog" / "1" / TWO[0] / "b.png", 0)
    with pytest.raises(
        ValueError, match=r"fog/5 has other pictures than the first folder \(1 and 2 files\); a part is missing"
    ):
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
    settings = PLAIN._replace(data=str(tmp_path / "in"), sets={name: str(tmp_path / "x")})
    found = report(settings, [planted()], tmp_path / "out")
    part = f"{name} (6 of {SETS[name].count:,})"
    assert found["planted", part, "shifted", "", "top1"] == 0.5
    assert found["n", "planted", part, "shifted", "", "top1"] == 6
    assert found["planted", f"data on {name}'s classes", "clean", "", "top1"] == 1.0
    assert found["n", "planted", f"data on {name}'s classes", "clean", "", "top1"] == 3
    assert found["planted", "data", "clean", "", "top1"] == 0.0  # 1,000-way: class 0 wins everywhere, and 3 is not 0
    # softmax over the 200: one logit of 12, the others 0
    confidence = np.exp(12.0) / (np.exp(12.0) + 199)
    assert found["planted", part, "shifted", "", "rms_calibration_error"] == pytest.approx(confidence - 0.5, abs=1e-4)


def test_imagenet_o_is_found_by_low_confidence(tmp_path: Path) -> None:
    own = [labels.wnids()[i] for i in labels.subset("o")]
    for k in range(4):
        paint(tmp_path / "o" / own[k] / "x.png", INDEX[own[9]], blue=200 if k else 0)  # three of four unsure
        paint(tmp_path / "in" / "val" / own[k] / "y.png", INDEX[own[k]], blue=40)
    settings = PLAIN._replace(data=str(tmp_path / "in"), sets={"imagenet_o": str(tmp_path / "o")})
    found = report(settings, [planted()], tmp_path / "out")
    part = "imagenet_o (4 of 2,000)"
    # ranked by low confidence: three O pictures, four of the validation set, then the confident O picture
    evaluation = evaluate(make_plan(settings, [planted()]), [planted()], tmp_path / "out")
    assert set(evaluation.outcomes["planted", 1].predicted) == {9}  # among the 200
    assert found["planted", part, "shifted", "", "aupr"] == pytest.approx((3 / 4) * 1 + (1 / 4) * (4 / 8))
    assert ("planted", part, "shifted", "", "top1") not in found


def test_v2_sketch_and_real_labels(tmp_path: Path) -> None:
    for number in (0, 2, 10, 999):
        paint(tmp_path / "v2" / str(number) / "x.png", number)
    for wnid in TWO:
        paint(tmp_path / "s" / wnid / "x.png", INDEX[TWO[0]])
    val_tree(tmp_path / "in", wrong=0)
    settings = PLAIN._replace(
        data=str(tmp_path / "in"), sets={"imagenet_v2": str(tmp_path / "v2"), "imagenet_sketch": str(tmp_path / "s")}
    )
    found = report(settings, [planted()], tmp_path / "out")
    assert found["planted", "imagenet_v2 (4 of 10,000)", "shifted", "", "top1"] == 1.0
    assert found["planted", "imagenet_sketch (2 of 50,889)", "shifted", "", "top1"] == 0.5
    known = labels.real_labels()
    scored = [INDEX[TWO[i % 2]] in known[i] for i in range(20) if known[i]]
    assert found["planted", "data", "real labels", "", "top1"] == pytest.approx(np.mean(scored))
    assert found["n", "planted", "data", "real labels", "", "top1"] == len(scored)


def test_real_labels_are_sets_found_by_number(tmp_path: Path) -> None:
    """The second of two labels is right, an image without labels does not count, and nothing is taken by order."""
    known = labels.real_labels()
    several = next(i for i, found in enumerate(known) if len(found) > 1 and i > 100)
    nothing = next(i for i, found in enumerate(known) if not found)
    one = next(i for i in range(several + 1, 50_000) if len(known[i]) == 1 and known[i][0] != known[several][1])
    for number, answer in ((several, known[several][1]), (nothing, 5), (one, known[several][1])):
        paint(tmp_path / "in" / TWO[0] / f"ILSVRC2012_val_{number + 1:08d}.png", answer)
    settings = PLAIN._replace(data=str(tmp_path / "in"))
    found = report(settings, [planted()], tmp_path / "out")
    assert found["planted", "data", "real labels", "", "top1"] == 0.5
    assert found["n", "planted", "data", "real labels", "", "top1"] == 2
    for extra in ("other.png", "ILSVRC2012_val_00000000.png", "ILSVRC2012_val_00050001.png"):
        place = paint(tmp_path / "in" / TWO[0] / extra, 0)
        found = report(settings, [planted()], tmp_path / "out")
        assert not any("real labels" in key for key in found)
        place.unlink()
    (tmp_path / "in" / TWO[0]).rename(tmp_path / "in" / "3")
    found = report(settings, [planted("ten", 10)], tmp_path / "out")  # not ImageNet's classes
    assert not any("real labels" in key for key in found)


def test_made_here_has_no_mce_and_extras_do_not_count(tmp_path: Path) -> None:
    val_tree(tmp_path / "in", wrong=1, total=2)
    settings = Settings(data=str(tmp_path / "in"), attacks=(), corruptions=(*BENCHMARK, *EXTRA))
    models = [planted()]
    evaluation = evaluate(make_plan(settings, models), models, tmp_path / "out")
    rows = {(r.condition, r.severity_or_eps, r.metric): r for r in make_rows(evaluation)}
    assert not {metric for _, _, metric in rows} & {"mce", "relative_mce", "ce"}
    own = [rows[name, str(s), "top1"].value for name in BENCHMARK for s in SEVERITIES]
    assert rows["15 corruptions", "mean", "top1"].value == pytest.approx(np.mean(own))
    assert rows["15 corruptions", "mean", "top1"].n == 75 * 2
    told = {line.what: line for line in compare(evaluation)}
    line = told["data (regenerated), mean of 15 corruptions"]
    assert line.groups["planted"].value == pytest.approx(np.mean(own)) and line.n == 2
    less = settings._replace(corruptions=("fog", "spatter"))
    evaluation = evaluate(make_plan(less, models), models, tmp_path / "out")
    part = {r.metric: r.n for r in make_rows(evaluation) if r.condition.startswith("5 of 75")}
    assert part == {"top1": 10, "top5": 10, "ece": 10}
    assert "data (regenerated), mean of 5 of 75 corruptions x severities" in {c.what for c in compare(evaluation)}


# ---- what models are shown


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """400 x 300, no two regions alike."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    path = tmp_path / "a" / "x.png"
    path.parent.mkdir(parents=True)
    small.resize((400, 300), Image.Resampling.BICUBIC).save(path)
    return path


def shown(pictures: Pictures, views: list[View], change: Change | None = None):
    return next(batches(pictures, views, 8, 0, change))


def test_corruptions_are_made_of_the_middle_224_pixels(photo: Path) -> None:
    """Resize(256) bilinear, CenterCrop(224), corrupted; other models see all of it, resized. And so its clean twin."""
    base = TF.center_crop(TF.resize(Image.open(photo), 256, InterpolationMode.BILINEAR), [224, 224])
    made = Image.fromarray(corrupt(np.asarray(base), "jpeg_compression", 3, 5, "a/x.png"))
    views = [View(224, 0.9, "bicubic"), View(96, 0.5, "bicubic")]
    batch = shown(Pictures("data", [photo], [0]), views, Change("jpeg_compression", 3, 5))
    for picture, found in ((made, batch.views), (base, batch.clean)):
        small = TF.resize(picture, [96, 96], InterpolationMode.BICUBIC)
        assert torch.equal(found[views[0]][0], TF.pil_to_tensor(picture))
        assert torch.equal(found[views[1]][0], TF.pil_to_tensor(small))


def test_published_corruptions_are_never_cropped(photo: Path, tmp_path: Path) -> None:
    square = TF.resize(Image.open(photo), [224, 224])
    square.save(tmp_path / "s.png")
    views = [View(224, 0.875, "bilinear"), View(64, 0.875, "bilinear")]
    found = shown(Pictures("imagenet_c", [tmp_path / "s.png"], [0], whole=True), views).views
    assert torch.equal(found[views[0]][0], TF.pil_to_tensor(square))
    assert torch.equal(found[views[1]][0], TF.pil_to_tensor(TF.resize(square, [64, 64])))
    paint(tmp_path / "c" / "fog" / "1" / TWO[0] / "a.png", 0)
    plan = make_plan(
        PLAIN._replace(sets={"imagenet_c": str(tmp_path / "c")}, corruptions=("fog",), severities=(1,)), [planted()]
    )
    assert [cell.pictures.whole for cell in plan] == [True]


def test_photographs_are_cropped_as_timm_does(photo: Path) -> None:
    view = View(96, 0.8, "bicubic")
    expected = timm.data.create_transform(
        (3, 96, 96), is_training=False, crop_pct=0.8, interpolation="bicubic", normalize=False
    )(Image.open(photo))
    assert torch.equal(shown(Pictures("data", [photo], [0]), [view]).views[view][0], expected)


def test_the_same_name_in_two_folders_is_two_pictures(tmp_path: Path) -> None:
    paths = [paint(tmp_path / folder / "x.png", 100, blue=100) for folder in "ab"]
    first, second = shown(Pictures("data", paths, [0, 1]), [VIEW], Change("gaussian_noise", 1, 0)).views[VIEW]
    assert not torch.equal(first, second)


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
    assert again.module.calls == CHECKED + 8  # and a gradient, for the attack
    victim = sorted((tmp_path / "out" / "cells").glob("*.npz"))[0]
    victim.write_bytes(victim.read_bytes()[:100])
    once_more = planted()
    assert report(settings, [once_more], tmp_path / "out") == first
    assert once_more.module.calls > CHECKED + 8
    other = planted()._replace(provenance={"source": "another checkpoint"})
    report(settings, [other], tmp_path / "out")
    assert other.module.calls > CHECKED + 76
    paint(tmp_path / "in" / "val" / TWO[0] / "ILSVRC2012_val_00000099.png", 0)  # another picture, another cell
    assert report(settings, [planted()], tmp_path / "out")["n", "planted", "data", "clean", "", "top1"] == 21


def test_a_cell_is_known_by_everything_that_decides_it(tmp_path: Path) -> None:
    path = paint(tmp_path / "a" / "x.png", 3)
    plain = Cell(Pictures("data", [path], [0]), "attack", "pgd-20", "1", attack="pgd", budget=Budget(1 / 255))
    store, model = Store(tmp_path), planted()
    known = {store.path(plain, model, 8, "cpu")}
    others = [
        plain._replace(pictures=plain.pictures._replace(labels=[1])),
        plain._replace(pictures=plain.pictures._replace(classes=[0, 3])),
        plain._replace(budget=Budget(1 / 255, seed=1)), plain._replace(budget=Budget(1 / 255, steps=3)),
        plain._replace(change=Change("fog", 1, 0)), plain._replace(attack="fgsm"), plain._replace(severity="2"),
        plain._replace(router_aware=True), plain._replace(order=()),
    ]  # fmt: skip
    known |= {store.path(cell, model, 8, "cpu") for cell in others}
    known |= {store.path(plain, model, 9, "cpu"), store.path(plain, model, 8, "cuda")}
    known |= {store.path(plain, model._replace(provenance={"sha256": "x"}), 8, "cpu")}
    known |= {store.path(plain, model._replace(view=VIEW._replace(size=33)), 8, "cpu")}
    paint(path, 4)  # as large as before
    os.utime(path, ns=(1, 1))
    known |= {store.path(plain, model, 8, "cpu")}
    assert len(known) == len(others) + 6
    clean = plain._replace(kind="clean", attack=None, budget=None)
    assert store.path(clean, model, 8, "cpu") == store.path(clean, model, 9, "cpu")  # batches do not matter here,
    coupled = model._replace(coupled=True)  # unless they do
    assert store.path(clean, coupled, 8, "cpu") != store.path(clean, coupled, 9, "cpu")


def test_damaged_cells_are_made_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "cells")
    kept = outcome([1, 0, 1], zero=[0, 0, 0])
    path = tmp_path / "cells" / "x.npz"
    store.write(path, kept)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(200):
        broken = bytearray(content)
        broken[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
        path.write_bytes(broken)
        found = store.read(path)
        assert found is None or all(np.array_equal(a, b) for a, b in zip(found[:4], kept[:4], strict=True))
    assert [file.name for file in (tmp_path / "cells").iterdir()] == ["x.npz"]


def test_cells_of_before_are_not_misread(tmp_path: Path, monkeypatch) -> None:
    """A file without something that an outcome has by now counts as not there, and has another name, too."""
    store = Store(tmp_path / "cells")
    path = paint(tmp_path / "a" / "x.png", 3)
    cell, name = Cell(Pictures("data", [path], [0]), "clean", "clean"), tmp_path / "cells" / "x.npz"
    store.write(name, outcome([1, 0, 1], zero=[0, 0, 0]))
    with np.load(name) as file:
        arrays = dict(file)
    assert store.read(name) is not None and arrays.pop("five").shape == (0, 0)
    np.savez_compressed(name, **arrays)
    assert store.read(name) is None
    now = store.path(cell, planted(), 8, "cpu")
    monkeypatch.setattr(Outcome, "_fields", Outcome._fields[:-1])
    assert store.path(cell, planted(), 8, "cpu") != now


def test_stopped_in_the_middle_it_keeps_what_it_has(tmp_path: Path) -> None:
    val_tree(tmp_path / "in", wrong=5)
    settings = Settings(data=str(tmp_path / "in"), attacks=(), corruptions=("contrast", "fog"), severities=(1,))

    class Stops(Planted):
        def forward(self, images: Tensor) -> Tensor:
            if self.calls > CHECKED + TIMED + 26:
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
    assert rest.module.calls == CHECKED + TIMED + 20


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
    attacked = evaluation.outcomes["planted", [c.condition for c in evaluation.cells].index("flip")]
    assert attacked.correct.mean() == 0.4  # the four that were wrong are right now
    assert rows["flip", "robust_top1"] == 0.0 and rows[WORST, "robust_top1"] == 0.0
    assert ("flip", "top1") not in rows


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
        ("attack", "square-200q", "4", outcome([0, 1], index=[3, 5], zero=[0, 0])),
        ("attack", "sanity-pgd", "64", outcome([0] * 6, zero=none)),
        ("attack", "pgd-20", "8", outcome([1, 1, 1, 1, 0, 1], zero=none)),
    ]
    rows = {(r.condition, r.severity_or_eps, r.metric): (r.value, r.n) for r in make_rows(evaluation_of(cells))}
    assert rows["pgd-20", "4", "robust_top1"] == (pytest.approx(4 / 6), 6)
    assert rows["square-200q", "4", "robust_top1"] == (0.0, 2)  # image 5 was wrong before
    assert rows[WORST, "4", "robust_top1"] == (pytest.approx(2 / 6), 6)  # images 1 and 4
    assert rows[WORST, "8", "robust_top1"] == (pytest.approx(1 / 6), 6)  # what fell at 4 has fallen at 8
    assert (WORST, "64", "robust_top1") not in rows


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
    for name in ("pma-20", "pgd-margin-20-rs", "malt-20-r5", "apgd-t-20-rs-r5-eot10", "pgd-20-r2-router"):
        options = ("attack", name, "4", outcome([1, 1, 0, 0, 0, 0], zero=none))
        weaker = ("attack", "square-200q-r2", "4", outcome([0, 0], index=[0, 2], zero=[0, 0]))
        evaluation = evaluation_of([fine[0], options, weaker])
        assert f"square-200q-r2 leaves 0.0 % where the stronger {name} leaves 50.0 %" in "; ".join(
            warnings_of(evaluation, make_rows(evaluation))
        )
    assert "square-200q leaves 0.0 %" in told(
        3, ("attack", "square-200q", "4", outcome([0, 0], index=[0, 2], zero=[0, 0]))
    )
    assert "33 % still right under PGD at eps 64/255" in told(
        4, ("attack", "sanity-pgd", "64", outcome([1, 1, 0, 0, 0, 0], zero=none))
    )
    assert "50 % of images have no gradient of the cross-entropy" in told(
        2, ("attack", "pgd-20", "4", outcome([1, 1, 0, 0, 0, 0], zero=[1, 1, 1, 0, 0, 0]))
    )
    noise = ("noise", "uniform-noise", "4", outcome([1, 0, 0, 0, 0, 0]))
    evaluation = evaluation_of([*fine, noise])
    told = warnings_of(evaluation, make_rows(evaluation))
    assert any("uniform-noise leaves 16.7 % where the stronger pgd-20 leaves 33.3 %" in line for line in told)
    evaluation = evaluation_of(fine)
    coupled = evaluation._replace(models=[evaluation.models[0]._replace(coupled=True)])
    assert "depend on what else is in the batch" in warnings_of(coupled, make_rows(coupled))[0]


def test_noise_is_as_large_as_said_and_each_pictures_own() -> None:
    images = torch.full((3, 3, 8, 8), 0.5)
    index = torch.tensor([0, 1, 0])
    made = _noisy(images, index, Budget(0.1)) - 0.5
    assert 0.095 < float(made.max()) <= 0.1 + 1e-6 and -0.1 - 1e-6 <= float(made.min()) < -0.095
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])
    assert not torch.equal(made, _noisy(images, index, Budget(0.1, seed=1)) - 0.5)
    assert float(_noisy(images * 0, index, Budget(0.1)).min()) == 0.0
    length = (_noisy(images, index, Budget(0.3, "L2")) - 0.5).flatten(1).norm(dim=1)
    torch.testing.assert_close(length, torch.full((3,), 0.3))


def test_who_has_no_gradient() -> None:
    """Nowhere, in one pixel a little, not a number."""

    class Odd(torch.nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            none, little, broken = images[:, 0, 0, 0]
            first = torch.stack([0 * none, 1e-6 * little, (0 * broken).sqrt()])
            return torch.stack([first, torch.zeros(3)], dim=1)

    zero = _without_gradient(Odd(), torch.rand(3, 3, 2, 2), torch.tensor([0, 0, 0]))
    assert zero.tolist() == [True, False, True]
    saturated = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))
    with torch.no_grad():
        saturated[1].weight[0], saturated[1].weight[1] = 1e4, -1e4
    images = torch.rand(3, 3, 2, 2) + 0.1
    assert _without_gradient(saturated, images, torch.tensor([0, 0, 1])).tolist() == [True, True, False]


def test_attacks_are_told_the_true_labels(tmp_path: Path) -> None:
    seen = []

    @attack("Linf")
    def listen(model, images, labels, budget):
        seen.extend(labels.tolist())
        return images

    try:
        for i in range(4):
            paint(tmp_path / "in" / str(i) / "x.png", 3)  # answered 3, whatever they are
        model = planted(num_classes=10, names=[str(i) for i in range(10)])
        settings = Settings(data=str(tmp_path / "in"), regenerate=False, attacks=("listen",), eps=(1 / 255,))
        evaluate(make_plan(settings, [model]), [model], tmp_path / "out")
        assert seen == [0, 1, 2, 3]
    finally:
        del ATTACKS["listen"]


def test_what_a_plan_attacks(tmp_path: Path) -> None:
    """Query attacks on a part; noise and the large eps whatever the attack."""
    val_tree(tmp_path / "in", wrong=0, total=40)
    settings = Settings(data=str(tmp_path / "in"), regenerate=False, attacks=("spsa", "square"), query_images=7)
    cells = {(cell.condition, cell.severity): cell for cell in make_plan(settings, [planted()])}
    assert {name for name, _ in cells} == {"clean", "uniform-noise", "spsa-5000q", "square-5000q"}
    assert len(cells["square-5000q", "1"].order) == 7
    assert cells["spsa-5000q", "4"].order == cells["square-5000q", "1"].order
    assert cells["uniform-noise", "2"].budget.eps == pytest.approx(2 / 255) and cells["clean", ""].order is None
    linear = make_plan(settings._replace(attacks=("pgd",), norm="L2", eps=(0.5,)), [planted()])
    assert [cell.condition for cell in linear][1:] == ["uniform-noise-L2", "pgd-20-L2", "sanity-pgd"]
    assert linear[-1].budget.eps == pytest.approx(64 / 255) and linear[-1].budget.norm == "Linf"
    blind = planted()._replace(module=wrapped(lambda logits: logits.detach()))
    few = settings._replace(attacks=("square",), queries=2, eps=(1 / 255,))
    rows = report(few, [blind], tmp_path / "out")  # what needs no gradient runs without one
    assert ("planted", "data", "square-2q", "1", "robust_top1") in rows
    assert not any("zero_gradient" in key for key in rows)


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


def test_units_warnings_and_provenance_are_in_the_report(tmp_path: Path) -> None:
    val_tree(tmp_path / "in", wrong=4)
    paint(tmp_path / "c" / "fog" / "1" / TWO[0] / "a.png", 0)
    settings = PLAIN._replace(data=str(tmp_path / "in"), sets={"imagenet_c": str(tmp_path / "c")})
    settings = settings._replace(corruptions=("fog",), severities=(1,))
    models = [planted("a|b")]
    evaluation = evaluate(make_plan(settings, models), models, tmp_path / "out")
    found = write_report(evaluation, tmp_path / "out", {"command": "<x>", "models": {"a|b": {}}})
    rms = next(row.value for row in found.rows if row.metric == "rms_calibration_error")
    text, page = ((tmp_path / "out" / f"report.{kind}").read_text() for kind in ("md", "html"))
    assert "| data: clean | 80.0 | 20 |" in text and f"| data: clean | {100 * rms:.1f} | 20 |" in text
    assert "a\\|b" in text and '"command": "<x>"' in text and "&lt;x&gt;" in page and "<x>" not in page
    for written in (text, page):
        assert "pictures of 40 x 40 pixels where ImageNet-C has 224 x 224" in written
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["comparison"][0]["top1"]["a|b"]["value"] == pytest.approx(0.8) and told["comparison"][0]["n"] == 20
    before = set((tmp_path / "out").glob("*.png"))
    write_report(evaluate(make_plan(settings._replace(sets={}), models), models, tmp_path / "out"),
                 tmp_path / "out", {})  # fmt: skip
    assert set((tmp_path / "out").glob("*.png")) < before  # pictures of the other report are gone


def test_the_page_stands_alone_and_everything_is_in_it(tmp_path: Path) -> None:
    val_tree(tmp_path / "in", wrong=4)
    settings = Settings(
        data=str(tmp_path / "in"), corruptions=("fog", "contrast"), severities=(1, 3), attacks=("fgsm",)
    )
    models = [planted("<b>&"), planted("two")]
    evaluation = evaluate(make_plan(settings, models), models, tmp_path / "out")
    rows = write_report(evaluation, tmp_path / "out", {"seed": 3}).rows
    page = (tmp_path / "out" / "report.html").read_text()
    assert "data: fgsm 1, robust" in page and "data: worst-case 4, robust" in page
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


def test_models_that_answer_at_random_need_passes_and_answer_alike_when_asked_again(tmp_path: Path) -> None:
    val_tree(tmp_path / "in", wrong=0, total=6)
    settings = PLAIN._replace(data=str(tmp_path / "in"), attacks=("pgd-margin", "square"), eps=(2 / 255,))
    settings = settings._replace(steps=2, queries=5, eot=3)
    noisy = planted()._replace(module=wrapped(lambda logits: logits + 3 * torch.randn_like(logits)))
    first, again = (report(settings, [noisy], tmp_path / out) for out in "ab")
    assert first == again
    assert {key[2] for key in first} >= {"pgd-margin-2-eot3", "square-5q-eot3", "sanity-pgd"}
    assert report(settings._replace(seed=1), [noisy], tmp_path / "c") != first
    assert "answers at random" in (tmp_path / "a" / "report.md").read_text()
    with pytest.raises(
        ValueError, match=r"two passes over the same images differ; .*averaged over by attacks: --eot=10"
    ):
        report(settings._replace(eot=1), [noisy], tmp_path / "d")
    with pytest.raises(ValueError, match="--eot=3: every model answers the same again"):
        report(settings, [planted()], tmp_path / "d")


def test_models_that_cannot_be_attacked_or_batched() -> None:
    blind = planted()._replace(module=wrapped(lambda logits: logits.detach()))
    assert not check_model(blind, "cpu").coupled
    with pytest.raises(ValueError, match=r"no gradient reaches its pixels; attack it with \[square\]"):
        check_model(blind, "cpu", gradients=True)
    places = wrapped(lambda logits: logits + 0.1 * torch.arange(len(logits))[:, None])
    assert check_model(planted()._replace(module=places), "cpu").coupled


def test_answers_that_are_no_numbers_end_the_run(tmp_path: Path) -> None:
    paint(tmp_path / "in" / TWO[0] / "x.png", 3)
    odd = planted()
    odd.module.register_forward_hook(lambda m, i, logits: torch.where(logits[:, 3:4] > 11, torch.nan, logits))
    with pytest.raises(ValueError, match="--model=planted: gives logits that are not finite on data, clean"):
        report(PLAIN._replace(data=str(tmp_path / "in")), [odd], tmp_path / "out")
    assert not (tmp_path / "out" / "report.html").exists()


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
        make_plan(PLAIN._replace(sets={"imagenet_a": str(tmp_path)}), models[:1])
    with pytest.raises(ValueError, match="nothing to evaluate"):
        make_plan(PLAIN, models)
