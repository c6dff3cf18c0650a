"""Image data: prepare it, verify it, look at it, and load it through FFCV (fast) or plain image folders (portable).
And text, for language models.

Reading order: `batches.py` (which images make which batch), `loader.py` (epochs and resuming), then the two backends,
`folder_loader.py` and `ffcv_loader.py`. Of text: `text_files.py` (what lies where), `text_streams.py` (which words make
which batch), `text.py`. Importing this package loads neither ffcv nor scikit-learn.
"""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .base import ImageDataModule
    from .datamodules import FFCVDataModule, FolderDataModule
    from .idx import prepare_idx
    from .imagenet import prepare_imagenet
    from .info import sample
    from .photos import prepare_photos
    from .prepare import prepare_digits, prepare_folder
    from .resizing import ProgressiveResize
    from .text import TextBatch, TextDataModule
    from .text_prepare import prepare_text

__all__ = [
    "FFCVDataModule",
    "FolderDataModule",
    "ImageDataModule",
    "ProgressiveResize",
    "TextBatch",
    "TextDataModule",
    "prepare_digits",
    "prepare_folder",
    "prepare_idx",
    "prepare_imagenet",
    "prepare_photos",
    "prepare_text",
    "sample",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "datamodules": ("FFCVDataModule", "FolderDataModule", "ImageDataModule"),
        "idx": ("prepare_idx",),
        "imagenet": ("prepare_imagenet",),
        "info": ("sample",),
        "photos": ("prepare_photos",),
        "prepare": ("prepare_digits", "prepare_folder"),
        "resizing": ("ProgressiveResize",),
        "text": ("TextBatch", "TextDataModule"),
        "text_prepare": ("prepare_text",),
    },
)
