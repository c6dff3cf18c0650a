"""Which words of a text make which batch: a pure function of (seed, epoch, rank).

Axes: B streams, N tokens of a block. Streams are equal pieces of the text, read side by side, block after block, so
that row k of a batch goes on where row k of the batch before it ended.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

import numpy as np
import torch

from .loader import EpochLoader

IGNORED = -100  # the target of padding, torch's ignore_index
_CHUNK = 1 << 20  # words attacked at once


class TextBatch(NamedTuple):
    """words, targets: int64 [B, N], the words and those that follow each; begins: no stream has a past yet.

    Padding has word 0 and target -100. clean_targets: int64 [B, N], the targets before a word swap; None without one.
    """

    words: torch.Tensor
    targets: torch.Tensor
    begins: bool
    clean_targets: torch.Tensor | None = None


class TextPlan:
    """The blocks of one process, as places in the text.

    In training the text is read from an offset in [0, block_size) on, which is drawn by (seed, epoch), in
    batch_size * world_size streams; each epoch reads the same number of full blocks, as many as the largest offset
    leaves, and not what is left over. In evaluation every place is read once, in `batch_size` streams over all
    processes, the last ones shorter or empty, and the last block may be shorter than block_size.

    Args:
        tokens: Of the split.
        batch_size: Streams: in training of this process, in evaluation of all together.
        block_size: Tokens of a block.
        training: As above.
        seed: Of the offsets.
        rank: This process among `world_size`; streams are dealt in turn.
        world_size: Processes that share the split.
        reshuffle: Draw an offset for each epoch; False takes epoch 0's, for overfitting a few batches on purpose.

    Raises:
        ValueError: The text is too short for one block of each stream, or there are fewer streams than processes.
    """

    things = "streams"

    def __init__(
        self,
        tokens: int,
        batch_size: int,
        block_size: int,
        *,
        training: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        reshuffle: bool = True,
    ) -> None:
        self.tokens, self.batch_size, self.block_size, self.training = tokens, batch_size, block_size, training
        self.seed, self.rank, self.world_size, self.reshuffle = seed, rank, world_size, reshuffle
        self.streams = batch_size * world_size if training else batch_size
        if training and not len(self):
            raise ValueError(
                f"data.batch_size={batch_size} and data.block_size={block_size} on {world_size} device(s) need"
                f" {self.streams * block_size + block_size - 1} training tokens for one step, found {tokens}; lower"
                " one of them, or add text"
            )
        if not training and self.streams < world_size:
            raise ValueError(
                f"data.eval_batch_size={batch_size}: too few streams of text for {world_size} devices, which share"
                f" them; use at least {world_size}, or evaluate on one device"
            )

    def __len__(self) -> int:
        """Batches per epoch, equal on every rank and, in training, in every epoch."""
        if self.training:
            return max(0, self.tokens - self.block_size + 1) // self.streams // self.block_size
        return -(-self._length(0) // self.block_size)

    def batches(self, epoch: int) -> list[int]:
        """The blocks of an epoch by number."""
        return list(range(len(self)))

    def places(self, block: int, epoch: int) -> np.ndarray:
        """Where in the text the targets of a block are, int64 [B, N]; -1 is padding."""
        offset = self._offset(epoch)
        length = self._length(offset)
        starts = np.arange(self.rank, self.streams, self.world_size, dtype=np.int64)[:, None] * length
        within = np.arange(block * self.block_size, min((block + 1) * self.block_size, length))
        found = offset + starts + within
        return np.where(found < self.tokens, found, -1)

    def identity(self) -> dict[str, int]:
        """What must agree for a position inside an epoch to mean the same words."""
        return {
            "data.seed": self.seed,
            "data.batch_size": self.batch_size,
            "data.block_size": self.block_size,
            "tokens": self.tokens,
            "devices": self.world_size,
        }

    def _offset(self, epoch: int) -> int:
        if not self.training:
            return 0
        drawn = np.random.default_rng([self.seed, epoch if self.reshuffle else 0])
        return int(drawn.integers(self.block_size))

    def _length(self, offset: int) -> int:
        """Tokens of a stream."""
        return (self.tokens - offset) // self.streams if self.training else -(-self.tokens // self.streams)


class TextLoader(EpochLoader[int, TextBatch]):
    """Yields `TextBatch`es of `plan`, block after block of each stream."""

    plan: TextPlan

    def __init__(self, plan: TextPlan, ids: np.ndarray, eos: int, clean: np.ndarray | None = None) -> None:
        """ids: the text, integers [tokens]; eos: the word before the first; clean: the text before a word swap."""
        super().__init__(plan)
        self.ids, self.eos, self.clean = ids, eos, clean

    def open(self, batches: list[int], epoch: int) -> Generator[TextBatch, None, None]:
        """Reads what is asked for; nothing is read ahead."""
        for block in batches:
            places = self.plan.places(block, epoch)
            before = np.where(places > 0, self.ids[np.maximum(places - 1, 0)], 0)
            words = np.where(places == 0, self.eos, before)
            clean = None if self.clean is None else _at(self.clean, places)
            yield TextBatch(torch.from_numpy(words.astype(np.int64)), _at(self.ids, places), block == 0, clean)


def _at(ids: np.ndarray, places: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.where(places < 0, IGNORED, ids[places]).astype(np.int64))


def swap_words(ids: np.ndarray, share: float, by: int, spared: list[int], seed: list[int]) -> np.ndarray:
    """A copy of a text, int32 [tokens], in which each word but the `spared` is `by` with probability `share`.

    As TextAttack's word swaps with one generic word. seed: equal ones, and texts of equal length, swap the same places.
    """
    drawn, swapped = np.random.default_rng(seed), np.array(ids, np.int32)
    for start in range(0, len(swapped), _CHUNK):  # the draws are the same in parts
        part = swapped[start : start + _CHUNK]
        part[(drawn.random(len(part)) < share) & ~np.isin(part, spared)] = by
    return swapped
