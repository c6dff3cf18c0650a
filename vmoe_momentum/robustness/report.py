"""The report: rows as CSV and JSON, tables as Markdown, everything on one self-contained HTML page."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from .charts import draw
from .evaluate import Evaluation
from .rows import Row, write_rows
from .summary import Comparison, compare, make_rows, warnings_of

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}small{color:#666}img{max-width:100%}li{margin:.3rem 0}
summary{cursor:pointer;color:#06c}
.warn{background:#fff6e0;border-left:4px solid #e0a000;padding:.3rem 1rem}
pre{overflow-x:auto;background:#f6f6f6;padding:1rem}"""

LONG = 30  # lines of a table that is folded away


Table = tuple[str, str, list[list[str]]]  # title, note, header and lines


class Report(NamedTuple):
    """What was written."""

    rows: list[Row]
    comparison: Table
    warnings: list[str]


def write_report(evaluation: Evaluation, out: Path, provenance: dict[str, Any]) -> Report:
    """rows.csv, report.json, report.md, report.html and the pictures, in `out`."""
    rows = make_rows(evaluation)
    lines, warnings = compare(evaluation), warnings_of(evaluation, rows)
    figures = draw(evaluation, rows)
    _remove_old(out)
    write_rows(out / "rows.csv", rows)
    content = {
        "provenance": provenance, "warnings": warnings, "figures": [f"{_file(name)}.png" for name in figures],
        "comparison": [_flat(line) for line in lines], "rows": [row._asdict() for row in rows],
    }  # fmt: skip
    (out / "report.json").write_text(json.dumps(content, indent=1, default=str, allow_nan=False) + "\n")
    tables = [_comparison(lines), *_metric_tables(rows)]
    (out / "report.md").write_text(_markdown(tables, warnings, figures, provenance))
    pictures = {name: _png(figure) for name, figure in figures.items()}
    for name, content in pictures.items():
        (out / f"{_file(name)}.png").write_bytes(content)
    (out / "report.html").write_text(_page(tables, warnings, pictures, provenance))
    return Report(rows, tables[0], warnings)


