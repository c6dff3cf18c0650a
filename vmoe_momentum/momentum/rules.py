"""Momentum rules: how one MoE block moves the residual stream (MomentumSMoE, arXiv:2410.14574).

An SMoE layer is read as a step of gradient descent in depth with f = -u as the gradient, u the block's whole update
`drop_path(layer_scale(moe(norm(x))))`. A rule is a function of (x, u, buffers, t, coefficients): it evaluates u where
it likes and returns the new x and the new buffers.

    B images, N tokens, D width. x, u(x) and each buffer: [B, N, D].

To add a rule: one subclass of `MomentumRule` here. Constructor arguments are kept as attributes of the same name (that
is how a rule is written into checkpoints); YAML then says `rule: NameOfTheClass`.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Buffers = tuple[Tensor, ...]
Update = Callable[[Tensor], Tensor]
Scalars = Mapping[str, float | Tensor]


class MomentumRule:
    """Base of all rules.

    `coefficients()` names the scalars of the update. `learned` names those that each block owns as parameters instead
    (`blocks.i.momentum.*`); `unit_interval` those of them that stay strictly inside (0, 1), through a sigmoid.
    """

    learned: tuple[str, ...] = ()
    unit_interval: tuple[str, ...] = ("mu",)

    def coefficients(self) -> dict[str, float]:
        """The constants of the update by name; also the initial values where they are learned."""
        raise NotImplementedError

    def init(self, x: Tensor) -> Buffers:
        """Zero buffers before the first MoE block. x: [B, N, D]."""
        raise NotImplementedError

    def __call__(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        """One step at one MoE block.

        u: the update as a function of the residual stream. The auxiliary loss and the routing statistics of the block
        are those of its *last* evaluation, so evaluate last where the step is made. t: 1, 2, ... counts MoE blocks.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


class Residual(MomentumRule):
    """Plain SMoE, x' = x + gamma u(x): gradient descent with step gamma. One evaluation, no buffer.

    gamma = 1 is the standard residual connection, bitwise.
    """

    def __init__(self, gamma: float = 1.0) -> None:
        self.gamma = _positive("Residual", "gamma", gamma)

    def coefficients(self) -> dict[str, float]:
        return {"gamma": self.gamma}

    def init(self, x: Tensor) -> Buffers:
        return ()

    def __call__(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        return x + coefficients["gamma"] * u(x), buffers


class HeavyBall(MomentumRule):
    """MomentumSMoE: p' = mu p + u(x); x' = x + gamma p'. One evaluation, one buffer.

    Source: arXiv:2410.14574, section 3.1 (there p is the negative of ours: f = -u). The paper uses mu = 0.7, gamma = 1.
    mu = 0 equals Residual. Near a fixed point, with sigma an eigenvalue of -du/dx, it converges for real sigma iff
    0 < gamma sigma < 2 + 2 mu; for complex sigma the region is an ellipse, narrower than Residual's disc along the
    imaginary axis.

    Args:
        mu: Momentum, in [0, 1); strictly inside when learned.
        gamma: Step size, > 0.
        learn: Each block learns its own mu (through a sigmoid) and gamma, from these values on. Ours for every MoE
            block; the paper's appendix learns them too.
    """

    def __init__(self, mu: float = 0.7, gamma: float = 1.0, learn: bool = False) -> None:
        if not (0.0 <= mu < 1.0) or (learn and mu == 0.0):
            raise ValueError(f"HeavyBall.mu={mu} is outside {'(0, 1)' if learn else '[0, 1)'}; the paper uses 0.7")
        self.mu, self.gamma, self.learn = mu, _positive("HeavyBall", "gamma", gamma), learn

    @property
    def learned(self) -> tuple[str, ...]:
        return ("mu", "gamma") if self.learn else ()

    def coefficients(self) -> dict[str, float]:
        return {"mu": self.mu, "gamma": self.gamma}

    def init(self, x: Tensor) -> Buffers:
        return (torch.zeros_like(x),)

    def __call__(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        p = coefficients["mu"] * buffers[0] + u(x)
        return x + coefficients["gamma"] * p, (p,)


def _positive(rule: str, name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"{rule}.{name}={value} must be a finite number > 0; 1.0 is the standard residual")
    return value
