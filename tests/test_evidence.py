"""The runner of benchmarks/evidence.py: its protocol, pairs, rows and what a stop leaves."""

import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import evidence  # noqa: E402
import evidence_arms as arms  # noqa: E402
import evidence_measures as measures  # noqa: E402
import evidence_questions as questions  # noqa: E402
import evidence_rows as rows_of  # noqa: E402
import evidence_runs as runs  # noqa: E402

from vmoe_momentum.lightning_cli import run_lightning  # noqa: E402
from vmoe_momentum.robustness import Settings, make_plan  # noqa: E402
from vmoe_momentum.robustness.evaluate import evaluate  # noqa: E402

PROTOCOL = " ".join(evidence.__doc__.split())


def test_seeds_come_one_after_the_other_and_main_arms_have_five() -> None:
    every = arms.cells()
    assert [cell.seed for cell in every] == sorted(cell.seed for cell in every)
    assert len({(cell.arm.name, cell.seed) for cell in every}) == len(every) == 234
    five = {cell.arm.name for cell in every if cell.seed == 4}
    asked = {name for question in questions.MAIN for name in (question.arm, question.control)}
    assert asked <= five and {arm.part for arm in arms.ARMS.values() if arm.name in five} == {"main"}
    assert all(arm.seeds in (3, 5) for arm in arms.ARMS.values())


def test_what_wants_a_gpu_is_run_where_it_is_asked_for() -> None:
    assert len(arms.cells([*arms.PARTS])) == 234 + 4 * 5
    assert {cell.arm.part for cell in arms.cells(["small"])} == {
        cell.arm.part for cell in arms.cells(arm="small_residual")
    }
    for cell in arms.cells(["small"]):
        twin = arms.ARMS[cell.arm.name.removeprefix("small_")]
        assert (cell.arm.rule, cell.arm.post_norm, cell.arm.options[1:]) == (twin.rule, twin.post_norm, twin.options)


def test_the_header_has_every_arm_question_and_threshold() -> None:
    for question in (*questions.MAIN, *questions.DEPTH, *questions.MARGIN, *questions.SMALL):
        assert re.search(rf" {question.number} {question.arm} - {question.control}\b", PROTOCOL), question
    for arm in arms.main_arms():
        assert re.search(rf"\b{arm.name.removesuffix('_norm')}\b", PROTOCOL), arm.name
    assert all(re.search(rf"\b{arm.name}\b", PROTOCOL) for arm in arms.small_arms())
    clean, corrupted = (measure.counts for measure in questions.PRIMARY)
    told = (clean, corrupted, questions.GAIN_OF_DEPTH.counts, questions.BORNE.counts)
    assert "{} points (clean), {:g} point (corrupted), {} points (depth) or {} (gamma)".format(*told) in PROTOCOL
    assert f"loses no more than {100 * questions.LOST:g} points" in PROTOCOL
    for part, steps in arms.SHORT.items():
        assert f"{part.capitalize()}, three seeds, {steps} steps" in PROTOCOL
    for name, count in (
        ("attacked", "PGD-20 on {}"),
        ("square", "on {} of the held-out"),
        ("corrupted", "of {} of them"),
    ):
        assert count.format(measures.PICTURES[name]) in PROTOCOL
    hours = sum(arms.guess(cell.arm) for cell in arms.cells()) / 3600
    assert f"{hours:.0f} hours of one core" in PROTOCOL


SMALL = ("--data=FolderDataModule", "--data.num_workers=0", "--data.batch_size=16", "--data.eval_batch_size=60")
SHORT = ("--trainer.max_epochs=2", "--trainer.limit_train_batches=3", "--model.schedule.warmup_steps=1")


def build(name: str, digits: Path, out: Path):
    return run_lightning([*runs.options(arms.Cell(arms.ARMS[name], 3), digits, out), *SMALL], start=False)


def test_pairs_share_initial_weights_and_the_order_of_pictures(digits: Path, tmp_path: Path) -> None:
    first = build("residual", digits, tmp_path)
    weights = first.model.state_dict()
    first.datamodule.setup("fit")
    batches = [batch for batch, _ in zip(first.datamodule.train_dataloader(), range(3), strict=False)]
    for name in ("heavy_ball_07", "adam_norm", "heavy_ball_learned", "robust_norm", "depth_16_residual"):
        other = build(name, digits, tmp_path)
        found = other.model.state_dict()
        # the networks are built alike, block by block, but for what only the other one has
        shared = [key for key in weights if "norm3" not in key and key in found]
        if arms.ARMS[name].depth == 8:
            assert len(shared) == len(weights) and all(torch.equal(weights[key], found[key]) for key in shared)
        other.datamodule.setup("fit")
        for ours, theirs in zip(batches, other.datamodule.train_dataloader(), strict=False):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_every_arm_builds_the_network_that_it_names(digits: Path, tmp_path: Path) -> None:
    for name in ("dense", "residual_step_of_09", "heavy_ball_07_dense_blocks", "complex", "margin_complex_2.5",
                 "depth_56_heavy_ball_07_norm", "robust_released_norm"):  # fmt: skip
        net, arm = build(name, digits, tmp_path).model.model.net, arms.ARMS[name]
        settings = net.function_settings()
        told = arm.rule or arms.RESIDUAL
        assert told["init_args"].items() <= settings["rule"]["init_args"].items()
        assert settings["rule"]["class_path"] == told["class_path"]
        assert settings["post_norm"] == ("all" if arm.post_norm else "none") and len(net.blocks) == arm.depth


