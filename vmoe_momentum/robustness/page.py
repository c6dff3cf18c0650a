"""A report as Markdown, and as one page of HTML that stands alone."""

import base64
import html
import json
from collections.abc import Iterable
from typing import Any

from .tables import Table

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{position:sticky;left:0;background:#fff}td:not(:first-child){white-space:nowrap}
td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}small{color:#666}img{max-width:100%}
.scroll{overflow-x:auto}li{margin:.3rem 0}
summary{cursor:pointer;color:#06c}
.warn{background:#fff6e0;border-left:4px solid #e0a000;padding:.3rem 1rem}
pre{overflow-x:auto;background:#f6f6f6;padding:1rem}"""

LONG = 30  # lines of a table that is folded away
EXAMPLES = "examples"  # the picture that comes last


def file_name(picture: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in picture).strip("_") + ".png"


def markdown(
    heads: list[Table], tables: list[Table], warnings: list[str], pictures: Iterable[str], provenance: dict[str, Any]
) -> str:
    parts = ["# Robustness report\n"]
    parts += ["## Warnings\n", *[f"- {line}" for line in warnings], ""] if warnings else []
    for title, note, header, lines in heads + tables:
        parts += [f"## {title}\n", note + "\n", _line(header), _line(["---"] * len(header)), *map(_line, lines), ""]
    parts += [f"![{name}]({file_name(name)})\n" for name in pictures]
    parts += ["## Provenance\n", "```json", json.dumps(provenance, indent=1, default=str), "```", ""]
    return "\n".join(parts)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def page(
    heads: list[Table], tables: list[Table], warnings: list[str], pictures: dict[str, bytes], provenance: dict[str, Any]
) -> str:
    """The numbers asked for first, then curves, then every number, and examples at the end."""
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>Robustness report</title><style>{STYLE}</style>"]
    parts.append("<h1>Robustness report</h1>")
    names = ", ".join(provenance["models"]) if "models" in provenance else ""
    parts.append(f"<p>{html.escape(names)}</p>")
    if warnings:
        items = "".join(f"<li>{html.escape(line)}</li>" for line in warnings)
        parts.append(f"<div class=warn><b>Read this first</b><ul>{items}</ul></div>")
    parts += [_table(table, folded=False) for table in heads]
    parts += [_picture(name, content) for name, content in pictures.items() if name != EXAMPLES]
    parts += [_table(table, folded=len(table.lines) > LONG) for table in tables]
    parts += [_picture(name, content) for name, content in pictures.items() if name == EXAMPLES]
    told = html.escape(json.dumps(provenance, indent=1, default=str))
    parts.append(
        f"<h2>Provenance</h2><details><summary>models, settings, versions</summary><pre>{told}</pre></details>"
    )
    return "\n".join(parts)


def _picture(name: str, content: bytes) -> str:
    told, data = html.escape(name), base64.b64encode(content).decode()
    return f'<h2>{told.capitalize()}</h2><img alt="{told}" src="data:image/png;base64,{data}">'


def _table(table: Table, folded: bool) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in table.header)
    body = "".join("<tr>" + "".join(f"<td>{_bold(cell)}</td>" for cell in line) + "</tr>" for line in table.lines)
    content = f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>"
    if folded:
        content = f"<details><summary>{len(table.lines)} lines</summary>{content}</details>"
    return f"<h2>{html.escape(table.title)}</h2><p><small>{html.escape(table.note)}</small></p>{content}"


def _bold(cell: str) -> str:
    text = html.escape(cell)
    if text.startswith("**"):
        inner, _, rest = text[2:].partition("**")
        return f"<b>{inner}</b>{rest}"
    return text
