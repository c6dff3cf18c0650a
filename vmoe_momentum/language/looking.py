"""Trained language models as `analyze` looks at them: whole blocks of text, with nothing before them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.pixels import Wrapped
from ..models.saved import KEY, RAW, Saved, completed_settings, read_checkpoint
from ..models.sharded import is_checkpoint
from .module import vocabulary_hash
from .network import SparseLanguageModel


class Reader(Wrapped):
    """Words [B, N] -> log-probabilities [B, N, V]."""

    net: SparseLanguageModel

    def __init__(self, net: SparseLanguageModel) -> None:
        super().__init__()
        self.net = net

    def forward(self, words: Tensor) -> Tensor:
        return self.net(words)


class SavedLanguageModel(Saved):
    def build(self, raw: bool = False) -> Reader:
        model = Reader(rebuild(self.facts))
        self.load_into(model, raw)
        return model.eval()


def rebuild(facts: dict[str, Any]) -> SparseLanguageModel:
    """The network that `facts` describe, freshly initialised."""
    settings = facts["settings"]
    given = {"rule": settings["rule"], "router": settings["router"]}
    return SparseLanguageModel(facts["vocab_size"], **facts["model_args"], **given)


def open_language_model(source: str) -> SavedLanguageModel:
    """A `.ckpt` that fit wrote of a language model. Raises FileNotFoundError, ValueError: none."""
    path = Path(source)
    if not is_checkpoint(path):
        raise FileNotFoundError(f"{source}: no such file; give a .ckpt that fit wrote")
    checkpoint = read_checkpoint(path)
    facts = {**checkpoint[KEY], "settings": completed_settings(checkpoint[KEY]["settings"])}
    if "vocab_size" not in facts:
        raise ValueError(f"{source}: holds an image classifier, and --data is a text; give a language model")
    averaged = RAW in checkpoint and int(checkpoint.get("averaging_state", {}).get("n_averaged", 1)) > 0
    return SavedLanguageModel(source, facts, checkpoint["epoch"] + 1, checkpoint["global_step"], averaged)


def check_words(saved: Saved, data: Any) -> None:
    """Raises ValueError: trained on other words than the data's."""
    if saved.facts["vocabulary"] not in (None, vocabulary_hash(data.vocabulary)):
        raise ValueError(
            f"--data: {saved.source} was trained on other words, {saved.facts['vocab_size']:,} of them, than these "
            f"{data.vocab_size:,}; give the folder it was trained on"
        )


def blocks_of(data: Any, count: int) -> list[Tensor]:
    """The validation text in blocks of data.block_size words, at most `count` of them, evenly over the text."""
    words = torch.from_numpy(data.words("valid").astype("int64"))
    number = len(words) // data.block_size
    if not number:
        raise ValueError(f"data.block_size={data.block_size}: the validation text has {len(words)} words; use fewer")
    blocks = words[: number * data.block_size].reshape(number, data.block_size)
    picked = torch.arange(min(count, number)) * number // min(count, number)
    return list(blocks[picked].split(max(1, data.batch_size)))
