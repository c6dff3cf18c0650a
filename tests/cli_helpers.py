"""Running commands in this process, and reading what they wrote."""

import csv
from pathlib import Path

import pytest

from vmoe_momentum import cli


def fails(argv: list[str], capsys) -> str:
    """Runs main and gives the last line on stderr; the exit code must be 2, without traceback or usage dump."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    for text in (captured.out, captured.err):
        assert "Traceback" not in text
        assert "usage:" not in text
    return captured.err.strip().splitlines()[-1]


def rows(path: Path) -> list[dict[str, str]]:
    """Of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
