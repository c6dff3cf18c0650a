"""A report's headline tables as LaTeX: booktabs, a document that compiles and whose tables can be copied out."""

import re
import unicodedata

from .tables import Table

LINES = 40  # of a table; what is longer goes on in another
PREAMBLE = r"""% Each table stands alone: copy it, with \usepackage{booktabs,graphicx}.
% Names in other than Latin letters want lualatex or xelatex and a font that has these.
\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage{lmodern}
\usepackage[margin=2cm]{geometry}
\usepackage{booktabs}
\usepackage{graphicx}
\begin{document}
"""
ESCAPED = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "`": r"\textasciigrave{}", "±": r"$\pm$", "×": r"$\times$",
}  # fmt: skip


def latex(tables: list[Table]) -> str:
    """The tables of `tables.py`, in their order."""
    parts = [PREAMBLE]
    for table in tables:
        pieces = [table.lines[start : start + LINES] for start in range(0, max(1, len(table.lines)), LINES)]
        for number, lines in enumerate(pieces):
            note = table.note if number == 0 else "Continued."
            parts.append(_table(f"{table.title}. {note}", table.header, lines))
    return "\n".join([*parts, r"\end{document}", ""])


def escape(text: str) -> str:
    r"""Text that TeX prints as it is. A minus is one: -3.1 becomes $-$3.1."""
    kept = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    kept = re.sub(r"([-,'])(?=\1)", "\\1\0", kept)  # two of them would become another sign
    escaped = "".join("{}" if c == "\0" else ESCAPED.get(c, c) for c in kept)
    return re.sub(r"(?<![^\s\[])-(?=[\d ])", "$-$", escaped)


def _table(caption: str, header: list[str], lines: list[list[str]]) -> str:
    """No wider than the text; narrower ones keep their size."""
    columns = "l" + "r" * (len(header) - 1)
    body = [_line(header), r"\midrule", *map(_line, lines)]
    inner = "\n".join([rf"\begin{{tabular}}{{{columns}}}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"])
    return "\n".join([
        r"\begin{table}[htbp]", r"\centering", r"\small", rf"\caption{{{escape(caption)}}}", r"\medskip",
        r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%", inner + "}", r"\end{table}", r"\clearpage",
    ])  # fmt: skip


def _line(cells: list[str]) -> str:
    line = " & ".join(map(_cell, cells))
    return ("{}" if line.startswith(("[", "*")) else "") + line + r" \\"  # after \\ they would be its options


def _cell(text: str) -> str:
    if text.startswith("**"):
        inner, _, rest = text[2:].partition("**")
        return rf"\textbf{{{escape(inner)}}}{escape(rest)}"
    return escape(text)
