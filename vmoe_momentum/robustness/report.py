"""The report: rows as CSV and JSON, tables as Markdown and LaTeX, everything on one self-contained HTML page.

And, for other programs, a line a model, timm's results and entries of RobustBench.
"""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from ..files.staging import write_together
from .charts import draw
from .compare import Comparison, compare
from .doubts import doubts, warnings_of
from .evaluate import Evaluation
from .falls import make_falls
from .imagenet_c import ALEXNET, ALEXNET_CLEAN
from .latex import latex
from .model_info import model_info
from .page import file_name, markdown, page
from .protocol import protocols
from .rows import Row, to_csv
from .summary import make_rows
from .tables import HEADLINES, METRICS, comparison_table, fall_tables, metric_tables
from .transfer import transfer_tables
from .wide import models_csv, timm_csvs


class Report(NamedTuple):
    """What was written."""

    rows: list[Row]
    comparison: list[Comparison]
    warnings: list[str]


def write_report(
    evaluation: Evaluation, out: Path, provenance: dict[str, Any], times: dict[str, Any] | None = None
) -> Report:
    """rows.csv, report.json, report.md, report.html, report.tex and the pictures, in `out`: all of them, or none.

    And for other programs models.csv, timm/results-*.csv and, of models that AutoAttack was run on, model_info/.

    times: what differs between two runs that are equal otherwise; into times.json, so that the rest does not.
    Raises ValueError: they cannot be written.
    """
    rows = make_rows(evaluation)
    lines, warnings = compare(evaluation), warnings_of(evaluation, rows)
    pictures = {name: _png(figure) for name, figure in draw(evaluation, rows).items()}
    sets = [cell.pictures for cell in evaluation.cells]
    classes = {each.name: count for each in sets if (count := each.labels_that_count) is not None}
    labels, falls = {model.name: model.label for model in evaluation.models}, make_falls(rows)
    heads = [comparison_table(lines), *transfer_tables(rows, labels)]
    heads += metric_tables(rows, HEADLINES, classes, labels)
    tables = fall_tables(falls, classes) + metric_tables(rows, METRICS, classes)
    doubted = [m.name for m in evaluation.models if doubts(evaluation._replace(models=[m]), rows)]
    entries = model_info(evaluation, doubted)
    others = {f"timm/{name}": text for name, text in timm_csvs(evaluation, rows).items()} | entries
    content = {
        "unit": "shares: 0.5 is 50 %, an mCE of 0.8 is 80 %", "provenance": provenance, "warnings": warnings,
        "figures": [file_name(name) for name in pictures], "files": sorted(others),
        "numbers": _numbers(evaluation), "comparison": [_flat(line) for line in lines],
        "against_clean": [fall._asdict() | {"difference": fall.difference} for fall in falls],
        "rows": [row._asdict() for row in rows],
    }  # fmt: skip
    files = {
        "rows.csv": to_csv(rows),
        "report.json": json.dumps(content, indent=1, default=str, allow_nan=False) + "\n",
        "report.md": markdown(heads, tables, warnings, pictures, provenance),
        "report.html": page(heads, tables, warnings, pictures, provenance),
        "report.tex": latex(heads),
        "models.csv": models_csv(evaluation.models, rows),
        **others,
        "times.json": json.dumps(times or {}, indent=1) + "\n",
    }
    old = _files_of(out)
    drawn = {file_name(name): content for name, content in pictures.items()}
    write_together(out, {name: text.encode() for name, text in files.items()} | drawn)
    for name in old - set(drawn) - set(files):  # a new report may have fewer
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


def _files_of(out: Path) -> set[str]:
    """Pictures and files for other programs of the report that stands here; none outside its folder."""
    try:
        told = json.loads((out / "report.json").read_text())
        found = [str(name) for key in ("figures", "files") for name in told.get(key, [])]
    except (OSError, ValueError, AttributeError, TypeError):
        return set()
    return {name for name in found if not Path(name).is_absolute() and ".." not in Path(name).parts}


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
