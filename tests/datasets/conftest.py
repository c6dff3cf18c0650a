"""Each backend in turn."""

import pytest
from dataset_helpers import requires_ffcv

from vmoe_momentum.datasets import FFCVDataModule, FolderDataModule

BACKENDS = [pytest.param(FFCVDataModule, id="ffcv", marks=requires_ffcv), pytest.param(FolderDataModule, id="folder")]


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each data module class in turn."""
    return request.param
