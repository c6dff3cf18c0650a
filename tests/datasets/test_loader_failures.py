"""Loaders that are stopped, fail or share the process: an error within seconds, and nothing left behind."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from dataset_helpers import decoding_threads, module, requires_ffcv

from vmoe_momentum.datasets import FFCVDataModule, FolderDataModule
from vmoe_momentum.datasets.beton import check_beton


@requires_ffcv
@pytest.mark.parametrize("os_cache", [True, False])
def test_early_stops_leave_no_thread(digits, os_cache):
    loader = module(FFCVDataModule, digits, os_cache=os_cache).train_dataloader()
    for taken in (1, 2, 20):
        assert len(list(itertools.islice(loader, taken))) == taken
    assert decoding_threads() == []


@requires_ffcv
def test_an_exception_while_decoding_reaches_the_consumer(digits):
    loader = module(FFCVDataModule, digits).train_dataloader()
    stages, outputs = loader.ffcv.code
    calls = itertools.count()

    def breaks(**values):
        if next(calls) == 2:
            raise ZeroDivisionError("the third batch is cursed")
        return stages[0][0](**values)

    loader.ffcv.code = ([(breaks, stages[0][1]), *stages[1:]], outputs)
    start, taken = time.monotonic(), 0
    with pytest.raises(RuntimeError, match="the third batch is cursed") as error:
        for _ in loader:
            taken += 1
    assert taken == 2 and time.monotonic() - start < 20
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    assert decoding_threads() == []


@requires_ffcv
def test_a_thread_that_dies_silently_is_noticed(digits, monkeypatch):
    from vmoe_momentum.datasets import ffcv_loader

    monkeypatch.setattr(ffcv_loader._DecodeThread, "run", lambda self: None)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="died without an exception"):
        next(iter(module(FFCVDataModule, digits).train_dataloader()))
    assert time.monotonic() - start < 20


@requires_ffcv
def test_a_damaged_jpeg_stops_the_run_instead_of_showing_stale_pixels(pictures, tmp_path):
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    beton = check_beton(root / "val.beton", 3)
    index = int(np.flatnonzero(beton.records["image"]["mode"] == 0)[0])
    data = module(FFCVDataModule, root, "test")  # which would refuse it afterwards
    with open(beton.path, "r+b") as file:
        file.seek(int(beton.records["image"]["data_ptr"][index]))
        file.write(bytes(int(beton.sizes[index])))
    with pytest.raises(RuntimeError, match=rf"val\.beton.*images \[{index}\] do not decode.*data verify"):
        list(data.val_dataloader())


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_broken_image_file_is_named(pictures, tmp_path, num_workers):
    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    victims = [sorted((root / "val" / name).iterdir())[0] for name in ("cat", "ant")]
    for victim in victims:
        victim.write_bytes(bytes(victim.stat().st_size))
    with pytest.raises(ValueError, match=rf"{victims[1]}: not a readable image"):
        list(module(FolderDataModule, root, "test", num_workers=num_workers).val_dataloader())


@pytest.mark.long
@requires_ffcv
def test_training_and_validation_decode_at_once(digits):
    data = module(FFCVDataModule, digits, eval_batch_size=32)
    pairs = zip(data.train_dataloader(), data.val_dataloader(), strict=False)
    assert sum(len(train[1]) + len(val[1]) for train, val in itertools.islice(pairs, 10)) == 10 * (64 + 32)


@requires_ffcv
def test_an_unsafe_numba_layer_is_refused(digits, monkeypatch):
    import numba

    data = module(FFCVDataModule, digits)
    monkeypatch.setattr(numba, "threading_layer", lambda: "workqueue")
    with pytest.raises(ValueError, match=r"NUMBA_THREADING_LAYER=.*'workqueue'.*pip install tbb"):
        data.train_dataloader()


@requires_ffcv
def test_torch_keeps_its_threads_and_too_many_workers_are_clamped(digits):
    import numba

    before = torch.get_num_threads()
    loader = module(FFCVDataModule, digits, num_workers=64).train_dataloader()
    next(iter(loader))
    assert loader.ffcv.num_workers == min(64, numba.config.NUMBA_NUM_THREADS)
    assert torch.get_num_threads() == before


@pytest.mark.long
@requires_ffcv
def test_an_iterator_left_open_does_not_abort_the_interpreter(digits):
    code = (
        "import sys; from vmoe_momentum.datasets import FFCVDataModule as Data;"
        "data = Data(sys.argv[1], image_size=16, batch_size=64, num_workers=2); data.setup();"
        "left = [iter(data.train_dataloader()), iter(data.val_dataloader())]; print(len([next(one) for one in left]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(digits)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "2"), done.stderr
