"""Every config parses, instantiates and takes one training step on small data."""

from pathlib import Path

import pytest
import yaml
from dataset_helpers import HAS_FFCV

from vmoe_momentum import cli

CONFIGS = sorted((Path(__file__).parent.parent / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_takes_a_step(path: Path, digits: Path, pictures: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(path.read_text())
    if settings["data"]["class_path"] == "FFCVDataModule" and not HAS_FFCV:
        pytest.skip("the package ffcv is not installed")
    root = digits if settings["data"]["init_args"]["root"] == "data/digits" else pictures
    small = ["--data.batch_size=8", "--data.num_workers=0", f"--data.root={root}", "--trainer.accelerator=cpu"]
    short = ["--trainer.fast_dev_run=true", "--model.schedule.warmup_steps=0"]
    cli.run(["fit", f"--config={path}", *small, *short])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_is_a_lab_note(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert len(lines) <= 60
    for fact in ("Command:", "Hardware:", "Expected:", "easured"):
        assert fact in header, fact
