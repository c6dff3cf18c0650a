"""What a report leaves for other programs: LaTeX, a line a model, timm's results, RobustBench's entries."""

import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import VIEW, planted
from synthetic import attack_cell, cells, evaluation

from vmoe_momentum.robustness import Evaluation, write_report
from vmoe_momentum.robustness.cells import Cell, Outcome
from vmoe_momentum.robustness.falls import make_falls
from vmoe_momentum.robustness.latex import LINES, escape, latex
from vmoe_momentum.robustness.model_info import model_info
from vmoe_momentum.robustness.pictures import Pictures
from vmoe_momentum.robustness.rows import Row
from vmoe_momentum.robustness.summary import make_rows
from vmoe_momentum.robustness.tables import HEADLINES, Table, fall_tables, metric_tables
from vmoe_momentum.robustness.wide import TIMM, models_csv, timm_csvs

NAMES = ["Residual", "HeavyBall", "HeavyBall", "100%_a & {b} #1 ~x^2 \\y <z> --"]


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch) -> None:
    """They have tests of their own, and take seconds."""
    monkeypatch.setattr("vmoe_momentum.robustness.report.draw", lambda *_: {})


def imagenet(labels: list[str]) -> Evaluation:
    """As timm's results are of: clean with real labels, V2, Sketch, and A and R with their classes."""
    paths = [Path(f"n01440764/ILSVRC2012_val_{i + 1:08d}.JPEG") for i in range(60)]
    few = list(range(200))
    made = [Cell(Pictures("data", paths, [0] * 60), "clean", "clean")]
    for name, classes in (
        ("imagenet_v2", None),
        ("imagenet_sketch", None),
        ("imagenet_a", few),
        ("imagenet_r", few),
    ):
        made.append(Cell(Pictures(name, paths, [0] * 60, classes), "published", "shifted"))
        if classes:
            made.append(Cell(Pictures(f"data on {name}'s classes", paths, [0] * 60, classes), "published", "clean"))
    found = evaluation(made, labels)
    models = [model._replace(num_classes=1000, view=VIEW._replace(size=224)) for model in found.models]
    return found._replace(models=models)


# ---- LaTeX


def test_latex_has_the_tables_of_the_other_files(tmp_path: Path) -> None:
    """Every number of the first tables, in as many columns everywhere; groups of seeds with their spread."""
    made = evaluation(cells("attacks", "published", "sets"), NAMES)
    write_report(made, tmp_path, {})
    text, other = ((tmp_path / f"report.{kind}").read_text() for kind in ("tex", "md"))
    tables = re.findall(r"\\begin\{tabular\}\{(l+r*)\}\n\\toprule\n(.*?)\\bottomrule\n\\end\{tabular\}", text, re.S)
    assert len(tables) == 3 and all(part.count(r"\midrule") == 1 for _, part in tables)
    for columns, part in tables:
        lines = [line for line in part.splitlines() if line.endswith(r"\\")]
        assert all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in lines)
    mine = re.sub(r"\\textbf\{([^}]*)\}", r"\1", text).replace("$-$", "-").replace(r"$\pm$", "±")
    own = other[other.index("## Comparison") : other.index("## Top-1 against clean")]
    numbers = re.findall(r"[-+]?\d+\.\d(?: ± \d+\.\d)?(?: \[[^\]]*\])?", own.replace("**", ""))
    assert len(numbers) > 100 and all(number in mine for number in numbers)
    (mce,) = re.findall(r"imagenet_c \(60 of 50,000\): 15 corruptions mean \| ([^|]*) \| ([^|]*) \|", own)[:1]
    rows = [row.value for row in make_rows(made) if row.metric == "mce"]
    assert mce[0] == f"{100 * rows[0]:.1f}"
    assert mce[1] == f"{50 * sum(rows[1:3]):.1f} ± {100 * np.std(rows[1:3], ddof=1):.1f}"


