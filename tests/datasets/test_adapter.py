"""The loaders inside Lightning: epochs, early stops, resuming."""

from __future__ import annotations

import itertools
import multiprocessing
import time

import pytest
import torch
from dataset_helpers import decoding_threads, module
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from vmoe_momentum.datasets import FFCVDataModule, FolderDataModule


class Recorder(LightningModule):
    """Learns nothing and remembers what it was shown."""

    def __init__(self, early_length: bool = False) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.early_length = early_length
        self.seen: list[tuple] = []
        self.threads = 0

    def training_step(self, batch, _):
        images, _ = batch
        self.seen.append(fingerprint(batch))
        return self.layer(images.float().mean().view(1, 1)).sum()

    def validation_step(self, batch, _):
        self.threads = max(self.threads, len(decoding_threads()))

    def configure_optimizers(self):
        if self.early_length:
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fingerprint(batch) -> tuple:
    """Labels and the sum of the pixels of each image."""
    images, labels = batch
    return labels.tolist(), images.long().sum((1, 2, 3)).tolist()


def fit(data, tmp_path, ckpt_path=None, callbacks=(), early_length=False, **settings) -> Recorder:
    model = Recorder(early_length)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(**options, default_root_dir=tmp_path, callbacks=list(callbacks), **settings).fit(
        model, datamodule=data, ckpt_path=ckpt_path
    )
    return model


def planned(data, epochs: int, batches: int) -> list[tuple]:
    """What the first `batches` of each epoch show, straight from the loader."""
    loader = module(type(data), data.root, batch_size=4).train_dataloader()
    shown = []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        shown += [fingerprint(batch) for batch in itertools.islice(loader, batches)]
    return shown


def test_fit_sees_epochs_0_1_2_and_leaves_nothing_running(backend, pictures, tmp_path):
    data = module(backend, pictures, batch_size=4)
    expected = planned(data, epochs=3, batches=3)
    model = fit(data, tmp_path, max_epochs=3, limit_train_batches=3, limit_val_batches=2, enable_checkpointing=False)
    assert model.seen == expected and len(expected) == 9
    if backend is FFCVDataModule:
        assert model.threads == 2  # training keeps decoding during validation
    assert decoding_threads() == []
    deadline = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert multiprocessing.active_children() == []


def test_overfit_batches_repeats_the_same_images(backend, pictures, tmp_path):
    data = module(backend, pictures, batch_size=4)
    seen = fit(data, tmp_path, max_epochs=2, overfit_batches=2, enable_checkpointing=False).seen
    labels = [labels for labels, _ in seen]
    assert len(labels) == 4 and labels[:2] == labels[2:]
    assert seen[:2] != seen[2:]  # augmented anew


@pytest.mark.parametrize("early_length", [False, True], ids=["", "length read early"])
def test_lightning_resumes_inside_an_epoch(backend, pictures, tmp_path, early_length):
    settings = {"max_epochs": 2, "limit_val_batches": 0, "early_length": early_length}
    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=8, save_top_k=-1)
    whole = fit(module(backend, pictures, batch_size=4), tmp_path, callbacks=[saver], **settings)
    assert len(whole.seen) == 12
    rest = fit(
        module(backend, pictures, batch_size=4),
        tmp_path,
        tmp_path / "step=8.ckpt",
        **settings,
        enable_checkpointing=False,
    )
    assert rest.seen == whole.seen[8:]


def test_resuming_continues_the_interrupted_order_pixel_by_pixel(backend, pictures):
    loader = module(backend, pictures, batch_size=4).train_dataloader()
    loader.set_epoch(1)
    whole = list(loader)
    iterator = iter(loader)
    for _ in range(4):
        next(iterator)
    state = loader.state_dict()
    iterator.close()
    assert (state["epoch"], state["batch"]) == (1, 4)

    resumed = module(backend, pictures, batch_size=4).train_dataloader()
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    iter(resumed)  # as Lightning does, and throws it away
    resumed.set_epoch(1)
    rest = list(resumed)
    assert len(rest) == len(whole) - 4
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(rest, whole[4:], strict=True))
    resumed.set_epoch(2)
    assert len(list(itertools.islice(resumed, 3))) == 3 and resumed.state_dict()["batch"] == 3


def test_a_position_inside_an_epoch_of_another_order_is_refused(digits):
    state = {**module(FolderDataModule, digits).train_dataloader().state_dict(), "batch": 4}
    for setting, change in (("data.batch_size=32", {"batch_size": 32}), ("data.seed=1", {"seed": 1})):
        with pytest.raises(ValueError, match=f"{setting}: the checkpoint was saved inside an epoch"):
            loader = module(FolderDataModule, digits, **change).train_dataloader()
            loader.load_state_dict(state)
            next(iter(loader))
    elsewhere = {**state, "devices": 2, "data.batch_size": 32}  # as many images a step: they are the same ones
    loader = module(FolderDataModule, digits, batch_size=64).train_dataloader()
    loader.load_state_dict(elsewhere)
    assert len(list(loader)) == len(loader) - 4
    loader = module(FolderDataModule, digits, batch_size=32).train_dataloader()
    loader.load_state_dict(elsewhere)
    assert list(loader) == []  # the next epoch comes
    finished = {**state, "batch": state["batches"]}
    loader = module(FolderDataModule, digits, batch_size=32).train_dataloader()
    loader.load_state_dict(finished)  # between epochs any order may follow
    assert len(list(itertools.islice(loader, 2))) == 2


def test_an_iterator_starts_nothing_until_its_first_batch(digits, backend):
    loader = module(backend, digits).train_dataloader()
    iterator = iter(loader)
    assert decoding_threads() == []
    loader.set_epoch(2)
    next(iterator)
    assert loader.state_dict()["epoch"] == 2
    iterator.close()
    assert decoding_threads() == []
