"""What is written and printed: complete, readable at any width, the same twice, and whole or not at all."""

import io
import json
import re
import resource
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from synthetic import cells, evaluation

from vmoe_momentum.robustness import write_report
from vmoe_momentum.robustness.compare import compare
from vmoe_momentum.robustness.report import Report
from vmoe_momentum.robustness.rows import Row
from vmoe_momentum.robustness.tables import HEADLINES, METRICS, difference_text, value_text
from vmoe_momentum.robustness.terminal import show

EVERYTHING = cells("regenerated", "attacks", "published", "sets")
NAMES = [
    "Residual",
    "HeavyBall",
    "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "Adam",
    "Robust",
    "Nesterov",
    "SAM",
    "x",
]


@pytest.fixture(autouse=True)
def pictures(monkeypatch) -> None:
    """Blank ones: what they show has its own tests, and takes seconds."""
    names = ("corruptions, data", "severity, data", "attacks", "routing", "examples")
    blank = {name: Figure(figsize=(0.1, 0.1)) for name in names}
    monkeypatch.setattr("vmoe_momentum.robustness.report.draw", lambda *_: blank)


def printed(lines, width: int, terminal: bool = True) -> list[str]:
    file = io.StringIO()
    show(Report([], lines, ["one that is long " * 9]), Console(file=file, width=width, force_terminal=terminal))
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()


@pytest.mark.parametrize("width", [60, 80, 120, 200])
@pytest.mark.parametrize("count", range(1, 9))
def test_the_terminal_shows_every_number_whole(width: int, count: int) -> None:
    """No label cut, no number broken over lines, nothing wider than the terminal; also groups of seeds."""
    labels = NAMES[:count] + (["HeavyBall"] if count % 2 == 0 else [])
    lines = compare(evaluation(cells("attacks", "published"), labels))
    for terminal in (True, False):
        out = printed(lines, width, terminal)
        assert all(len(line) <= (width if terminal else 200) for line in out[:-1])
        assert not any("…" in line or "..." in line for line in out)
        text = "\n".join(out)
        for label in labels:
            assert re.search(rf"(^|\s){re.escape(label)}(\s|$)", text), label
        for line in lines:
            for label in line.groups:
                assert value_text(line, label).replace("**", "") in text
                assert difference_text(line.differences.get(label)) in text
        for wanted in ("mCE of imagenet_c (60 of 50,000), lower is better", "worst-case, eps 4/255"):
            assert wanted in re.sub(r"\s+", " ", text)


def test_mce_and_worst_case_are_those_of_the_rows(tmp_path: Path) -> None:
    made = evaluation(EVERYTHING, NAMES[:3])
    found = write_report(made, tmp_path, {})
    rows = {(row.model, row.metric, row.condition, row.severity_or_eps): row.value for row in found.rows}
    lines = {line.what: line for line in found.comparison}
    mce, worst = lines["mCE of imagenet_c (60 of 50,000), lower is better"], lines["worst-case, eps 2/255"]
    for label in NAMES[:3]:
        assert mce.groups[label].value == pytest.approx(rows[label, "mce", "15 corruptions", "mean"])
        assert mce.groups[label].low < mce.groups[label].value < mce.groups[label].high
        assert worst.groups[label].value == pytest.approx(rows[label, "robust_top1", "worst-case", "2"])
    best = min(mce.groups, key=lambda label: mce.groups[label].value)
    assert all(value_text(mce, label).startswith("**") == (label == best) for label in NAMES[:3])
    part = evaluation([cell for cell in EVERYTHING if (cell.condition, cell.severity) != ("fog", "3")], ["m"])
    assert not any(line.metric == "mce" for line in compare(part))


class Page(HTMLParser):
    """Headings, tables and pictures in their order; every table's box."""

    def __init__(self) -> None:
        super().__init__()
        self.order, self.boxes, self.heading, self.stack = [], [], False, []

    def handle_starttag(self, tag, attributes) -> None:
        self.stack.append((tag, dict(attributes).get("class")))
        self.heading = tag == "h2"
        if tag == "table":
            self.boxes.append(self.stack[-2])

    def handle_endtag(self, tag) -> None:
        while self.stack and self.stack.pop()[0] != tag:
            pass

    def handle_data(self, text) -> None:
        if self.heading and text.strip():
            self.order.append(text.strip())
        self.heading = False


@pytest.mark.parametrize("count", [1, 3, 6, 8])
def test_the_page_has_its_numbers_first_and_scrolls_what_is_wide(count: int, tmp_path: Path) -> None:
    write_report(evaluation(EVERYTHING, NAMES[:count]), tmp_path, {})
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.boxes and set(page.boxes) == {("div", "scroll")} and ".scroll{overflow-x:auto}" in text
    places = {name: page.order.index(name) for name in page.order}
    first_picture = min(places[n] for n in places if n.startswith(("Corruptions", "Severity", "Attacks", "Routing")))
    assert places["Comparison"] < places["mCE (%)"] < places["Relative mCE (%)"] < first_picture
    assert places["Examples"] > max(place for name, place in places.items() if name not in ("Examples", "Provenance"))
    columns = [re.sub(r"<[^>]*>", " ", head) for head in re.findall(r"<tr><th>.*?</tr>", text)]
    assert max(map(len, columns)) < 160  # many models are lines, or numbers