def test_what_tex_would_take_for_its_own_is_escaped() -> None:
    assert escape(NAMES[-1]) == (
        r"100\%\_a \& \{b\} \#1 \textasciitilde{}x\textasciicircum{}2 "
        r"\textbackslash{}y \textless{}z\textgreater{} -{}-"
    )
    assert escape("-3.1 [-5.0, +2.0], a - b, vit-3") == "$-$3.1 [$-$5.0, +2.0], a $-$ b, vit-3"
    assert escape("a\nb\x07\u200b") == "a b"  # no line ends, nothing that has no sign
    found = latex([Table("T", "N", ["h", "[n]"], [["[3]", "x"], ["*", "y"], ["**1.0** ± 2", "z"]])])
    assert "{}[3] & x" in found and "{}* & y" in found and r"\textbf{1.0} $\pm$ 2 & z" in found


def test_long_tables_go_on_in_another() -> None:
    found = latex([Table("T", "N", ["a", "b"], [[str(i), "x"] for i in range(2 * LINES + 1)])])
    assert found.count(r"\begin{tabular}") == 3 and found.count(r"\caption{T. Continued.}") == 2
    assert latex([Table("T", "N", ["a", "b"], [])]).count(r"\begin{tabular}") == 1


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no TeX here")
def test_latex_compiles(tmp_path: Path) -> None:
    """Without an error, a line that is too long, or a sign that is not there."""
    write_report(evaluation(cells("attacks", "published", "sets"), [*NAMES, "d", "é", "f"]), tmp_path, {})
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "report.tex"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    log = (tmp_path / "report.log").read_text(errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "report.pdf").stat().st_size > 10_000
    assert "Overfull" not in log and "Missing character" not in log and "Float too large" not in log


# ---- a line a model


def test_every_row_is_in_its_models_line() -> None:
    made = evaluation(cells("attacks", "published", "sets"), NAMES, dense=("Residual",))
    rows = make_rows(made)
    found = pd.read_csv(io.StringIO(models_csv(made.models, rows)))
    assert list(found["model"]) == [model.name for model in made.models] and list(found["label"]) == NAMES
    assert set(found["params"]) == {1}
    lines = found.set_index("model")
    assert found.shape[1] == 3 + len({tuple(row[1:5]) for row in rows})
    for row in rows:
        name = "/".join(part for part in row[1:5] if part)
        assert lines.loc[row.model, name] == pytest.approx(row.value, rel=1e-6, abs=1e-9)
    assert lines.filter(like="routing").loc["Residual"].isna().all()  # it has none


# ---- timm


def test_timms_columns_open_in_its_aggregation() -> None:
    """Its results/generate_csv_results.py: read, joined by model, differences and ranks computed, sorted, written.

    Source: huggingface/pytorch-image-models at 30bd174. What it would write is what is there.
    """
    files = timm_csvs(made := imagenet(["a", "b", "c", "d"]), make_rows(made))
    names = {name.removeprefix("results-").removesuffix(".csv") for name in files}
    assert names == {
        "imagenet", "imagenet-real", "imagenetv2-matched-frequency", "sketch", "imagenet-a", "imagenet-a-clean",
        "imagenet-r", "imagenet-r-clean",
    }  # fmt: skip
    order = {"by": ["top1", "top5", "model"], "ascending": [False, False, True]}
    for name in names:
        base = f"{name}-clean" if name in ("imagenet-a", "imagenet-r") else "imagenet"
        text = files[f"results-{name}.csv"]
        found, clean = (pd.read_csv(io.StringIO(each)) for each in (text, files[f"results-{base}.csv"]))
        assert tuple(found.columns[:9]) == TIMM and len(found) == 4
        assert found["param_count"].map("{:,.2f}".format).tolist() == ["0.00"] * 4
        assert found["img_size"].tolist() == [224] * 4 and set(found["interpolation"]) == {"bilinear"}
        assert np.allclose(found["top1"] + found["top1_err"], 100) and (found["top5"] >= found["top1"]).all()
        assert found.equals(found.sort_values(**order)) and clean.equals(clean.sort_values(**order))
        if name == "imagenet" or name.endswith("-clean"):
            assert tuple(found.columns) == TIMM
            continue
        assert tuple(found.columns[9:]) == ("top1_diff", "top5_diff", "rank_diff")
        joined = found.merge(clean, on="model", suffixes=("", "_base"))
        for metric in ("top1", "top5"):
            expected = [f"{value:+.3f}" for value in joined[metric] - joined[f"{metric}_base"]]
            assert [f"{value:+.3f}" for value in found[f"{metric}_diff"]] == expected
        places = [clean["model"].tolist().index(model) - i for i, model in enumerate(found["model"])]
        assert found["rank_diff"].tolist() == places
    assert any(line.endswith(("+1", "+2", "+3")) for line in files["results-imagenet-a.csv"].splitlines())