def _remove_old(out: Path) -> None:
    """The pictures of the report that stood here: a new one may have fewer."""
    try:
        old = json.loads((out / "report.json").read_text())["figures"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for name in old:
        (out / Path(str(name)).name).unlink(missing_ok=True)


def _flat(line: Comparison) -> dict[str, Any]:
    """Numbers of a line, in [0, 1]."""
    differences = {
        label: {**found.images._asdict(), "standard_error_over_seeds": found.seeds}
        for label, found in line.differences.items()
    }
    means = {label: {**found._asdict(), "std_over_seeds": line.seeds[label]} for label, found in line.groups.items()}
    return {"what": line.what, "n": line.n, "top1": means, "minus_first": differences}


def _comparison(lines: list[Comparison]) -> Table:
    labels = list(dict.fromkeys(label for line in lines for label in line.groups))
    header = ["top-1 (%)", *labels, *[f"{label} - {labels[0]}" for label in labels[1:]], "n"]
    table = [header]
    for line in lines:
        best = max(interval.value for interval in line.groups.values())
        cells = []
        for label in labels:
            interval = line.groups[label]
            text = f"{100 * interval.value:.1f}"
            text = f"**{text}**" if interval.value == best and len(labels) > 1 else text
            spread = line.seeds[label]
            seeds = "" if spread is None else f" ± {100 * spread:.1f}"
            cells.append(f"{text}{seeds} [{100 * interval.low:.1f}, {100 * interval.high:.1f}]")
        for label in labels[1:]:
            found = line.differences[label]
            text = f"{100 * found.images.value:+.1f} [{100 * found.images.low:+.1f}, {100 * found.images.high:+.1f}]"
            cells.append(text + ("" if found.seeds is None else f", seeds ± {100 * found.seeds:.1f}"))
        table.append([line.what, *cells, str(line.n)])
    note = (
        "Brackets: 95 % bootstrap interval over images; differences are paired over images. ± after an accuracy: "
        "standard deviation over the models of one label; after a difference: its standard error over them. Bold: the "
        "largest mean, whatever its interval. n: pictures."
    )
    return "Comparison", note, table


# metric -> title, factor, note
METRICS = {
    "mce": (
        "mCE",
        1,
        "Mean over the 15 corruptions of the error over AlexNet's (6-digit table), in %; lower is better.",
    ),
    "relative_mce": ("Relative mCE", 1, "The same of the errors' rise over the clean error; lower is better."),
    "ce": ("CE", 1, "Error over AlexNet's, five severities together, in %."),
    "rms_calibration_error": ("RMS calibration error", 100, "In %, bins of 100 images of like confidence, all bins."),
    "aurra": ("AURRA", 100, "In %, mean accuracy of the n most confident images over all n."),
    "aupr": ("AUPR", 100, "In %, pictures of no known class found by low confidence."),
    "zero_gradient": ("Images without a gradient", 100, "In %, of the cross-entropy at the clean picture."),
}


def _metric_tables(rows: list[Row]) -> list[Table]:
    models = list(dict.fromkeys(row.model for row in rows))
    tables = []
    note = "n: pictures, times corruptions and severities where these are put together."
    wanted = {"top1": ("Top-1 (%) of every condition", 100, note), **METRICS}
    wanted["routing_change"] = ("Routing change", 1, "1 - IoU of each token's expert sets, mean over blocks.")
    for metric, (title, factor, note) in wanted.items():
        own = [row for row in rows if row.metric.partition("/")[0] == metric]
        if metric == "top1":
            own += [row for row in rows if row.metric == "robust_top1"]
        if not own or (metric == "zero_gradient" and not any(row.value for row in own)):
            continue
        by_key: dict[tuple[str, str, str, str], dict[str, list[Row]]] = {}
        for row in own:
            by_key.setdefault(_key(row), {}).setdefault(row.model, []).append(row)
        table = [["condition", *models, "n"]]
        for key, found in by_key.items():
            means = [_cell([row.value for row in found.get(model, [])], factor) for model in models]
            table.append([_name(key), *means, str(next(iter(found.values()))[0].n)])
        tables.append((title, note, table))
    return tables


def _key(row: Row) -> tuple[str, str, str, str]:
    return row.dataset, row.condition, row.severity_or_eps, row.metric.partition("/")[0]


def _name(key: tuple[str, str, str, str]) -> str:
    dataset, condition, severity, metric = key
    return f"{dataset}: {condition} {severity}".strip() + (", robust" if metric == "robust_top1" else "")


def _cell(values: list[float], factor: float) -> str:
    return f"{factor * sum(values) / len(values):.{3 if factor == 1 and max(values) <= 1 else 1}f}" if values else ""


def _file(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")


def _markdown(tables: list[Table], warnings: list[str], figures: dict[str, Figure], provenance: dict[str, Any]) -> str:
    parts = ["# Robustness report\n"]
    parts += ["## Warnings\n", *[f"- {line}" for line in warnings], ""] if warnings else []
    for title, note, (header, *lines) in tables:
        parts += [f"## {title}\n", note + "\n", _line(header), _line(["---"] * len(header)), *map(_line, lines), ""]
    parts += [f"![{name}]({_file(name)}.png)\n" for name in figures]
    parts += ["## Provenance\n", "```json", json.dumps(provenance, indent=1, default=str), "```", ""]
    return "\n".join(parts)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()


def _page(tables: list[Table], warnings: list[str], pictures: dict[str, bytes], provenance: dict[str, Any]) -> str:
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Robustness report</title><style>{STYLE}</style>"]
    parts.append("<h1>Robustness report</h1>")
    names = ", ".join(provenance["models"]) if "models" in provenance else ""
    parts.append(f"<p>{html.escape(names)}</p>")
    if warnings:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in warnings)
        parts.append(f"<div class=warn><b>Read this first</b><ul>{items}</ul></div>")
    first, *others = tables
    parts.append(_table(first, folded=False))
    for name, picture in pictures.items():
        data = base64.b64encode(picture).decode()
        told = html.escape(name)
        parts.append(f'<h2>{told.capitalize()}</h2><img alt="{told}" src="data:image/png;base64,{data}">')
    parts += [_table(table, folded=len(table[2]) > LONG) for table in others]
    told = html.escape(json.dumps(provenance, indent=1, default=str))
    parts.append(
        f"<h2>Provenance</h2><details><summary>models, settings, versions</summary><pre>{told}</pre></details>"
    )
    return "\n".join(parts)


def _table(table: Table, folded: bool) -> str:
    title, note, (header, *lines) = table
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_bold(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    content = f"<table><tr>{head}</tr>{body}</table>"
    if folded:
        content = f"<details><summary>{len(lines)} lines</summary>{content}</details>"
    return f"<h2>{html.escape(title)}</h2><p><small>{html.escape(note)}</small></p>{content}"


def _bold(cell: str) -> str:
    text = html.escape(cell)
    if text.startswith("**"):
        inner, _, rest = text[2:].partition("**")
        return f"<b>{inner}</b>{rest}"
    return text
