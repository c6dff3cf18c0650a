"""What `fit` trains: pictures are classified, or text is read. The data module of a config says which."""

from collections.abc import Callable
from typing import Any, NamedTuple

from . import datasets, models, moe, momentum  # noqa: F401  (their classes resolve by bare name)
from .configs import as_configs
from .training import ImageClassifier, PredictionWriter
from .training.trained import Trained


class Kind(NamedTuple):
    """One of them."""

    module: type[Trained]
    data: type[Any]  # base of its data modules
    linked: tuple[str, ...]  # attributes of the data that are arguments of the module
    writer: type[Any]  # of what `predict` finds
    check: Callable[[Any], None] = lambda trainer: None  # raises ValueError: a trainer's part that is not for it


IMAGES = Kind(ImageClassifier, datasets.ImageDataModule, ("num_classes", "image_size", "class_names"), PredictionWriter)


def text() -> Kind:
    """Imported where it is wanted: pictures need none of it."""
    from .language import LanguageModule
    from .language.accepted import check_trainer
    from .language.predicting import TextPredictionWriter

    linked = ("vocab_size", "vocabulary")
    return Kind(LanguageModule, datasets.TextDataModule, linked, TextPredictionWriter, check_trainer)


def kind_of(argv: list[str]) -> Kind:
    """By the class of the data that configs and options name; pictures where they name none.

    Raises ValueError: a config that cannot be read, or data of both kinds.
    """
    sections = [config.get("data") for config in as_configs(argv)]
    found = [data.get("class_path") if isinstance(data, dict) else data for data in sections]
    names = [name.rpartition(".")[2] for name in found if isinstance(name, str)]
    own = datasets.TextDataModule.__name__
    if own in names and set(names) != {own}:
        other = next(name for name in names if name != own)
        raise ValueError(f"data={names[-1]}: one config has {own}, another {other}; use configs of one kind of data")
    return text() if own in names else IMAGES
