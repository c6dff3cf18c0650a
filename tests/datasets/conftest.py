"""Small prepared datasets, shared by the whole session, and each backend in turn."""

from __future__ import annotations

from pathlib import Path

import pytest
from dataset_helpers import draw_pictures, requires_ffcv

from vmoe_momentum.datasets import FFCVDataModule, FolderDataModule, prepare_digits, prepare_folder

BACKENDS = [pytest.param(FFCVDataModule, id="ffcv", marks=requires_ffcv), pytest.param(FolderDataModule, id="folder")]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each data module class in turn."""
    return request.param


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    """The digits, 16 px: 1,437 training and 360 validation images."""
    return prepare_digits(str(tmp_path_factory.mktemp("digits") / "digits")).root


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Smooth colour JPEGs of many sizes in three classes, 24 training and 9 validation images."""
    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder / "source", per_class=11)
    return prepare_folder(str(folder / "source"), str(folder / "out"), val_fraction=9 / 33, num_workers=2).root
