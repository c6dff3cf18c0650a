"""Intervals over images, paired between models, and the spread over seeds shown apart."""

from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest


class Interval(NamedTuple):
    """An estimate with its 95 % interval over images: bootstrap, or exact where all images agree."""

    value: float
    low: float
    high: float


class GroupDifference(NamedTuple):
    """Second group minus first, on the same images."""

    images: Interval  # resampling images, seeds as they are
    seeds: float | None  # standard error over seeds; None with fewer than two in a group


def mean_interval(outcomes: np.ndarray, draws: int = 2000, seed: int = 0, largest: float = 1.0) -> Interval:
    """outcomes: [N] or, several models of one group on the same images, [M, N]; 1 correct, 0 not, at most `largest`."""
    return _interval(np.atleast_2d(outcomes).astype(float).mean(axis=0), 0.0, largest, draws, seed)


def group_difference(
    first: np.ndarray, second: np.ndarray, draws: int = 2000, seed: int = 0, largest: float = 1.0
) -> GroupDifference:
    """first, second: [M, N] outcomes of each group's models on the same N images. Paired over images."""
    first, second = np.atleast_2d(first).astype(float), np.atleast_2d(second).astype(float)
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"paired differences need the same images: {first.shape[1]} and {second.shape[1]}")
    images = _interval(second.mean(axis=0) - first.mean(axis=0), -largest, largest, draws, seed)
    if min(len(first), len(second)) < 2:
        return GroupDifference(images, None)
    variances = [group.mean(axis=1).var(ddof=1) / len(group) for group in (first, second)]
    return GroupDifference(images, float(np.sqrt(sum(variances))))


def _interval(per_image: np.ndarray, lowest: float, highest: float, draws: int, seed: int) -> Interval:
    """Of the mean of `per_image` [N], values that could lie from `lowest` to `highest`.

    Where all images have one value every resample has it, too, and a bootstrap would be sure of what six images cannot
    tell. There the share of images with another value is unknown but bounded: Clopper and Pearson's for 0 of N, and
    those images could have the lowest or the highest. For plain accuracies that is Clopper and Pearson's interval.
    """
    mean = float(per_image.mean())
    if len(per_image) and (per_image == per_image[0]).all():
        others = binomtest(0, len(per_image)).proportion_ci(0.95, method="exact").high
        return Interval(mean, mean - others * (mean - lowest), mean + others * (highest - mean))
    low, high = np.quantile(_resampled_means(per_image, draws, seed), [0.025, 0.975])
    return Interval(mean, float(low), float(high))


def _resampled_means(values: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """[draws]. Images of equal value are interchangeable, so their counts are drawn, not the images."""
    levels, counts = np.unique(values, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=draws)
    return drawn @ levels / len(values)