def test_every_table_is_in_percent_and_every_row_a_share(tmp_path: Path) -> None:
    """One unit to a file: no metric that rows can have is without a table, and no table mixes units."""
    found = write_report(evaluation(EVERYTHING, NAMES[:2]), tmp_path, {})
    kinds = {row.metric.partition("/")[0] for row in found.rows}
    assert kinds <= {*HEADLINES, *METRICS, "robust_top1", "top1_before"} and "mce" in kinds and "ce" in kinds
    assert all(title.endswith("(%)") or "(%)" in title for title, _ in (HEADLINES | METRICS).values())
    errors = ("ce", "mce", "relative_mce")  # over AlexNet's
    assert all(0 <= row.value <= 1 for row in found.rows if row.metric not in errors)
    assert all(abs(row.value) < 9 for row in found.rows if row.metric in errors)
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["unit"].startswith("shares")
    text = (tmp_path / "report.md").read_text()

    def in_table(row: Row, name: str) -> bool:
        return f"| {name} | {100 * row.value:.1f} |" in text

    for row in found.rows:
        if row.model != "Residual" or "/" in row.metric or row.metric == "zero_gradient":
            continue
        few = ", 200 classes" if row.dataset.endswith(("_a", "_r", "_o", "'s classes")) else ""
        what = {"robust_top1": ", robust", "top1_before": ", before the attack"}.get(row.metric, "")
        assert in_table(row, f"{row.dataset}{few}: {row.condition} {row.severity_or_eps}".strip() + what), row


def test_json_says_how_numbers_were_made(tmp_path: Path) -> None:
    made = evaluation(EVERYTHING, NAMES[:2])
    write_report(made, tmp_path, {})
    told = json.loads((tmp_path / "report.json").read_text())["numbers"]
    attacks = {(each["condition"], each["severity_or_eps"]): each for each in told["attacks"]}
    assert set(attacks) == {(c.condition, c.severity) for c in EVERYTHING if c.kind in ("attack", "noise")}
    assert all(
        {"loss", "step", "restarts", "dtype"} <= set(each) for key, each in attacks.items() if "noise" not in key[0]
    )
    assert told["dtype"] == {name: {"pixels": "float32", "parameters": ["float32"]} for name in NAMES[:2]}
    assert told["alexnet"]["top1_error"]["fog"] == 0.819324 and told["alexnet"]["clean_top1_error"] == 0.43478
    assert (
        told["classes_that_count"]["imagenet_r"] == 200 and told["classes_that_count"]["data on imagenet_a's classes"]
    )
    write_report(evaluation(cells("regenerated"), ["m"]), tmp_path, {})
    assert "alexnet" not in json.loads((tmp_path / "report.json").read_text())["numbers"]


@pytest.fixture
def small_disk():
    """Files may not grow beyond a size: what a full disk does, for every file in its turn."""
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, kept[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, kept)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_the_report_that_stood_there(tmp_path: Path, small_disk) -> None:
    """Whichever file does not fit: the old ones stay as they are, nothing half is left, and one line says so."""
    new = evaluation(cells("attacks"), ["a", "b"])
    write_report(new, tmp_path / "new", {})
    wanted = contents(tmp_path / "new")
    sizes = sorted({len(content) for content in wanted.values()})
    assert len(sizes) >= 5 and "timm/results-oracles.csv" in wanted
    out = tmp_path / "out"
    write_report(evaluation(cells(), ["a"]), out, {})
    before = contents(out)
    for size in sizes:
        small_disk(size - 1)
        with pytest.raises(ValueError, match=rf"{out}: .*report.html.* cannot be written .*bytes needed.*free") as told:
            write_report(new, out, {})
        assert "\n" not in str(told.value)
        small_disk(2**30)
        assert contents(out) == before
    write_report(new, out, {})
    assert contents(out) == wanted


def test_what_keeps_mce_from_being_the_published_one_is_said(tmp_path: Path) -> None:
    whole = [cell for cell in EVERYTHING if cell.kind == "clean" or cell.pictures.whole]
    (told,) = write_report(evaluation(whole, ["m"]), tmp_path / "out", {}).warnings
    assert "imagenet_c (60 of 50,000): a part of the published pictures" in told
    (told,) = write_report(evaluation(whole[:-1], ["m"]), tmp_path / "out", {}).warnings
    assert "no mCE: it is the mean over 75 corruptions x severities, here are 74" in told
