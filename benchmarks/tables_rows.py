"""The rows of benchmarks/results."""

import csv
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))
