"""Trigram baselines of a text: interpolated Kneser-Ney (Chen and Goodman 1999, one discount an order), and add-k.

Legend: w the next word, v the one before, u the one before that. Words are numbers.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np


class KneserNey:
    """p(w | u v), discounted counts and what is left to the lower order, whose counts are of distinct contexts."""

    def __init__(self, words: Sequence[int], vocab_size: int, start: int) -> None:
        """words: the training text; start: the word that stands before it, twice."""
        self.vocab_size, self.start = vocab_size, start
        text = [start, start, *words]
        three = Counter(zip(text, text[1:], text[2:], strict=False))
        two, one = Counter((v, w) for _, v, w in three), Counter()
        for _, w in two:
            one[w] += 1
        self.orders = [_Order(((u, v), w, n) for (u, v, w), n in three.items()),
                       _Order((v, w, n) for (v, w), n in two.items())]  # fmt: skip
        self.one, self.kinds = one, sum(one.values())
        self.discount = _discount(one.values())

    def probability(self, u: int, v: int, w: int) -> float:
        spread = self.discount * len(self.one) / self.kinds / self.vocab_size
        p = max(self.one[w] - self.discount, 0.0) / self.kinds + spread
        for order, context in ((self.orders[1], v), (self.orders[0], (u, v))):
            p = order.probability(context, w, p)
        return p

    def perplexity(self, words: Sequence[int]) -> float:
        """Of every word of another text."""
        text = [self.start, self.start, *words]
        losses = [-np.log(self.probability(*three)) for three in zip(text, text[1:], text[2:], strict=False)]
        return float(np.exp(np.mean(losses)))


class _Order:
    def __init__(self, counts) -> None:
        self.counts, self.totals, self.kinds = {}, defaultdict(int), defaultdict(int)
        for context, word, count in counts:
            self.counts[context, word] = count
            self.totals[context] += count
            self.kinds[context] += 1
        self.discount = _discount(self.counts.values())

    def probability(self, context, word: int, lower: float) -> float:
        total = self.totals.get(context, 0)
        if not total:
            return lower
        kept = max(self.counts.get((context, word), 0) - self.discount, 0.0) / total
        return kept + self.discount * self.kinds[context] / total * lower


def _discount(counts) -> float:
    """n1 / (n1 + 2 n2), of how many are seen once and twice."""
    seen = Counter(counts)
    return seen[1] / (seen[1] + 2 * seen[2]) if seen[1] else 0.5


def add_k(train: Sequence[int], words: Sequence[int], vocab_size: int, start: int, k: float = 0.01) -> float:
    """Perplexity of p(w | u v) = (n(u v w) + k) / (n(u v) + k V)."""
    text = [start, start, *train]
    three = Counter(zip(text, text[1:], text[2:], strict=False))
    two: Counter = Counter()
    for (u, v, _), n in three.items():
        two[u, v] += n
    other = [start, start, *words]
    losses = [
        -np.log((three[u, v, w] + k) / (two[u, v] + k * vocab_size))
        for u, v, w in zip(other, other[1:], other[2:], strict=False)
    ]
    return float(np.exp(np.mean(losses)))