def test_sets_that_timm_has_no_name_for() -> None:
    """Means of corruptions; of few classes no top-5; and without clean pictures no differences."""
    made = evaluation(cells("regenerated", "published", "attacks"), ["a", "b"])
    files = timm_csvs(made, make_rows(made))
    assert set(files) == {"results-oracles.csv", "results-oracles-regenerated.csv", "results-imagenet-c.csv"}
    few = made._replace(outcomes={k: o._replace(five=o.five[:, :0]) for k, o in made.outcomes.items()})
    lines = timm_csvs(few, make_rows(few))["results-imagenet-c.csv"].splitlines()
    assert re.fullmatch(r"a|b,\d+\.\d{3},\d+\.\d{3},,,0.00,32,0.875,bilinear,[-+]\d+\.\d{3},,[-+]?\d", lines[1])
    rows = [row for row in make_rows(made) if row.dataset.startswith("imagenet_c")]
    assert timm_csvs(made, rows)["results-imagenet-c.csv"].splitlines()[0] == ",".join(TIMM)


# ---- difference and rank against clean


def test_falls_are_from_the_same_pictures() -> None:
    """A set's from its classes', a part's from the part's, others' from all clean pictures; ranks by hand."""
    rows = [
        Row(model, *place, value, 60)
        for place, values in {
            ("data", "clean", "", "top1"): (0.9, 0.8, 0.8),
            ("data", "clean", "", "top5"): (0.9, 0.8, 0.85),
            ("data on imagenet_a's classes", "clean", "", "top1"): (0.7, 0.6, 0.5),
            ("imagenet_a (6 of 7,500)", "shifted", "", "top1"): (0.1, 0.2, 0.15),
            ("imagenet_c", "fog", "mean", "top1"): (0.3, 0.3, 0.4),
            ("imagenet_c", "fog", "3", "top1"): (0.3, 0.3, 0.4),
            ("data", "square-9q", "4", "top1_before"): (0.8, 1.0, 0.9),
            ("data", "square-9q", "4", "robust_top1"): (0.5, 0.4, 0.3),
            ("data", "pgd-20", "4", "robust_top1"): (0.5, 0.6, 0.7),
            ("data", "uniform-noise", "4", "top1"): (0.5, 0.6, 0.7),
        }.items()
        for model, value in zip("abc", values, strict=True)
    ]
    found = {(fall.condition, fall.model): fall for fall in make_falls(rows)}
    assert {condition for condition, _ in found} == {"shifted", "fog", "square-9q", "pgd-20"}  # once each
    told = {key: (round(fall.difference, 9), fall.rank_on_clean, fall.rank) for key, fall in found.items()}
    assert [told["shifted", m] for m in "abc"] == [(-0.6, 1, 3), (-0.4, 2, 1), (-0.35, 3, 2)]
    assert [told["fog", m] for m in "abc"] == [(-0.6, 1, 2), (-0.5, 3, 3), (-0.4, 2, 1)]  # top-5 breaks the tie of b, c
    assert [told["square-9q", m] for m in "abc"] == [(-0.3, 3, 1), (-0.6, 1, 2), (-0.6, 2, 3)]
    assert [told["pgd-20", m] for m in "abc"] == [(-0.4, 1, 3), (-0.2, 3, 2), (-0.1, 2, 1)]
    (table,) = fall_tables(make_falls(rows), {"imagenet_a (6 of 7,500)": 200})
    assert table.lines[0] == [
        "imagenet_a (6 of 7,500), 200 classes: shifted", "-60.0 (-2)", "-40.0 (+1)", "-35.0 (+1)",
    ]  # fmt: skip
    (alone,) = fall_tables(make_falls([row for row in rows if row.model == "a"]), {})
    assert alone.lines[0][1] == "-60.0"  # no places where there is one


