"""Fixtures of the whole suite: a fixed seed, and small prepared datasets made once a session."""

import os
from pathlib import Path

import pytest
import torch
from dataset_helpers import draw_pictures

from vmoe_momentum.datasets import prepare_digits, prepare_folder


def pytest_configure(config) -> None:
    """Tests run in several processes: each takes its share of the cores."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if processes > 1:
        threads = max(1, (os.cpu_count() or 1) // processes)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of the processes that tests start


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


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
