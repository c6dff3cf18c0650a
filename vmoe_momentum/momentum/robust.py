"""Robust momentum: evaluates the layer ahead of where it stands. See base.py for what a rule is."""

import math

from torch import Tensor

from ..ranges import MOMENTUM, NOT_NEGATIVE, POSITIVE, Range, in_range
from .base import Buffers, LookAhead, LooksAhead, Scalars, Update, zeros

SLACK = 1e-12


@in_range(
    "Robust.", L=POSITIVE.or_(None), m=POSITIVE.or_(None), r=Range(0, 1).or_(None), gamma=POSITIVE.or_(None),
    mu=MOMENTUM.or_(None), alpha=NOT_NEGATIVE.or_(None),
)  # fmt: skip
class Robust(LooksAhead):
    """Robust MomentumSMoE: y = x + alpha gamma p; p' = mu p + u(y); x' = x + gamma p'. One evaluation, one buffer.

    With k = L/m: gamma = k (1-r)^2 (1+r) / L, mu = k r^3 / (k-1), alpha = r^3 / ((k-1) (1-r)^2 (1+r)), for r in
    [1 - 1/sqrt(k), 1 - 1/k]. On a quadratic whose curvature lies in [m, L] it contracts by r a layer; the larger r, the
    more noise in the gradients it bears. At r = 1 - 1/k the points y are those of gradient descent with step 1/L; at
    r = 1 - 1/sqrt(k) it is the triple-momentum method.

    In alpha the velocity form has x_t - x_{t-1} = gamma p_{t-1}; attention sits between our blocks, so p, not the
    difference of x, is what is carried. When to use it: expected corruption or attack. Source: arXiv:2410.14574, after
    the robust momentum method (Cyrus et al., arXiv:1710.04753). The defaults (gamma about 1) are ours.

    The authors' vision code (github.com/rachtsy/vmoe at adb1a70) has k = 1.25 (its "gamma"), r = 0.2 (its "mu") and
    L = 1, here L 1, m 0.8, r 0.2: step gamma 0.96, decay mu 0.04, look-ahead alpha gamma 0.04. That is 4 % of the last
    step carried and looked ahead along: all but no momentum. r is there 1 - 1/k, the end of its range. It looks ahead
    after the norm, and in dense blocks, too.

    Args:
        L: Largest curvature, in (0, 1e6]; with m and r. Left out, with all others: 1.
        m: Smallest curvature, in (0, 1e6] and below L. Left out, with all others: 0.25.
        r: Rate, in [0, 1] and there in [1 - 1/sqrt(L/m), 1 - m/L]. Left out, with all others: 0.6.
        gamma: Step size, in (0, 1e6]; with mu and alpha, instead of L, m and r.
        mu: Momentum, in [0, 1).
        alpha: How far ahead to look, in steps gamma p, in [0, 1e6].
        look_ahead: y in the stream, before the block's norm, as the paper writes it; or added behind that norm, and
            behind those of dense blocks, too, as the released vision code does.
    """

    def __init__(
        self,
        L: float | None = None,  # noqa: N803  (the paper's name)
        m: float | None = None,
        r: float | None = None,
        gamma: float | None = None,
        mu: float | None = None,
        alpha: float | None = None,
        look_ahead: LookAhead = "before_norm",
    ) -> None:
        if all(value is None for value in (L, m, r, gamma, mu, alpha)):
            L, m, r = 1.0, 0.25, 0.6  # noqa: N806
        curvature, direct = {"L": L, "m": m, "r": r}, {"gamma": gamma, "mu": mu, "alpha": alpha}
        given = [names for names in (curvature, direct) if any(value is not None for value in names.values())]
        if len(given) != 1 or any(value is None for value in given[0].values()):
            told = [f"{name}={'null' if value is None else value}" for names in given for name, value in names.items()]
            raise ValueError(f"Robust: {', '.join(told)}; give L, m and r, or gamma, mu and alpha")
        self.L, self.m, self.r = L, m, r
        self.gamma, self.mu, self.alpha = gamma, mu, alpha
        self._keep_look_ahead(look_ahead)
        if L is not None and m is not None and r is not None:
            self._check_rate(L, m, r)

    @staticmethod
    def _check_rate(L: float, m: float, r: float) -> None:  # noqa: N803
        if m >= L:
            raise ValueError(f"Robust.L={L}: use a number above Robust.m={m}")
        low, high = 1.0 - math.sqrt(m / L), 1.0 - m / L
        if not low - SLACK <= r <= high + SLACK:
            raise ValueError(
                f"Robust.r={r}: use a number in [1 - 1/sqrt(k), 1 - 1/k] = [{low:.6g}, {high:.6g}], where k = L/m = "
                f"{L}/{m}"
            )

    def coefficients(self) -> dict[str, float]:
        if self.gamma is not None and self.mu is not None and self.alpha is not None:
            return {"gamma": self.gamma, "mu": self.mu, "alpha": self.alpha}
        assert self.L is not None and self.m is not None and self.r is not None
        k, r = self.L / self.m, self.r
        ahead = (1.0 - r) ** 2 * (1.0 + r)
        return {"gamma": k * ahead / self.L, "mu": k * r**3 / (k - 1.0), "alpha": r**3 / ((k - 1.0) * ahead)}

    def init(self, x: Tensor) -> Buffers:
        return (zeros(x),)

    def step(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        p = coefficients["mu"] * buffers[0] + self.ahead(x, u, buffers, t, coefficients)
        return x + coefficients["gamma"] * p, (p,)

    def distance(self, t: int, coefficients: Scalars) -> float | Tensor:
        return coefficients["alpha"] * coefficients["gamma"]