def test_groups_of_seeds_are_one_column() -> None:
    rows = [
        Row(name, "c", "15 corruptions", "mean", "mce", v, 9) for name, v in (("x", 0.5), ("y#1", 0.6), ("y#2", 0.8))
    ]
    (table,) = metric_tables(rows, {"mce": HEADLINES["mce"]}, {}, {"x": "x", "y#1": "y", "y#2": "y"})
    assert table.header == ["condition", "x", "y", "n"]
    assert table.lines == [["c: 15 corruptions mean", "50.0", "70.0 ± 14.1", "9"]]


# ---- RobustBench


# field -> kinds, of RobustBench 1.1.1's utils.ModelInfo with its published entries' texts for numbers, and what only
# the entries have: external and unreliable (RobustBench/robustbench at 34dda3a, model_info/imagenet/Linf/*.json)
MAYBE = (str, type(None))
SCHEMA = {
    "link": MAYBE, "name": MAYBE, "authors": MAYBE, "additional_data": (bool, type(None)),
    "number_forward_passes": (int,), "dataset": (str,), "venue": (str,), "architecture": (str,), "eps": (str,),
    "clean_acc": (str,), "reported": MAYBE, "autoattack_acc": (str,), "external": (str,), "footnote": (str,),
    "unreliable": (bool,),
}  # fmt: skip
PUBLISHED = {  # what its Singh2023Revisiting_ViT-S-ConvStem.json holds
    "link": "https://arxiv.org/abs/2303.01870", "name": "Revisiting Adversarial Training for ImageNet",
    "authors": "Naman D Singh, Francesco Croce, Matthias Hein", "additional_data": False, "number_forward_passes": 1,
    "dataset": "imagenet", "venue": "NeurIPS 2023", "architecture": "ViT-S + ConvStem", "eps": "4/255",
    "clean_acc": "72.56", "reported": "48.08", "autoattack_acc": "48.08", "unreliable": False,
}  # fmt: skip


def check_entry(entry: dict) -> None:
    assert set(entry) <= set(SCHEMA) and set(SCHEMA) - set(entry) <= {"external", "footnote"}
    for name, value in entry.items():
        assert isinstance(value, SCHEMA[name]), name
    assert re.fullmatch(r"\d+(\.\d+)?(/255)?", entry["eps"])
    for name in {"clean_acc", "autoattack_acc", "external"} & set(entry):
        assert re.fullmatch(r"\d+\.\d\d", entry[name]) and 0 <= float(entry[name]) <= 100


def attacked(norm: str = "Linf", eps: tuple[float, ...] = (4.0,), labels: tuple[str, ...] = ("a", "b/c", "b c")):
    """autoattack, and pgd after it, on all images."""
    made = [Cell(Pictures("data", [Path(f"digits/val/1/{i}.png") for i in range(60)], [0] * 60), "clean", "clean")]
    made += [attack_cell("autoattack", "autoattack", each, norm) for each in eps]
    return evaluation([*made, attack_cell("pgd", "pgd-20", eps[-1], norm)], list(labels))


def test_entries_are_as_robustbenchs_own() -> None:
    check_entry(PUBLISHED)
    made = attacked()
    found = model_info(made, ["b c"])
    assert list(found) == [f"model_info/digits/Linf/{name}.json" for name in ("a", "b_c", "b_c_2")]
    shares = ("top1", "robust_top1")
    rows = {(row.model, row.condition): row.value for row in make_rows(made) if row.metric in shares}
    for model, text in zip(made.models, found.values(), strict=True):
        entry = json.loads(text)
        check_entry(entry)
        assert entry["eps"] == "4/255" and entry["dataset"] == "digits" and entry["venue"] == "N/A"
        assert entry["unreliable"] is (model.name == "b c") and entry["architecture"] == "Planted"
        for name, condition in (("clean_acc", "clean"), ("autoattack_acc", "autoattack"), ("external", "worst-case")):
            assert entry[name] == f"{100 * rows[model.name, condition]:.2f}"
        assert entry["footnote"].startswith("On 60 pictures, standard AutoAttack of pyautoattack")
    named = made._replace(models=[made.models[0]._replace(architecture="vit, Residual")])
    assert json.loads(next(iter(model_info(named, []).values())))["architecture"] == "vit, Residual"


