"""Runs that are killed in the middle of an epoch and go on: as programs, on both backends, on one and two ranks."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_helpers import HAS_FFCV, requires_ffcv
from recording import read

from vmoe_momentum import cli
from vmoe_momentum.datasets.batches import BatchPlan
from vmoe_momentum.datasets.layout import list_images, read_classes

TESTS = Path(__file__).parent.parent
FFCV_FIRST = [  # the other one in `make test-all`, or where there is no FFCV
    pytest.param("FFCVDataModule", marks=requires_ffcv, id="ffcv"),
    pytest.param("FolderDataModule", marks=pytest.mark.long if HAS_FFCV else (), id="folder"),
]
EPOCHS, BATCH = 2, 4


def arguments(
    backend: str, root: Path, folder: Path, kill_at: int | None = None, sign: str = "SIGKILL", **settings: object
) -> list[str]:
    """Two epochs of a network that draws at random wherever it can, a checkpoint every other step."""
    net = ["name=vmoe_tiny_patch4_16", "rule=HeavyBall", "drop_path_rate=0.2", "drop_rate=0.1", "expert_drop_rate=0.1"]
    saver = "lightning.pytorch.callbacks.ModelCheckpoint"
    given = {
        "data": backend, "data.root": root, "data.image_size": 16, "data.batch_size": BATCH, "data.num_workers": 1,
        "model.net": "vmoe_momentum.create_model", **dict(f"model.net.init_args.{word}".split("=") for word in net),
        "model.mixup": 0.4, "model.cutmix": 1.0, "model.random_erasing": 0.5, "trainer.max_epochs": EPOCHS,
        "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false", "trainer.logger": "false",
        "trainer.callbacks+": saver, "trainer.callbacks.dirpath": folder / "checkpoints",
        "trainer.callbacks.filename": "last", "trainer.callbacks.every_n_train_steps": 2,
        "trainer.callbacks.enable_version_counter": "false", "trainer.num_sanity_val_steps": 0,
        **settings,
    }  # fmt: skip
    dying = {"trainer.callbacks.kill_at": kill_at, "trainer.callbacks.signal": sign} if kill_at is not None else {}
    recording = {"trainer.callbacks+": "recording.Recording", "trainer.callbacks.folder": folder / "seen"}
    return ["fit", *(f"--{name}={value}" for told in (given, recording, dying) for name, value in told.items())]


def start(folder: Path, argv: list[str], ranks: int) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    paths = f"{TESTS}{os.pathsep}{TESTS.parent}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, *launcher, "-m", "vmoe_momentum", *argv]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=280)


def labels_of(root: Path, split: str) -> list[int]:
    return [file.label for file in list_images(root / split, read_classes(root))]


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", FFCV_FIRST)
def test_killed_and_resumed_is_never_stopped(backend, pictures, tmp_path, monkeypatch) -> None:
    """Every batch, pixel for pixel, and every weight, bit for bit."""
    monkeypatch.syspath_prepend(TESTS)
    monkeypatch.chdir(tmp_path)  # where Lightning saves the config of a run without logs
    cli.run(arguments(backend, pictures, tmp_path / "whole"))
    whole = read(tmp_path / "whole" / "seen", "train")
    per_epoch = 24 // BATCH
    assert len(whole) == EPOCHS * per_epoch
    kill_at = int(np.random.default_rng().integers(3, len(whole)))  # anywhere; the messages below say where
    killed = start(tmp_path, arguments(backend, pictures, tmp_path / "cut", kill_at), 1)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = checkpoint(tmp_path / "cut")["global_step"]
    seen = read(tmp_path / "cut" / "seen", "train")
    assert len(seen) == kill_at and kill_at - 2 <= done <= kill_at, (kill_at, done)
    resume = {"ckpt_path": tmp_path / "cut" / "checkpoints" / "last.ckpt"}
    cli.run(arguments(backend, pictures, tmp_path / "rest", **resume))
    rest = read(tmp_path / "rest" / "seen", "train")
    assert seen[:done] + rest == whole, f"killed before batch {kill_at}"
    for epoch in range(EPOCHS):
        labels = sorted(label for at, labels, _ in seen[:done] + rest for label in labels if at == epoch)
        assert labels == [0] * 8 + [1] * 8 + [2] * 8
    ours, theirs = (checkpoint(tmp_path / name)["state_dict"] for name in ("rest", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs), f"killed before batch {kill_at}"


@pytest.mark.long
@pytest.mark.parametrize("backend", FFCV_FIRST)
def test_two_ranks_killed_and_resumed(backend, pictures, tmp_path) -> None:
    """Started by torchrun over gloo. Validation counts each image once, and both ranks end with the same weights."""
    spread = {"trainer.strategy": "ddp", "trainer.devices": 2}
    kill_at = int(np.random.default_rng().integers(3, 5))
    killed = start(tmp_path, arguments(backend, pictures, tmp_path / "cut", kill_at, **spread), 2)
    assert killed.returncode != 0 and "Signal 9 (SIGKILL)" in killed.stderr, killed.stderr
    done = checkpoint(tmp_path / "cut")["global_step"]
    assert done == kill_at // 2 * 2
    spread["ckpt_path"] = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    resumed = start(tmp_path, arguments(backend, pictures, tmp_path / "rest", **spread), 2)
    assert resumed.returncode == 0, resumed.stderr
    train, val = (labels_of(pictures, split) for split in ("train", "val"))
    for rank in range(2):
        seen = read(tmp_path / "cut" / "seen", "train", rank)[:done] + read(tmp_path / "rest" / "seen", "train", rank)
        plan = BatchPlan(len(train), BATCH, training=True, rank=rank, world_size=2)
        expected = [[epoch, [train[i] for i in batch]] for epoch in range(EPOCHS) for batch in plan.batches(epoch)]
        assert [batch[:2] for batch in seen] == expected, f"rank {rank}, killed before batch {kill_at}"
    first, second = (read(tmp_path / "rest" / "seen", "val", rank) for rank in range(2))
    for epoch in range(done // 3, EPOCHS):
        shown = sorted(label for at, labels, _ in first + second for label in labels if at == epoch)
        assert shown == sorted(val)


@pytest.mark.long
def test_told_to_stop_it_says_so_to_its_caller(pictures, tmp_path) -> None:
    """SIGTERM, as schedulers send it: 143, where Lightning 2.6.6 ends with 0 as if all were done."""
    stopped = start(tmp_path, arguments("FolderDataModule", pictures, tmp_path, 3, "SIGTERM"), 1)
    assert stopped.returncode == 143 and "Traceback" not in stopped.stderr, stopped.stderr
    assert checkpoint(tmp_path)["global_step"] >= 2
