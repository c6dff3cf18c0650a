"""A full disk and full memory, met by everything that fit writes and does: one line with the file or the setting."""

import errno
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from cli_helpers import fails

from vmoe_momentum import cli
from vmoe_momentum.datasets import FolderDataModule
from vmoe_momentum.resources import explain
from vmoe_momentum.training import AtomicCheckpointIO, ImageClassifier, PredictionWriter

CONFIG = Path(__file__).parent.parent.parent / "configs" / "digits.yaml"


def arguments(root: Path, command: str = "fit", *extra: str) -> list[str]:
    short = ["--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
    quiet = ["--model.schedule.warmup_steps=1", "--data.num_workers=0", "--trainer.log_every_n_steps=1"]
    return [command, f"--config={CONFIG}", "--data=FolderDataModule", f"--data.root={root}", *short, *quiet, *extra]


@contextmanager
def growing_disk() -> Iterator[Callable[[int], None]]:
    """Gives a function after which no file of this process grows beyond so many bytes: `write` fails with EFBIG."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


WRITERS = {  # the file, the class whose writing meets the full disk first, bytes until then
    "checkpoint": ("last.ckpt", 300_000, []),
    "metrics": ("metrics.csv", 0, ["lightning.fabric.loggers.csv_logs", "_ExperimentWriter", "log_metrics"]),
    "config": ("config.yaml", 0, ["lightning.pytorch.cli", "SaveConfigCallback", "setup"]),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_when_fit_writes(name, digits, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    file, size, where = WRITERS[name]
    with growing_disk() as grow:
        if where:
            module, kind, method = where
            target = getattr(__import__(module, fromlist=[kind]), kind)
            write = getattr(target, method)
            monkeypatch.setattr(target, method, lambda *a, **k: grow(size) or write(*a, **k))
        else:
            grow(size)
        line = fails(arguments(digits), capsys)
    assert file in line and "bytes free" in line and "kept" in line, line
    assert "needed" in line or where


def test_predictions_on_a_full_disk(digits, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with growing_disk() as grow:
        write = PredictionWriter.write_on_epoch_end
        monkeypatch.setattr(PredictionWriter, "write_on_epoch_end", lambda *a: grow(2_000) or write(*a))
        line = fails(arguments(digits, "predict", "--trainer.logger=false"), capsys)
    assert "predictions.csv" in line and "bytes free" in line
    assert not list(tmp_path.rglob("*predictions.csv*"))


def test_the_checkpoint_that_was_there_stays(tmp_path) -> None:
    io, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)
    big = torch.ones(100_000)
    with (
        growing_disk() as grow,
        pytest.raises(OSError, match=r"about 400,000 bytes needed, [\d,]+ bytes free") as error,
    ):
        grow(100_000)
        io.save_checkpoint({"step": 2, "tensor": big, "again": [big, big[5:]]}, path)
    assert str(path) in str(error.value)
    assert io.load_checkpoint(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


MEMORY = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
    "cpu": RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried to allocate 77 bytes."),
    "python": MemoryError(),
    "fork": OSError(errno.ENOMEM, "Cannot allocate memory"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MEMORY)
@pytest.mark.parametrize("command", ["fit", pytest.param("validate", marks=pytest.mark.long)])
def test_out_of_memory_names_what_to_lower(kind, command, digits, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)

    def fail(*_: object) -> None:
        raise MEMORY[kind]

    monkeypatch.setattr(ImageClassifier, "training_step" if command == "fit" else "validation_step", fail)
    line = fails(arguments(digits, command), capsys)
    setting = "data.batch_size=32" if command == "fit" else "data.eval_batch_size=120"
    assert "out of memory" in line and f"{setting} at data.image_size=16" in line and "lower it" in line


@pytest.mark.parametrize("kind", MEMORY)
def test_out_of_memory_of_other_commands(kind, monkeypatch, capsys) -> None:
    def fail(*_: object) -> None:
        raise MEMORY[kind]

    monkeypatch.setitem(cli.COMMANDS, "robustness", fail)
    assert "out of memory" in fails(["robustness"], capsys)
    assert explain(ValueError("memory"), "") is None and explain(OSError(errno.EACCES, "denied"), "") is None


def test_memory_that_no_machine_has_is_recognised() -> None:
    """What torch says on a processor, asked for real."""
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**58, dtype=torch.uint8)
    assert "out of memory (asked for" in explain(error.value, "lower it")


@pytest.mark.parametrize("length", [75, 76])
def test_a_folder_for_sockets_that_is_too_long_is_refused(length: int, pictures, monkeypatch, tmp_path) -> None:
    """Workers' pictures never come then, and Python says so in none of the main process's threads."""
    folder = Path("/tmp/" + "x" * (length - 5))
    folder.mkdir()
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        data = FolderDataModule(str(pictures), image_size=16, batch_size=8, num_workers=1)
        data.setup("fit")
        if length > 75:
            with pytest.raises(
                ValueError, match=r"TMPDIR=/tmp/xx.*: 76 characters .* 75 at most; .*data.num_workers=0"
            ):
                data.train_dataloader()
        else:
            assert len(next(iter(data.train_dataloader()))[0]) == 8
    finally:
        shutil.rmtree(folder)
