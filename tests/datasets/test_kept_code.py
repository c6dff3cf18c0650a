"""Compiled decoders are kept on disk where that is possible, and work where it is not."""

import errno

import pytest

pytest.importorskip("ffcv")


def plus(x):
    return x + 1


def test_no_place_to_keep_it(monkeypatch) -> None:
    from numba.core import caching

    from vmoe_momentum.datasets.ffcv_decoder import _kept

    monkeypatch.setattr(caching.CompileResultCacheImpl, "_locator_classes", [])
    function = _kept()(plus)
    assert function(2) == 3
    assert not function.stats.cache_path


def test_a_full_disk(monkeypatch) -> None:
    from numba.core import caching

    from vmoe_momentum.datasets.ffcv_decoder import _kept

    def full(*_) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(caching.IndexDataCacheFile, "save", full)
    assert _kept()(plus)(2) == 3
