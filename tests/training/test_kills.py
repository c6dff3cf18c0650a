"""benchmarks/kills.py, with fewer kills."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.long
def test_killed_at_random_moments_it_always_goes_on(digits, tmp_path) -> None:
    """Whole checkpoints, then folders: each start after the first goes on where a kill ended the last."""
    words = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), f"--data={digits}", "--kills=4"]
    words += ["--strategies", "fsdp2", "fsdp2 sharded_async"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*words, "--tmp=/tmp", f"--out={tmp_path / 'kills.csv'}"], env=environment, capture_output=True,
        text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    with (tmp_path / "kills.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["whole"] for row in rows] == ["1"] * 4 and all(row["lines"] == "1" for row in rows)
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(steps) and steps[0] > 0
