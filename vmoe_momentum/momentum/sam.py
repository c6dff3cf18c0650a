"""Sharpness-aware steps in depth. See base.py for what a rule is."""

import torch
from torch import Tensor

from ..ranges import NOT_NEGATIVE, POSITIVE, in_range
from .base import Buffers, MomentumRule, Scalars, Update


@in_range("SAM.", rho=NOT_NEGATIVE, gamma=POSITIVE)
class SAM(MomentumRule):
    """Steps from where the objective is worst nearby: y = x - rho u(x) / |u(x)|; x' = x + gamma u(y).

    Two evaluations, no buffer. |u| is per token and at least 1e-12; where u = 0 (drop path and dropped tokens do that)
    y is x, with a finite gradient. rho = 0 equals Residual. Router noise and drop path are the same in both
    evaluations. When to use it: as the paper's comparison, at twice the cost of a sparse layer. Source: SAM (Foret et
    al., arXiv:2010.01412), read in depth.

    Args:
        rho: Radius, in [0, 1e6].
        gamma: Step size, in (0, 1e6].
        detach_first: No gradient through the first evaluation, as the optimizer SAM does; half the backward pass.
    """

    def __init__(self, rho: float = 0.05, gamma: float = 1.0, detach_first: bool = False) -> None:
        self.rho, self.gamma, self.detach_first = rho, gamma, detach_first

    def coefficients(self) -> dict[str, float]:
        return {"rho": self.rho, "gamma": self.gamma}

    def init(self, x: Tensor) -> Buffers:
        return ()

    def step(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        first = u(x).detach() if self.detach_first else u(x)
        square = first.square().sum(dim=-1, keepdim=True)
        some = square > 1e-24
        # the inner where keeps the gradient of the square root finite at 0
        ahead = torch.where(some, first * torch.where(some, square, 1.0).rsqrt(), 0.0)
        return x + coefficients["gamma"] * u(x - coefficients["rho"] * ahead), buffers
