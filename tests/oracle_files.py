"""Reading the reference vectors of tests/oracles."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "oracles"


class Oracle:
    """One .npz; `oracle["case/array"]` is a tensor, `oracle.meta` its JSON."""

    def __init__(self, name: str) -> None:
        self.arrays = np.load(FOLDER / name)
        self.meta = json.loads(str(self.arrays["meta_json"]))

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name]))


def assert_gradient(actual: Tensor, expected: Tensor) -> None:
    """Within 1e-4 of the expected array's Euclidean norm, coordinate by coordinate."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-4 * expected.norm()
