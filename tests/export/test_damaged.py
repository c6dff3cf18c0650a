"""Flipped bytes of every file that export writes: refused, or answered as before."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from flips import flipped

from vmoe_momentum.export import FORMATS, open_served
from vmoe_momentum.files.checksums import PROSE

pytest.importorskip("onnxruntime")
FLIPS = [1, pytest.param(50, marks=pytest.mark.long)]


@pytest.mark.parametrize("count", FLIPS)
@pytest.mark.parametrize("kind", list(FORMATS))
def test_flipped_bytes(made: Path, kind: str, count: int, tmp_path: Path) -> None:
    """README.md is the exception: prose, which nothing reads and people edit."""
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    expected = open_served(str(made / kind), trust_program=True)
    answer, place, refused = expected.probabilities(pixels), tmp_path / kind, 0
    files = sorted(path.name for path in (made / kind).iterdir() if path.name not in PROSE)
    for file in files:
        for changed in flipped((made / kind / file).read_bytes(), count):
            shutil.copytree(made / kind, place, dirs_exist_ok=True)
            (place / file).write_bytes(changed)
            try:
                found = open_served(str(place), trust_program=True)
            except ValueError:
                refused += 1
                continue
            assert file == "metadata.json"  # white space of it, say
            assert found.metadata == expected.metadata
            assert torch.equal(found.probabilities(pixels), answer)
    assert refused >= count * (len(files) - 1)


@pytest.mark.parametrize("kind", list(FORMATS))
def test_the_metadata_lists_every_file(made: Path, kind: str) -> None:
    told = json.loads((made / kind / "metadata.json").read_text())
    names = {path.name for path in (made / kind).iterdir()}
    assert set(told["sha256"]) == names - {"metadata.json"} and len(told["metadata_sha256"]) == 64
