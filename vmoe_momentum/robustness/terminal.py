"""The comparison and the warnings on a terminal of any width."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .compare import Comparison
from .report import Report
from .tables import comparison_table, difference_text, value_text

PIPED = 200  # columns where nobody looks: lines are not folded at 80


def show(report: Report, console: Console | None = None) -> None:
    """A column a label where that fits; else a line a label, below its condition."""
    console = Console() if console is None else console
    if not console.is_terminal:
        console = Console(width=PIPED, file=console.file)
    if _widest(report.comparison) <= console.width:
        console.print(_wide(report.comparison))
    else:
        _narrow(report.comparison, console)
    for line in report.warnings:
        console.print(Text(f"warning: {line}", style="yellow"), soft_wrap=True)


def _wide(lines: list[Comparison]) -> Table:
    _, _, header, rows = comparison_table(lines, wide=True)
    table = Table(box=None, header_style="bold")
    for place, name in enumerate(header):
        table.add_column(Text(name), justify="right" if place else "left", no_wrap=True)
    for row in rows:
        table.add_row(*[Text(cell.replace("**", "")) for cell in row])
    return table


def _widest(lines: list[Comparison]) -> int:
    """Columns that the wide table takes when nothing is cut; rich pads each by one on both sides."""
    _, _, header, rows = comparison_table(lines, wide=True)
    cells = [[cell.replace("**", "") for cell in row] for row in (header, *rows)]
    return sum(max(map(len, column)) + 2 for column in zip(*cells, strict=True))


def _narrow(lines: list[Comparison], console: Console) -> None:
    labels = list(lines[0].groups) if lines else []
    if len(labels) > 1:
        console.print(Text(f"last column: difference from {labels[0]}", style="dim"), overflow="fold")
    for line in lines:
        console.print(Text(f"{line.what} (%, {line.n} pictures)", style="bold"), overflow="fold")
        cells = [
            (label, value_text(line, label).replace("**", ""), difference_text(line.differences.get(label)))
            for label in line.groups
        ]
        value, difference = (max(map(len, column)) for column in list(zip(*cells, strict=True))[1:])
        room = max(4, console.width - value - difference - 6)
        name = max((len(label) for label, *_ in cells if len(label) <= room), default=0)
        for label, own, minus in cells:
            if len(label) > name:  # long names have a line of their own
                console.print(Text(f"  {label}"), overflow="fold")
            text = f"  {label if len(label) <= name else '':<{name}}  {own:>{value}}  {minus:>{difference}}".rstrip()
            if len(text) <= console.width:
                console.print(Text(text))
            else:
                for part in (own, minus):
                    console.print(Text(f"    {part}"), overflow="fold")
