"""The one form of every result: flat rows, and what is computed from them."""

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..files.staging import write_together


class Row(NamedTuple):
    """One number.

    model: label and, where several models share one, which of them ("HeavyBall#2"). severity_or_eps: 1 to 5 of a
    corruption, eps of an attack or noise (pixel units of 255 in Linf, of 1 where the attack ends in -L2), "" where
    there is none. value: a share, whatever the metric: an accuracy of 50 % is 0.5, an mCE of 80 % is 0.8. n: images
    behind it. A condition `mi-fgsm-20 from MODEL` is of pictures made on that model.
    """

    model: str
    dataset: str
    condition: str
    severity_or_eps: str
    metric: str
    value: float
    n: int


def to_csv(rows: Iterable[Row]) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows([*row[:-2], f"{row.value:.8g}", row.n] for row in rows)
    return file.getvalue()


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    write_together(path.parent, {path.name: to_csv(rows).encode()})
