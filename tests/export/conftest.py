"""One checkpoint in every format, made once."""

from pathlib import Path

import pytest
from analysis_helpers import tiny, write_checkpoint

from vmoe_momentum import cli
from vmoe_momentum.export import FORMATS


@pytest.fixture(scope="session")
def made(digits: Path, tmp_path_factory) -> Path:
    """A checkpoint, and the folder of each format."""
    here = tmp_path_factory.mktemp("export")
    checkpoint = write_checkpoint(tiny(rule="HeavyBall"), here / "run" / "checkpoints" / "last.ckpt", epoch=4)
    (here / "run" / "config.yaml").write_text(
        "data: {class_path: FFCVDataModule, init_args: {root: /somewhere/digits}}\n"
        "model: {optimizer: {name: adamw, lr: 0.002}}\ntrainer: {max_epochs: 5}\n"
    )
    (here / "test").mkdir()
    (here / "test" / "metrics.csv").write_text("test/top1,test/loss\n0.9125,0.25\n")
    for kind in FORMATS:
        argv = [
            f"--ckpt_path={checkpoint}",
            f"--to={kind}",
            f"--data={digits}",
            "--limit=40",
            f"--scores={here / 'test'}",
        ]
        cli.run(["export", *argv, f"--out={here / kind}"])
    return here
