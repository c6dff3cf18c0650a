"""Paired differences over seeds: t and bootstrap intervals, Holm, and the smallest difference that could be shown."""

import math
from functools import cache
from typing import NamedTuple

import numpy as np
from evidence_questions import DRAWS, LEVEL, POWER
from scipy.optimize import brentq
from scipy.stats import bootstrap, nct, t
from statsmodels.stats.multitest import multipletests


class Difference(NamedTuple):
    """One question and measure; all in the measure's unit."""

    values: tuple[float, ...]  # seed by seed
    mean: float
    low: float  # the t interval at `level`
    high: float
    level: float  # of error: 0.05 is a 95 % interval
    p: float
    adjusted: float  # Holm's p
    shown: bool  # Holm rejects 0
    smallest: float  # that so many seeds could have shown with power 80 %, the other answers being as they are

    @property
    def bootstrap(self) -> tuple[float, float]:
        """The percentile interval, at the same level."""
        return resampled(self.values, self.level)

    @property
    def agree(self) -> bool:
        """Whether t and bootstrap say the same of 0."""
        return leaves_out_zero(self.low, self.high) == leaves_out_zero(*self.bootstrap)


def family(samples: list[tuple[float, ...] | None], steps: list[float] | None = None) -> list[Difference | None]:
    """Holm over all of them, in their order.

    samples: paired differences, at least two each; None: not there, p = 1. steps: of `spread_of`.
    """
    steps = [0.0] * len(samples) if steps is None else steps
    ps = [1.0 if v is None else p_value(v, step) for v, step in zip(samples, steps, strict=True)]
    shown, adjusted = holm(tuple(ps))
    place = np.argsort(np.argsort(ps, kind="stable"), kind="stable")
    levels = [LEVEL / (len(ps) - int(rank)) for rank in place]
    failed = LEVEL / max(1, len(ps) - sum(shown))  # of the first step that was not shown
    rest = zip(samples, steps, adjusted, shown, levels, strict=True)
    return [
        None if values is None
        else single(values, level, step, after, is_shown, level if is_shown else failed)
        for values, step, after, is_shown, level in rest
    ]  # fmt: skip


@cache  # each call collects garbage, and pages ask for the same answers many times
def holm(ps: tuple[float, ...]) -> tuple[tuple[bool, ...], tuple[float, ...]]:
    """Whether each is shown, and its p after Holm."""
    shown, adjusted, *_ = multipletests(ps, alpha=LEVEL, method="holm")
    return tuple(map(bool, shown)), tuple(map(float, adjusted))


def single(
    values: tuple[float, ...],
    level: float = LEVEL,
    step: float = 0.0,
    adjusted: float = math.nan,
    shown: bool = False,
    needed: float | None = None,
) -> Difference:
    """Of one question by itself, without Holm. needed: the level at which it would have been shown, if not `level`."""
    mean, spread = float(np.mean(values)), spread_of(values, step)
    reach = t.ppf(1 - level / 2, len(values) - 1) * spread / math.sqrt(len(values))
    smallest = smallest_effect(len(values), needed or level) * spread
    about = (mean, mean - reach, mean + reach, level)
    return Difference(tuple(values), *about, p_value(values, step), adjusted, shown, smallest)


def spread_of(values: tuple[float, ...], step: float) -> float:
    """Sample standard deviation, or that of rounding two values to `step` where it is less: step / sqrt(6).

    Three seeds that agree on a coarse grid do not make a certainty.
    """
    return max(float(np.std(values, ddof=1)), step / math.sqrt(6))


def p_value(values: tuple[float, ...], step: float = 0.0) -> float:
    """Of the paired t test, two-sided; 1 where there is neither a difference nor a spread."""
    mean, spread = abs(float(np.mean(values))), spread_of(values, step)
    if spread == 0:
        return float(mean == 0)
    return float(2 * t.sf(mean / (spread / math.sqrt(len(values))), len(values) - 1))


@cache
def resampled(values: tuple[float, ...], level: float) -> tuple[float, float]:
    """Percentiles of the mean over seeds drawn anew."""
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, n_resamples=DRAWS, confidence_level=1 - level, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


@cache  # of two numbers, and slow
def smallest_effect(seeds: int, level: float) -> float:
    """In standard deviations of the paired difference, what the t test shows with power 80 %.

    By scipy's noncentral t: statsmodels' solver gives too little for three seeds, without a word. The other tail is
    below 1e-6 of it here.
    """
    edge = t.ppf(1 - level / 2, seeds - 1)
    return float(brentq(lambda d: nct.sf(edge, seeds - 1, d * math.sqrt(seeds)) - POWER, 0.01, 12.0))


def leaves_out_zero(low: float, high: float) -> bool:
    return low > 0 or high < 0


def verdict(found: Difference, counts: float) -> str:
    """gain, loss, small, none or undecided: the header of benchmarks/evidence.py says what they mean."""
    if found.shown:
        return "small" if abs(found.mean) < counts else "gain" if found.mean > 0 else "loss"
    return "none" if -counts < found.low and found.high < counts else "undecided"
