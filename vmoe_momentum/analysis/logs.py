"""What fit logged: the columns of Lightning's metrics.csv."""

import csv
from collections import defaultdict
from pathlib import Path


def read_log(folder: str) -> dict[str, list[float]]:
    """Columns without their empty cells, as of `folder`/metrics.csv (the newest version_N of a folder of such).

    Raises FileNotFoundError: no log there; ValueError: not Lightning's.
    """
    path = _find(Path(folder))
    columns: dict[str, list[float]] = defaultdict(list)
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for key, value in row.items():
                    if value:
                        columns[key].append(float(value))
    except (ValueError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a metrics.csv of Lightning's CSVLogger ({error})") from error
    return dict(columns)


def _find(folder: Path) -> Path:
    versions = sorted(folder.glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime)
    for path in (folder, folder / "metrics.csv", *versions[-1:]):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{folder}: no metrics.csv in it; give the log folder of a fit with CSVLogger, such as runs/digits/version_0"
    )
