"""The one form of every result: flat rows, and what is computed from them."""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One number.

    model: label and, where several models share one, which of them ("HeavyBall#2"). severity_or_eps: 1 to 5 of a
    corruption, eps of an attack or noise (pixel units of 255 in Linf, of 1 where the condition ends in -L2), "" where
    there is none. value: accuracies and errors are shares in [0, 1]; mCE and its like are percentages. n: images behind
    it.
    """

    model: str
    dataset: str
    condition: str
    severity_or_eps: str
    metric: str
    value: float
    n: int


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows([*row[:-2], f"{row.value:.8g}", row.n] for row in rows)
