"""What `fit` trains: pictures are classified, or text is read. The data module of a config says which."""

import functools
from typing import Any, NamedTuple

from . import datasets, models, moe, momentum  # noqa: F401  (their classes resolve by bare name)
from .configs import as_configs, merge
from .language import LanguageModule
from .language.predicting import TextPredictionWriter
from .training import ImageClassifier, PredictionWriter
from .training.trained import Trained


class Kind(NamedTuple):
    """One of them."""

    module: type[Trained]
    data: type[Any]  # base of its data modules
    linked: tuple[str, ...]  # attributes of the data that are arguments of the module
    writer: type[Any]  # of what `predict` finds


IMAGES = Kind(ImageClassifier, datasets.ImageDataModule, ("num_classes", "image_size", "class_names"), PredictionWriter)
TEXT = Kind(LanguageModule, datasets.TextDataModule, ("vocab_size", "vocabulary"), TextPredictionWriter)


def kind_of(argv: list[str]) -> Kind:
    """By the class of the data that options and configs name, last; pictures where they name none.

    Raises ValueError: a config that cannot be read.
    """
    data = functools.reduce(merge, as_configs(argv), {}).get("data")
    name = data if isinstance(data, str) else data.get("class_path") if isinstance(data, dict) else None
    return TEXT if str(name).rpartition(".")[2] == datasets.TextDataModule.__name__ else IMAGES
