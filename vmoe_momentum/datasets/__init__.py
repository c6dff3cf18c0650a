"""Image data: prepare it, verify it, and load it through FFCV (fast) or plain image folders (portable).

Reading order: `batches.py` (which images make which batch), `loader.py` (epochs and resuming), then the two backends,
`folder_loader.py` and `ffcv_loader.py`. Importing this package loads neither ffcv nor scikit-learn.
"""

from vmoe_momentum.datasets.base import ImageDataModule
from vmoe_momentum.datasets.datamodules import FFCVDataModule, FolderDataModule
from vmoe_momentum.datasets.prepare import prepare_digits, prepare_folder
from vmoe_momentum.datasets.verify import verify

__all__ = ["FFCVDataModule", "FolderDataModule", "ImageDataModule", "prepare_digits", "prepare_folder", "verify"]
