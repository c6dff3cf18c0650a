"""Shared fixtures. Tests run on the CPU with two threads and a fixed seed."""

import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)
