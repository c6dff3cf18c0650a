"""Text for language models: parallel streams of a prepared text (text_files.py), in blocks. Imports nothing of images.

Training reads streams from a new offset each epoch; evaluation reads every token once. See text_streams.py.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from ..ranges import COUNT, SEED, Range, in_range
from .resuming import ResumingDataModule, rank_and_world_size, shuffles
from .text_files import TEXT_SPLITS, UNK, check_sizes, open_ids, read_facts, read_vocabulary
from .text_streams import TextBatch, TextLoader, TextPlan, swap_words

__all__ = ["TextBatch", "TextDataModule"]
_STAGES: dict[str | None, tuple[str, ...]] = {
    "fit": ("train", "valid"),
    "validate": ("valid",),
    "test": ("test",),
    "predict": ("test",),
}


@in_range(
    "data.",
    block_size=Range(1, 65536, whole=True),
    batch_size=COUNT,
    eval_batch_size=COUNT.or_(None),
    seed=SEED,
    word_swap=Range(0, 1, below=True),
)
class TextDataModule(ResumingDataModule):
    """Blocks of a prepared text, as `TextBatch`es; fit and validate evaluate on valid, test and predict on test.

    `vocab_size`, `vocabulary` and `count` are there as soon as it is built. The first word's past is `<eos>`.

    Args:
        root: Prepared text: a folder with text.json, vocabulary.txt, train.bin, valid.bin and test.bin.
        block_size: Tokens of each stream that a step reads, 1 to 65536.
        batch_size: Streams of the training text per device, 1 to 1e9, read side by side.
        eval_batch_size: Streams of the text in evaluation, 1 to 1e9, over all devices together, so that what is read
            does not depend on their number; null: as batch_size.
        seed: Seed of the offsets in training, and of the word swap, 0 to 4294967295.
        word_swap: Share of the words of the evaluated text, in [0, 1), that become word_swap_token, both as inputs
            and as targets; `<eos>` and `<unk>` stay. The targets before it are the batches' clean_targets.
        word_swap_token: The word; `<unk>` where the vocabulary lacks it.

    Raises:
        FileNotFoundError: `root` is missing, or no prepared text.
        ValueError: It holds pictures, its text.json is damaged, or a setting is out of range.
    """

    def __init__(
        self,
        root: str = "data/text",
        block_size: int = 256,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        seed: int = 0,
        word_swap: float = 0.0,
        word_swap_token: str = "AAA",
    ) -> None:
        super().__init__()
        self.root = Path(root)
        self.facts = read_facts(self.root)
        self.block_size, self.batch_size, self.seed = block_size, batch_size, seed
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.word_swap, self.word_swap_token = word_swap, word_swap_token
        self._swap_id = self._find_swap_id() if word_swap else None

    @property
    def vocab_size(self) -> int:
        """V, all ids are below it."""
        return self.facts.vocab_size

    @cached_property
    def vocabulary(self) -> list[str]:
        """V words in the order of their ids, read at the first use."""
        check_sizes(self.facts, ())
        return read_vocabulary(self.facts)

    def count(self, split: str) -> int:
        """Tokens of train, valid or test."""
        return self.facts.tokens[split]

    def words(self, split: str) -> np.ndarray:
        """Ids of train, valid or test, int32 [tokens], mapped. Raises as `setup`."""
        check_sizes(self.facts, (split,))
        return open_ids(self.facts, split)

    def setup(self, stage: str | None = None) -> None:
        """Checks sizes of the files that `stage` reads, before anything is trained; `data verify` checks contents.

        Raises FileNotFoundError for a missing file, ValueError for one of another size.
        """
        check_sizes(self.facts, _STAGES.get(stage, TEXT_SPLITS))
        if stage in ("fit", None):
            rank_zero_info(f"{self.root}: checked sizes of its files; `vmoe-momentum data verify` checks contents")

    def train_dataloader(self) -> TextLoader:
        """Full blocks. Raises ValueError for a text shorter than one block of each stream."""
        plan = self._plan("train", self.batch_size, training=True, reshuffle=shuffles(self.trainer))
        return self.keep_position(TextLoader(plan, open_ids(self.facts, "train"), self.facts.eos))

    def val_dataloader(self) -> TextLoader:
        """Each token of valid once, over all devices."""
        return self._evaluated("valid")

    def test_dataloader(self) -> TextLoader:
        """Each token of test once, over all devices."""
        return self._evaluated("test")

    def predict_dataloader(self) -> TextLoader:
        """As in test."""
        return self._evaluated("test")

    def _evaluated(self, split: str) -> TextLoader:
        plan, ids = self._plan(split, self.eval_batch_size, training=False), open_ids(self.facts, split)
        if self._swap_id is None:
            return TextLoader(plan, ids, self.facts.eos)
        spared = [word for word in (self.facts.eos, self.facts.unk) if word is not None]
        # its last number is not 0, which numpy would drop: training's seeds are [seed, epoch]
        seed = [self.seed, TEXT_SPLITS.index(split), 1]
        swapped = swap_words(ids, self.word_swap, self._swap_id, spared, seed)
        return TextLoader(plan, swapped, self.facts.eos, clean=ids)

    def _plan(self, split: str, batch_size: int, **how: bool) -> TextPlan:
        rank, world_size = rank_and_world_size(self.trainer)
        shared: dict[str, Any] = {"seed": self.seed, "rank": rank, "world_size": world_size}
        return TextPlan(self.count(split), batch_size, self.block_size, **shared, **how)

    def _find_swap_id(self) -> int:
        """Raises ValueError: the vocabulary has neither the word nor `<unk>`."""
        if self.word_swap_token in self.vocabulary:
            return self.vocabulary.index(self.word_swap_token)
        if self.facts.unk is not None:
            return self.facts.unk
        raise ValueError(
            f"data.word_swap_token={self.word_swap_token}: the vocabulary of {self.root} has neither it nor {UNK};"
            " choose a word of it, or prepare the text with --min_count 2"
        )
