"""How far a perplexity can be trusted: over the blocks of text it was measured on."""

from typing import NamedTuple

import numpy as np
from torch import Tensor


class Interval(NamedTuple):
    low: float
    high: float


def resampled(losses: Tensor, tokens: Tensor, level: float = 0.95, seed: int = 0) -> Interval:
    """Percentile bootstrap of exp(sum of losses / sum of tokens), blocks drawn with replacement. [blocks] both.

    Blocks are those of one batch, all streams at one place: neighbours of one text are left together. NaN below two.
    """
    from scipy.stats import bootstrap  # here: it takes a third of a second to import

    kept = tokens > 0
    sums, counts = (each[kept].double().numpy() for each in (losses, tokens))
    if len(counts) < 2:
        return Interval(float("nan"), float("nan"))

    def perplexity(loss: np.ndarray, count: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.exp(loss.sum(axis=axis) / count.sum(axis=axis))

    found = bootstrap(
        (sums, counts), perplexity, paired=True, vectorized=True, confidence_level=level, method="percentile",
        n_resamples=2000, rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Interval(float(found.low), float(found.high))
