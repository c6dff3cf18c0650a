"""Fixtures of the whole suite: a fixed seed, and small prepared datasets made once a session."""

from pathlib import Path

import pytest
import torch
from dataset_helpers import draw_pictures

from vmoe_momentum.datasets import prepare_digits, prepare_folder


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


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
