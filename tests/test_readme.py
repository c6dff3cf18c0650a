"""What the README shows is what the project does."""

import csv
import importlib
import re
import shlex
from pathlib import Path

import pytest

from vmoe_momentum import cli

ROOT = Path(__file__).parent.parent
README, DOCS = (ROOT / "README.md").read_text(), ROOT / "docs"


def find_links(page: Path) -> list[tuple[str, str]]:
    """Paths, "" for the page itself, and the headings in them that are meant, "" for none."""
    return re.findall(r"\]\((?!https?:)([\w./\-]*)(?:#([\w-]+))?\)", page.read_text())


def headings(page: Path) -> set[str]:
    """As GitHub makes anchors of them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_tables_are_those_of_the_committed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    tables = importlib.import_module("tables")
    assert "<!-- digits -->" in (DOCS / "results.md").read_text()
    for page in tables.PAGES:
        text = page.read_text()
        assert "<!-- " in text and tables.fill(text) == text, "run `python benchmarks/tables.py`"


def block(text: str) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return found


def test_the_first_lines_run_as_printed(capsys) -> None:
    exec(block(README), {})
    assert "torch.Size([2, 1000])" in capsys.readouterr().out


def test_a_strangers_five_lines_run_as_printed(tmp_path: Path, monkeypatch, capsys) -> None:
    """Import a checkpoint, create, run, list the top five, get features."""
    text = (DOCS / "weights.md").read_text()
    (command,) = re.findall(r"^    vmoe-momentum (import flax .*)$", text, flags=re.MULTILINE)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    cli.run(shlex.split(command))
    assert len([line for line in block(text).splitlines() if line]) == 5
    exec(block(text), {})
    out = capsys.readouterr().out
    assert re.search(r"tensor\(\[\[(\d, ){4}\d\],", out)
    assert "[(2, 32, 4, 4), (2, 32, 4, 4)]" in out


GUIDE = ROOT / "vmoe_momentum" / "analysis" / "README.md"
TRAINING = ROOT / "vmoe_momentum" / "training" / "README.md"
LANGUAGE = ROOT / "vmoe_momentum" / "language" / "README.md"
PAGES = [
    *ROOT.glob("*.md"),
    *(
        path
        for folder in ("vmoe_momentum", "benchmarks", "configs", "data", "docs")
        for path in (ROOT / folder).rglob("*.md")
    ),
]
LINKS = [(page, path, heading) for page in PAGES for path, heading in find_links(page)]


@pytest.mark.parametrize(
    ("page", "path", "heading"),
    LINKS,
    ids=[f"{page.relative_to(ROOT)}: {path}#{heading}" for page, path, heading in LINKS],
)
def test_links_lead_somewhere(page: Path, path: str, heading: str) -> None:
    place = page.parent / path if path else page
    assert place.exists()
    assert not heading or heading in headings(place)


def test_the_first_page_is_one_screen_or_two() -> None:
    assert len(README.splitlines()) <= 150
    guides = [*DOCS.glob("*.md"), *(ROOT / "vmoe_momentum").rglob("README.md")]
    linked = {(ROOT / path).resolve() for path, _ in find_links(ROOT / "README.md")}
    assert set(guides) <= linked


def test_the_guides_figures_are_those_of_the_committed_rows() -> None:
    """Shares of the last epoch's eigenvalues inside the regions, HeavyBall's network."""
    with (ROOT / "benchmarks" / "results" / "analysis" / "spectrum.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["model"], row["epoch"]) == ("HeavyBall", "20")]
    spans = []
    for column in ("share_rule", "share_residual"):
        shares = [100 * float(row[column]) for row in rows]
        spans.append(f"{min(shares):.0f} to {max(shares):.0f} %")
    assert f"({spans[0]} against {spans[1]})" in " ".join(GUIDE.read_text().split())


def test_the_guides_gaps_are_those_of_the_committed_rows() -> None:
    """Relative gaps over the blocks of the last epoch's networks, all experts, raw."""
    told = " ".join(GUIDE.read_text().split())
    with (ROOT / "benchmarks" / "results" / "analysis" / "pareto.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["epoch"], row["experts"]) == ("20", "all")]
    gaps = {
        (model, name): [float(row["relative_gap"]) for row in rows if row["outputs"] == "raw"
                        and (row["model"], row["combination"]) == (model, name)]
        for model in ("HeavyBall", "Residual") for name in ("router", "shuffled", "equal")
    }  # fmt: skip
    span = {key: f"{min(values):.2f} to {max(values):.2f}" for key, values in gaps.items()}
    for model in ("HeavyBall", "Residual"):
        assert f"{span[model, 'router']} for {model} against {span[model, 'shuffled']} shuffled" in told
        assert len(gaps[model, "router"]) == 4
        assert all(own > blind for own, blind in zip(gaps[model, "router"], gaps[model, "shuffled"], strict=True))
    assert f"{span['HeavyBall', 'equal']} and {span['Residual', 'equal']}. That is one seed" in told


def test_the_worst_case_is_never_weaker_than_autoattack_on_the_committed_networks() -> None:
    with (ROOT / "benchmarks" / "results" / "adversarial_suite.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "robust_top1"]
    standing = {(row["model"], row["condition"]): float(row["value"]) for row in rows}
    models = {model for model, _ in standing}
    assert len(models) == 12
    assert all(standing[model, "worst-case"] <= standing[model, "autoattack"] for model in models)
    assert "On none of the twelve networks does the worst case" in TRAINING.read_text()
    assert all(standing[model, "worst-case"] == standing[model, "autoattack"] for model in models)


def test_adversarial_training_gains_what_the_guide_claims() -> None:
    with (ROOT / "benchmarks" / "results" / "adversarial.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "robust_top1"]
    for rule in ("Residual", "HeavyBall"):
        for attack in ("pgd-20", "autoattack"):
            standing = {
                way: [
                    float(r["value"])
                    for r in rows
                    if r["model"].startswith(f"{rule} {way}#") and r["condition"] == attack
                ]
                for way in ("clean", "PGD")
            }
            assert len(standing["clean"]) == len(standing["PGD"]) == 3
            assert min(standing["PGD"]) - max(standing["clean"]) > 0.15


def test_what_is_said_of_language_models_is_in_the_committed_rows() -> None:
    with (ROOT / "benchmarks" / "results" / "language.csv").open(newline="") as file:
        rows = {(row["model"], row["depth"], row["seed"]): row for row in csv.DictReader(file)}
    runs = [key for key in rows if key[1]]
    assert len(runs) == 27
    clean = {key: float(row["clean"]) for key, row in rows.items()}
    trigram, add_k = clean["Kneser-Ney trigram", "", ""], clean["add-0.001 trigram", "", ""]
    for model, depth, seed in runs:
        assert model == "Residual" or clean[model, depth, seed] > clean["Residual", depth, seed]
        assert clean[model, depth, seed] < (add_k if model.startswith("Adam") else trigram)
        assert clean[model, depth, seed] > trigram or not model.startswith("Adam")
    told = " ".join(LANGUAGE.read_text().split())
    cost = {key: float(rows[key]["swapped"]) - clean[key] for key in runs}
    span = {
        rule: [value for key, value in cost.items() if key[0] == rule] for rule in ("Residual", "HeavyBall", "Robust")
    }
    low = {rule: f"{min(values):.1f} to {max(values):.1f}" for rule, values in span.items()}
    assert (
        f"they cost Residual {low['Residual']} of perplexity, HeavyBall {low['HeavyBall']}, Robust {low['Robust']}."
        in told
    )
    signs = re.findall(
        r"^\| HeavyBall \| \d+ \| 3 \|.*\| [+\d.]+ \(([+-]).* to \+[\d.]+\) \|$", LANGUAGE.read_text(), re.MULTILINE
    )
    assert signs == ["+", "+", "-"]  # 3, 6 and 12 blocks
    best = {depth: min(clean["Residual", depth, seed] for seed in "012") for depth in ("6", "12")}
    assert best["12"] > best["6"]
