"""From hidden states to words. T tokens, D width, V words."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Head = Literal["softmax", "adaptive"]
LOGITS = 2**26  # of so many at most are in memory at once, 268 MB in float32
NO_WORD = -100  # a target that does not count


class SoftmaxHead(nn.Linear):
    """All words, with a bias, not tied to the embedding. The loss never has [T, V] logits in memory."""

    def losses(self, hidden: Tensor, words: Tensor) -> Tensor:
        """hidden: [T, D]; words: int64 [T] -> [] sum of -log p; words of NO_WORD do not count."""
        hidden, words = hidden.flatten(0, -2), words.flatten()
        rows = max(1, LOGITS // self.out_features)
        if hidden.shape[0] <= rows:
            return self._losses(hidden, words)
        parts = [
            # logits once more for the gradient, rather than kept
            checkpoint(self._losses, *part, use_reentrant=False) if torch.is_grad_enabled() else self._losses(*part)
            for part in zip(hidden.split(rows), words.split(rows), strict=True)
        ]
        return torch.stack(parts).sum()

    def _losses(self, hidden: Tensor, words: Tensor) -> Tensor:
        logits = self(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, words, ignore_index=NO_WORD, reduction="sum")

    def log_prob(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        logits = self(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


class AdaptiveHead(nn.AdaptiveLogSoftmaxWithLoss):
    """Frequent words in a head of full width, rare ones in tails of a quarter, a sixteenth, ... of it.

    Other probabilities than the softmax's, so perplexities of the two are not to be compared. Words must be numbered by
    frequency, as `data prepare text --order frequency` does.
    """

    def losses(self, hidden: Tensor, words: Tensor) -> Tensor:
        """As SoftmaxHead's."""
        hidden, words = hidden.flatten(0, -2), words.flatten()
        kept = words != NO_WORD
        return -self(hidden[kept], words[kept]).output.sum()

    def log_prob(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return super().log_prob(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])


def make_head(head: Head, width: int, vocab_size: int, cutoffs: list[int] | None) -> SoftmaxHead | AdaptiveHead:
    """Raises ValueError: no such head, cutoffs that are none."""
    if head not in get_args(Head):
        raise ValueError(f"head={head}: use {' or '.join(get_args(Head))}")
    if head == "softmax":
        if cutoffs is not None:
            raise ValueError(f"cutoffs={cutoffs}: for head=adaptive; the softmax has none")
        return SoftmaxHead(width, vocab_size)
    cutoffs = [vocab_size // 15, 3 * vocab_size // 15, 6 * vocab_size // 15] if cutoffs is None else cutoffs
    if not cutoffs or cutoffs != sorted(set(cutoffs)) or cutoffs[0] < 1 or cutoffs[-1] >= vocab_size:
        raise ValueError(
            f"cutoffs={cutoffs}: use ascending numbers from 1 to {vocab_size - 1}, fewer than the {vocab_size} words"
        )
    return AdaptiveHead(width, vocab_size, cutoffs)
