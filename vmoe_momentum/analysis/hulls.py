"""Convex hulls of a few vectors: the shortest vector in one, by scipy, and how far other combinations lie from it.

T tokens, E vectors of each, M coordinates.
"""

from typing import TypedDict

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import nnls
from torch import Tensor

ZERO = 1e-6  # a shortest vector this much shorter than the longest counts as zero


def least_norm_weights(vectors: Tensor, members: Tensor) -> Tensor:
    """[T, E] float64, at least 0 and summing to 1, that make |sum_e weight_e vector_e| least; 0 for who is no member.

    vectors: [T, E, M], finite. members: [T, E] bool, some of each token. Where several weights give the one shortest
    vector (equal experts, more vectors than coordinates), those of one of them.

    Write y = s w with weights w that sum to 1, s > 0, and p = sum w v. Over s, |sum y v|^2 + (1 - sum y)^2 is least at
    |p|^2 / (1 + |p|^2), which grows with |p|: the y >= 0 that make it least are s times the wanted weights. So the
    program is one of non-negative least squares, whose active-set solution (Lawson and Hanson) is exact.
    """
    vectors = vectors.double()
    lengths = vectors.norm(dim=-1)
    # In units of the shortest vector, as |p| is no longer than that: then 1 + |p|^2 keeps its digits.
    unit = lengths.masked_fill(~members | (lengths == 0), torch.inf).amin(dim=-1, keepdim=True)
    unit = unit.where(unit.isfinite(), 1.0)
    scale = (1.0 + (lengths / unit).square()).sqrt()  # columns of one length, for vectors of unlike sizes
    columns = torch.cat([vectors / unit.unsqueeze(-1), torch.ones_like(lengths).unsqueeze(-1)], dim=-1)
    columns = (columns / scale.unsqueeze(-1)).numpy()
    target = np.zeros(columns.shape[-1])
    target[-1] = 1.0
    found = np.zeros(members.shape)
    for y, own, part in zip(found, columns, members.numpy(), strict=True):
        y[part] = nnls(own[part].T, target, maxiter=30 * len(part))[0]
    weights = torch.from_numpy(found) / scale
    return weights / weights.sum(dim=-1, keepdim=True)


class Shared(TypedDict):
    """Numbers of a ParetoRow that all combinations in a hull have."""

    expert_norm: float
    least_norm: float
    stationary: float
    weight_sum: float


class Compared(Shared):
    """And those of one."""

    norm: float
    cosine: float | None
    gap: float
    relative_gap: float
    common: float


def compare_points(vectors: Tensor, weights: Tensor, members: Tensor) -> dict[str, Compared]:
    """The numbers of a ParetoRow for each combination, by its name.

    vectors: [T, E, M] float64. weights: [T, E], the router's, not negative and none that is all 0. members: [T, E]
    bool, whose hull; those with a weight are among them.
    """
    least = _combined(vectors, least_norm_weights(vectors, members))
    size, lengths = least.norm(dim=-1), vectors.norm(dim=-1) * members
    zero = size <= ZERO * lengths.amax(dim=-1)
    shared: Shared = {
        "expert_norm": _mean(lengths.sum(dim=-1) / members.sum(dim=-1)),
        "least_norm": _mean(size),
        "stationary": _mean(zero),
        "weight_sum": _mean(weights.sum(dim=-1)),
    }
    found: dict[str, Compared] = {}
    combinations = {"router": weights, "shuffled": shuffled(weights, members), "equal": members.double()}
    for name, given in combinations.items():
        point = _combined(vectors, given / given.sum(dim=-1, keepdim=True))
        norm, gap = point.norm(dim=-1), (point - least).norm(dim=-1)
        along = torch.einsum("tem,tm->te", vectors, point) >= 0
        found[name] = {
            **shared,
            "norm": _mean(norm),
            "cosine": None if zero.all() else _mean(F.cosine_similarity(point, least, dim=-1)[~zero]),
            "gap": _mean(gap),
            "relative_gap": _mean(torch.where(norm > 0, gap / norm, 0.0)),
            "common": _mean((along | ~members).all(dim=-1)),
        }
    return found


def shuffled(weights: Tensor, members: Tensor) -> Tensor:
    """Each token's weights among its members anew, at random: as uneven, but blind to what they weigh. [T, E]."""
    drawn = torch.rand(weights.shape, generator=torch.Generator().manual_seed(0))
    onto = drawn.masked_fill(~members, 2.0).argsort(dim=-1)  # members first, in random order
    members_first = members.int().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(weights).scatter(-1, onto, weights.gather(-1, members_first))


def _combined(vectors: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("tem,te->tm", vectors, weights)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