def test_entries_of_several_eps_in_l2_and_without_autoattack() -> None:
    found = model_info(attacked("L2", (0.5, 1.0), ("a",)), [])
    assert list(found) == [f"model_info/digits/L2/a_eps_{eps}.json" for eps in ("0.5", "1")]
    entries = [json.loads(text) for text in found.values()]
    assert [entry["eps"] for entry in entries] == ["0.5", "1"] and all(check_entry(e) is None for e in entries)
    assert model_info(evaluation(cells("attacks"), ["a"]), []) == {}


def test_an_entry_where_autoattack_is_the_strongest_has_no_other() -> None:
    made = attacked()
    strongest = made._replace(cells=made.cells[:2])
    entry = json.loads(model_info(strongest, [])["model_info/digits/Linf/a.json"])
    assert "external" not in entry and "External" not in entry["footnote"]


def test_files_of_the_report_before_are_gone(tmp_path: Path) -> None:
    made = evaluation(cells("attacks"), ["a"])
    clean = [cell for cell in cells("attacks") if cell.kind == "clean"]
    write_report(evaluation([*clean, attack_cell("autoattack", "autoattack", 4)], ["a", "b"]), tmp_path, {})
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.json")}
    assert {f"model_info/oracles/Linf/{name}.json" for name in "ab"} < found
    (tmp_path / "model_info" / "mine.json").write_text("{}")
    outside = tmp_path.parent / "kept.csv"
    outside.write_text("x")
    told = json.loads((tmp_path / "report.json").read_text())
    told["files"] += ["../kept.csv", str(outside)]
    (tmp_path / "report.json").write_text(json.dumps(told))
    write_report(made, tmp_path, {})
    left = {str(path.relative_to(tmp_path)) for path in (tmp_path / "model_info").rglob("*.json")}
    assert left == {"model_info/mine.json"} and outside.exists()
    assert (tmp_path / "timm" / "results-oracles.csv").is_file()


def test_top5_and_calibration_are_those_of_torchmetrics() -> None:
    """On random answers, through Outcome and rows; confidences exactly between two bins are told below."""
    torch = pytest.importorskip("torch")
    metrics = pytest.importorskip("torchmetrics.functional.classification")
    timm_utils = pytest.importorskip("timm.utils")
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 10, generator=generator)
    labels = torch.where(torch.rand(500, generator=generator) < 0.4, logits.argmax(1), torch.arange(500) % 10)
    confidence, predicted = logits.softmax(1).max(1)
    pictures = Pictures("data", [Path(f"1/{i}.png") for i in range(500)], labels.tolist())
    outcome = Outcome(
        np.arange(500), (predicted == labels).numpy(), predicted.numpy(), confidence.numpy(), {},
        np.zeros(0, dtype=bool), logits.topk(5).indices.numpy(),
    )  # fmt: skip
    made = Evaluation([Cell(pictures, "clean", "clean")], [planted("m", 10)], {("m", 0): outcome}, {})
    found = {row.metric: row.value for row in make_rows(made)}
    expected = metrics.multiclass_accuracy(logits, labels, 10, average="micro", top_k=5)
    assert found["top5"] == pytest.approx(float(expected), abs=1e-7)
    assert 100 * found["top5"] == pytest.approx(float(timm_utils.accuracy(logits, labels, topk=(1, 5))[1]), abs=1e-4)
    error = metrics.multiclass_calibration_error(logits, labels, 10, n_bins=15, norm="l1")
    assert found["ece"] == pytest.approx(float(error), abs=1e-6) and found["ece"] > 0.05
