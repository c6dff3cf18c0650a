"""Steps seeded by their place, checkpoints written whole, and what `fit` says when it is told to stop."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cli_helpers import fails
from lightning.fabric.plugins import TorchCheckpointIO

from vmoe_momentum import lightning_cli
from vmoe_momentum.files.staging import draft_of
from vmoe_momentum.training import AtomicCheckpointIO, SeededSteps

TESTS = Path(__file__).parent.parent


class At:
    """Where a trainer stands."""

    def __init__(self, epoch: int, rank: int = 0) -> None:
        self.current_epoch, self.global_rank = epoch, rank


def draws(seeded: SeededSteps, at: At, batch: int, device: str = "cpu") -> tuple[float, ...]:
    seeded.on_train_batch_start(at, SimpleNamespace(device=torch.device(device)), None, batch)
    return torch.rand(()).item(), float(np.random.rand()), random.random(), torch.rand(()).item()


def test_draws_follow_from_seed_epoch_batch_and_rank() -> None:
    torch.manual_seed(5)
    seeded = SeededSteps()
    seeded.on_train_start(None, None)
    first = draws(seeded, At(1), 3)
    others = [draws(seeded, At(2), 3), draws(seeded, At(1), 4), draws(seeded, At(1, rank=1), 3)]
    assert len({first, *others}) == 4 and all(a != b for other in others for a, b in zip(first, other, strict=True))
    assert draws(seeded, At(1), 3) == draws(seeded, At(1), 3, "cuda") == first
    torch.manual_seed(6)
    resumed = SeededSteps()
    resumed.load_state_dict(seeded.state_dict())
    resumed.on_train_start(None, None)
    assert draws(resumed, At(1), 3) == first
    fresh = SeededSteps()
    fresh.on_train_start(None, None)
    assert draws(fresh, At(1), 3) != first


def test_a_checkpoint_is_whole_or_the_old_one(tmp_path: Path, monkeypatch) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "new" / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)
    assert io.load_checkpoint(path) == {"step": 1}
    save = torch.save

    def fails(content, file) -> None:
        save(content, file)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fails)
        with pytest.raises(OSError, match="No space left"):
            io.save_checkpoint({"step": 2}, path)
    assert io.load_checkpoint(path) == {"step": 1} and list(path.parent.iterdir()) == [path]
    with draft_of(path) as living:  # of another process, whatever its number
        living.write(b"of a run that is saving")
        before = set(path.parent.iterdir()) - {path}
        io.save_checkpoint({"step": 3}, path)
        assert io.load_checkpoint(path) == {"step": 3} and set(path.parent.iterdir()) == {path, *before}
    assert len(before) == 1 and list(path.parent.iterdir()) == [path]


def test_killed_while_saving(tmp_path: Path) -> None:
    """Many times over: what lies there can always be read."""
    code = (
        "import sys, torch; from vmoe_momentum.training import AtomicCheckpointIO; io = AtomicCheckpointIO();"
        "tensor = torch.ones(1_000_000); print('ready', flush=True); step = 0\n"
        "while True: io.save_checkpoint({'step': step, 'tensor': tensor * step}, sys.argv[1]); step += 1"
    )
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": -1, "tensor": -torch.ones(1_000_000)}, path)
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, env=environment)
    assert process.stdout.readline() == b"ready\n"
    for _ in range(20):  # while it writes, without a pause
        saved = torch.load(path, weights_only=True)
        assert bool((saved["tensor"] == saved["step"]).all())
    process.send_signal(signal.SIGKILL)
    process.wait()
    saved = torch.load(path, weights_only=True)
    assert saved["step"] >= 0 and bool((saved["tensor"] == saved["step"]).all())


@pytest.mark.parametrize("word", ["last", "hpc"])
def test_words_for_checkpoints_that_find_none_are_refused(word: str, digits: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(TESTS.parent / "configs/digits.yaml")
    argv = ["fit", "--config", config, "--data=FolderDataModule", f"--data.root={digits}"]
    assert f"ckpt_path={word}: no " in fails([*argv, f"--ckpt_path={word}"], capsys)


def test_fit_uses_both(digits: Path) -> None:
    config = str(TESTS.parent / "configs/digits.yaml")
    argv = ["--config", config, "--data=FolderDataModule", f"--data.root={digits}", "--data.num_workers=1"]
    trainer = lightning_cli.run_lightning([*argv, "--trainer.logger=false"], start=False).trainer
    assert type(trainer.strategy.checkpoint_io) is AtomicCheckpointIO is not TorchCheckpointIO
    assert sum(isinstance(callback, SeededSteps) for callback in trainer.callbacks) == 1
