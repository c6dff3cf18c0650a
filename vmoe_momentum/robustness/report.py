"""The report: rows as CSV and JSON, tables as Markdown, everything on one self-contained HTML page."""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ..staging import write_together
from .charts import draw
from .compare import Comparison, compare
from .doubts import warnings_of
from .evaluate import Evaluation
from .imagenet_c import ALEXNET, ALEXNET_CLEAN
from .page import file_name, markdown, page
from .protocol import protocols
from .rows import Row, to_csv
from .summary import make_rows
from .tables import HEADLINES, METRICS, comparison_table, metric_tables


class Report(NamedTuple):
    """What was written."""

    rows: list[Row]
    comparison: list[Comparison]
    warnings: list[str]


def write_report(
    evaluation: Evaluation, out: Path, provenance: dict[str, Any], times: dict[str, Any] | None = None
) -> Report:
    """rows.csv, report.json, report.md, report.html and the pictures, in `out`: all of them, or none.

    times: what differs between two runs that are equal otherwise; into times.json, so that the rest does not.
    Raises ValueError: they cannot be written.
    """
    rows = make_rows(evaluation)
    lines, warnings = compare(evaluation), warnings_of(evaluation, rows)
    pictures = {name: _png(figure) for name, figure in draw(evaluation, rows).items()}
    sets = [cell.pictures for cell in evaluation.cells]
    classes = {each.name: each.labels_that_count for each in sets if each.classes is not None}
    heads = [comparison_table(lines), *metric_tables(rows, HEADLINES, classes)]
    tables = metric_tables(rows, METRICS, classes)
    content = {
        "unit": "shares: 0.5 is 50 %, an mCE of 0.8 is 80 %", "provenance": provenance, "warnings": warnings,
        "figures": [file_name(name) for name in pictures], "numbers": _numbers(evaluation),
        "comparison": [_flat(line) for line in lines], "rows": [row._asdict() for row in rows],
    }  # fmt: skip
    files = {
        "rows.csv": to_csv(rows),
        "report.json": json.dumps(content, indent=1, default=str, allow_nan=False) + "\n",
        "report.md": markdown(heads, tables, warnings, pictures, provenance),
        "report.html": page(heads, tables, warnings, pictures, provenance),
        "times.json": json.dumps(times or {}, indent=1) + "\n",
    }
    old = _pictures_of(out)
    drawn = {file_name(name): content for name, content in pictures.items()}
    write_together(out, {name: text.encode() for name, text in files.items()} | drawn)
    for name in old - set(drawn):  # a new report may have fewer
        (out / name).unlink(missing_ok=True)
    return Report(rows, lines, warnings)


def stamp(out: Path) -> tuple[int, int] | None:
    """Of the report that stands there; another one has another. None for none."""
    try:
        found = (out / "report.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def is_report(out: Path, provenance: dict[str, Any]) -> bool:
    """Whether the report that stands there is of the same models, pictures and settings, whoever wrote it."""
    try:
        there = json.loads((out / "report.json").read_text())["provenance"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    wanted = json.loads(json.dumps(provenance, default=str))
    return all(there.get(name) == value for name, value in wanted.items() if name not in ("command", "device"))


def _pictures_of(out: Path) -> set[str]:
    """Of the report that stands here."""
    try:
        return {Path(str(name)).name for name in json.loads((out / "report.json").read_text())["figures"]}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    """How the numbers were made: attacks, types of the models' numbers, what CE is over."""
    found: dict[str, Any] = {
        "attacks": protocols(evaluation.cells),
        "dtype": {model.name: _dtype(model.module) for model in evaluation.models},
        "classes_that_count": {
            cell.pictures.name: cell.pictures.labels_that_count
            for cell in evaluation.cells if cell.pictures.classes is not None
        },
    }  # fmt: skip
    if any(cell.kind == "published" and cell.condition in ALEXNET for cell in evaluation.cells):
        found["alexnet"] = {"top1_error": ALEXNET, "clean_top1_error": ALEXNET_CLEAN}
    return found


def _dtype(module: Any) -> dict[str, Any]:
    kinds = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in module.parameters()})
    return {"pixels": "float32", "parameters": kinds}


def _flat(line: Comparison) -> dict[str, Any]:
    """Numbers of a line, as shares."""
    differences = {
        label: {**found.images._asdict(), "standard_error_over_seeds": found.seeds}
        for label, found in line.differences.items()
    }
    means = {label: {**found._asdict(), "std_over_seeds": line.seeds[label]} for label, found in line.groups.items()}
    return {"what": line.what, "n": line.n, line.metric: means, "minus_first": differences}


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