@pytest.fixture
def little(monkeypatch) -> None:
    """Few pictures for everything."""
    few = {"corrupted": 4, "attacked": 6, "square": 4, "instruments": 8}
    monkeypatch.setattr(measures, "PICTURES", few)
    monkeypatch.setattr(measures, "STEPS", 2)
    monkeypatch.setattr(measures, "TOKENS", 8)


def run(digits: Path, folder: Path, name: str = "heavy_ball_07", seed: int = 1, **settings) -> list[dict[str, str]]:
    fit = [*SMALL, *SHORT, *settings.pop("fit", ())]
    evidence.main(arm=name, seed=seed, data=str(digits), results=str(folder / "results"), out=str(folder / "runs"),
                  fit=fit, **settings)  # fmt: skip
    return rows_of.read_rows(folder / "results" / "rows.csv")


@pytest.mark.long
def test_a_row_has_every_measure_and_comes_back(digits: Path, tmp_path: Path, monkeypatch, little, capsys) -> None:
    """Stopped while it measures, it goes on there; deleted, its row is made again; asked for again, it is the same."""
    monkeypatch.setattr(runs, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        run(digits, tmp_path)
    assert not (tmp_path / "results" / "rows.csv").exists()
    trained = (tmp_path / "runs" / "heavy_ball_07_seed1" / "trained").stat().st_mtime_ns
    monkeypatch.setattr(runs, "measure", measures.measure)
    (row,) = run(digits, tmp_path)
    assert (tmp_path / "runs" / "heavy_ball_07_seed1" / "trained").stat().st_mtime_ns == trained
    missing = {name for name in rows_of.COLUMNS if not row[name]}
    assert missing == {"diverged", "gamma", *rows_of.INSIDE} | {name for name in missing if name.startswith("epochs_")}
    assert (row["part"], row["seed"], row["threads"]) == ("main", "1", "1")
    (tmp_path / "results" / "rows.csv").unlink()
    (again,) = run(digits, tmp_path)
    assert {name: again[name] for name in rows_of.REPEATED} == {name: row[name] for name in rows_of.REPEATED}
    run(digits, tmp_path)  # from the start, in another folder
    assert "the same to the last digit" in capsys.readouterr().out
    rows_of.add_row(tmp_path / "results" / "rows.csv", row | {"top1": "0.5"}, arms.cells())
    with pytest.raises(ValueError, match="top1: other than in the row"):
        run(digits, tmp_path)


def stop(*_) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_that_is_not_finite_is_a_row(digits: Path, tmp_path: Path, little) -> None:
    fit = ("--model.optimizer.lr=1e6", "--trainer.gradient_clip_val=null", "--trainer.limit_train_batches=40")
    (row,) = run(digits, tmp_path, "residual", fit=fit)
    assert row["diverged"] == "training" and not row["top1"] and row["seconds"]


@pytest.mark.long
def test_margin_says_what_would_lie_inside_at_each_gamma(digits: Path, tmp_path: Path, little) -> None:
    (row,) = run(digits, tmp_path, "margin_heavy_ball_07_1", 0)
    assert float(row["inside_at_1"]) == pytest.approx(float(row["share_rule"]), abs=1e-6)
    assert all(row[name] for name in rows_of.INSIDE) and not row["corrupted_top1"]


@pytest.mark.long
@pytest.mark.parametrize("name", [arm.name for arm in arms.main_arms()])
def test_every_main_arm_is_measured(name: str, digits: Path, tmp_path: Path, little) -> None:
    (row,) = run(digits, tmp_path, name, 0)
    assert row["corrupted_top1"] and not row["diverged"] and bool(row["load_cv"]) == (name != "dense")


def test_corrupted_pictures_are_those_of_the_report(digits: Path, tmp_path: Path, little) -> None:
    """Answers to the kept ones are the answers to those made anew."""
    from vmoe_momentum.classifiers import open_models

    measures.make_corrupted(digits, tmp_path / "corrupted")
    (model,) = open_models(["vmoe_tiny_patch4_16"], pretrained=False)
    model = model._replace(num_classes=10, class_names=None, module=Brightest(), routing=None, router_loss=None)
    shared = {"attacks": (), "corruptions": ("snow", "gaussian_noise"), "severities": (1, 4)}
    kept = Settings(sets={"imagenet_c": str(tmp_path / "corrupted")}, regenerate=False, **shared)
    anew = Settings(data=str(digits), limit=4, **shared)
    predicted = []
    for settings in (kept, anew):
        cells = make_plan(settings, [model])
        found = evaluate(cells, [model], tmp_path / "answers")
        predicted.append([found.outcomes[model.name, i].confidence.tolist() for i, cell in enumerate(cells)
                          if cell.kind != "clean"])  # fmt: skip
    assert predicted[0] == predicted[1]


class Brightest(torch.nn.Module):
    """Ten sums of pixels: any other pixel is another answer."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(10, images[0].numel(), generator=generator) / 16
        return images.flatten(1) @ weight.T


def test_rows_find_their_place_and_broken_files_are_told(tmp_path: Path) -> None:
    path, order = tmp_path / "rows.csv", arms.cells()
    for cell in (order[5], order[70], order[0]):
        rows_of.add_row(path, rows_of.make_row(cell, "", {"top1": 0.5}, {}), order)
    found = rows_of.read_rows(path)
    wanted = [(cell.arm.name, str(cell.seed)) for cell in (order[0], order[5], order[70])]
    assert [(row["arm"], row["seed"]) for row in found] == wanted
    rows_of.add_row(path, found[1] | {"top1": "0.6"}, order)  # in the place of the old one
    assert [row["top1"] for row in rows_of.read_rows(path)] == ["0.5", "0.6", "0.5"]
    text = path.read_text()
    path.write_text(text + text.splitlines()[-1] + "\n")
    with pytest.raises(ValueError, match="is there twice"):
        rows_of.read_rows(path)
    path.write_text(text[:-30])
    with pytest.raises(ValueError, match="a row is cut off"):
        rows_of.read_rows(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arm": "heavy_ball_7"}, "--arm=heavy_ball_7: no such arm"),
        ({"parts": ["main", "minor"]}, "--parts=.*minor"),
        ({"arm": "nesterov", "seed": 4}, "--seed=4: the protocol has seeds 0 to 2 there"),
        ({"arm": "small_residual", "data": ".", "results": "nothing"}, r"--parts=\[small\]: torch finds no GPU here"),
        ({"arm": "small_residual", "data": ".", "seed": 0}, r"--parts=\[small\]: torch finds no GPU here"),
        ({"data": "nowhere"}, "--data=nowhere: no such folder"),
        ({"fit": ["--trainer.max_epochs=1"]}, "--fit=.*give --results"),
    ],
)
def test_what_cannot_be_run_is_told(settings: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evidence.main(**settings)


def test_list_says_what_is_left(tmp_path: Path, capsys) -> None:
    evidence.main(list=True, results=str(tmp_path))
    assert "234 of 234 runs are left, about 21.0 hours" in capsys.readouterr().out


def test_with_nothing_left_the_page_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """No commit is asked for and no picture made: there is no row to come."""
    monkeypatch.setattr(evidence, "provenance", None)
    cell = arms.Cell(arms.ARMS["margin_residual_1"], 0)
    made = dict.fromkeys(rows_of.MADE, "1")
    rows_of.add_row(tmp_path / "rows.csv", rows_of.make_row(cell, "", {"top1": 0.5}, made), arms.cells())
    evidence.main(arm=cell.arm.name, seed=None, data=".", results=str(tmp_path), parts=["margin"], list=True)
    assert "2 of 3 runs are left" in capsys.readouterr().out
    for seed in (1, 2):
        row = rows_of.make_row(cell._replace(seed=seed), "", {"top1": 0.5}, made)
        rows_of.add_row(tmp_path / "rows.csv", row, arms.cells())
    evidence.main(arm=cell.arm.name, data=".", results=str(tmp_path), processes=0)
    assert not (tmp_path / "README.md").exists()
    evidence.main(arm=cell.arm.name, data=".", results=str(tmp_path))
    assert "all 3 runs are there" in capsys.readouterr().err and (tmp_path / "margin.png").exists()
    assert "3 of 254 runs are there" in (tmp_path / "README.md").read_text()


def test_rows_do_not_name_another_checkouts_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rows_of, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="is imported from .*, and rows would name the code of .*; set PYTHONPATH="):
        rows_of.provenance()
