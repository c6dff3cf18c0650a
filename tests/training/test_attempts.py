"""Which checkpoint a job that is started again goes on from."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from vmoe_momentum.models.sharded import write_sharded
from vmoe_momentum.training import JobCheckpoints
from vmoe_momentum.training.attempts import newest_of_job
from vmoe_momentum.training.resuming import AtomicCheckpointIO

ARGV = ["fit", "--config=x"]


def write_whole(checkpoint: dict, path: Path) -> None:
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)


def save(folder, name: str, step: int, write=write_whole, **parts: object):
    facts = {"architecture": "x", "settings": {}, "num_classes": 2, "image_size": 8, "mean": [0.0], "std": [1.0]}
    whole = {"vmoe_momentum": facts, "state_dict": {"w": torch.ones(1000)}, "epoch": 0, "global_step": step}
    write({**whole, "optimizer_states": [{"state": {}}], **parts}, folder / name)
    os.utime(folder / name, (step, step))
    return folder / name


@pytest.fixture
def job(tmp_path, monkeypatch):
    """The second attempt of a job of torchrun's."""
    known = {"MAX_RESTARTS": "3", "RESTART_COUNT": "1", "RUN_ID": "a/b"}
    for name, value in known.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    note = {"argv": ARGV, "folders": [str(tmp_path / "version_0"), str(tmp_path / "gone")]}
    (tmp_path / ".torchrun_a_b.attempts.json").write_text(json.dumps(note))
    return SimpleNamespace(default_root_dir=str(tmp_path))


def test_the_newest_whole_checkpoint_of_the_same_run_is_taken(job, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "version_0"
    assert newest_of_job(job, ARGV) is None  # nothing was saved
    older = save(folder, "best.ckpt", 2)
    assert newest_of_job(job, ARGV) == str(older)
    newer = save(folder, "stopped.ckpt", 4)
    save(folder, "weights.ckpt", 6, optimizer_states=[])  # nothing to go on from
    assert newest_of_job(job, ARGV) == str(newer)
    content = bytearray(newer.read_bytes())
    content[len(content) // 2] ^= 1
    newer.write_bytes(content)
    with pytest.warns(UserWarning, match="stopped.ckpt is damaged.*an older one is tried"):
        assert newest_of_job(job, ARGV) == str(older)
    assert newest_of_job(job, [*ARGV, "--seed_everything=1"]) is None  # another run of the same job
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert newest_of_job(job, ARGV) is None  # the first attempt of a job that has its name by chance


def test_who_is_not_started_again_looks_for_nothing(job, monkeypatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert newest_of_job(job, ARGV) is None


@pytest.mark.parametrize("write", [write_whole, write_sharded])
def test_what_was_saved_at_slurms_warning_is_found(write, tmp_path, monkeypatch) -> None:
    """File or folder, by Lightning's own way to it, too."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    trainer = SimpleNamespace(default_root_dir=str(tmp_path))
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        saved = save(tmp_path, "slurm_77.ckpt", 3, write)
    finally:
        dist.destroy_process_group()
    assert newest_of_job(trainer, ARGV) == str(saved)
    assert JobCheckpoints(trainer, ARGV)._hpc_resume_path == str(saved)
