"""Momentum rules: how one MoE block moves the residual stream (MomentumSMoE, arXiv:2410.14574).

An SMoE layer is read as a step of gradient descent in depth with f = -u as the gradient, u the block's whole update
`drop_path(layer_scale(moe(norm(x))))`. A rule is a function of (x, u, buffers, t, coefficients): it evaluates u where
it likes and returns the new x and the new buffers.

    B images, N tokens, D width. x, u(x) and each buffer: [B, N, D].

To add a rule: one subclass of `MomentumRule` here. Constructor arguments are kept as attributes of the same name (that
is how a rule is written into checkpoints); YAML then says `rule: NameOfTheClass`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Buffers = tuple[Tensor, ...]
Update = Callable[[Tensor], Tensor]
Scalars = Mapping[str, float | Tensor]


class MomentumRule(ABC):
    """Base of all rules.

    `coefficients()` names the scalars of the update. `learned` names those that each block owns as parameters instead
    (`blocks.i.momentum.*`); `unit_interval` those of them that stay strictly inside (0, 1), through a sigmoid.
    """

    learned: tuple[str, ...] = ()
    unit_interval: tuple[str, ...] = ("mu",)

    @abstractmethod
    def coefficients(self) -> dict[str, float]:
        """The constants of the update by name; also the initial values where they are learned."""

    @abstractmethod
    def init(self, x: Tensor) -> Buffers:
        """Zero buffers before the first MoE block. x: [B, N, D]."""

    @abstractmethod
    def __call__(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        """One step at one MoE block.

        u: the update as a function of the residual stream. The auxiliary loss and the routing statistics of the block
        are those of its *last* evaluation, so evaluate last where the step is made. t: 1, 2, ... counts MoE blocks.
        """

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


class Adam(MomentumRule):
    """AdamSMoE: an Adam step at the first MoE block(s), heavy ball after. One evaluation; three buffers, or two.

    Adam step: p' = beta1 p + (1 - beta1) u(x); m' = beta2 m + (1 - beta2) u(x)^2;
    x' = x + gamma1 p' / sqrt(m' + eps) - kappa x. Heavy ball, gathering from the first block on: h' = mu h + u(x);
    x' = x + gamma2 h'.

    Source: arXiv:2410.14574, section 3.2 and its experiments (Adam in the first layer only). The released language code
    has, in effect, kappa = 1: its Adam layer has no skip connection.

    There is no bias correction, as in the paper: at the default betas the first step is about 3.2 per coordinate, and
    1/sqrt(eps) amplifies noise where u is near 0, so compare such networks in float64 or with that in mind.

    Args:
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        gamma1: Step size of the Adam step, > 0.
        eps: Added to the second moment under the root, > 0.
        kappa: Decoupled decay of x in the Adam step, in [0, 1].
        mu: Momentum of the heavy ball, in [0, 1).
        gamma2: Step size of the heavy ball, > 0.
        adam_layers: MoE blocks, from the first, that take the Adam step; null for all of them.
        bias_correction: Divide p' by 1 - beta1^t and m' by 1 - beta2^t, as the optimizer Adam does. Ours.
    """

    def __init__(
        self,
        beta1: float = 0.9,
        beta2: float = 0.999,
        gamma1: float = 1.0,
        eps: float = 1e-8,
        kappa: float = 0.0,
        mu: float = 0.7,
        gamma2: float = 1.0,
        adam_layers: int | None = 1,
        bias_correction: bool = False,
    ) -> None:
        for name, value in (("beta1", beta1), ("beta2", beta2), ("mu", mu)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"Adam.{name}={value} is outside [0, 1); the default suits most")
        if not 0.0 <= kappa <= 1.0:
            raise ValueError(f"Adam.kappa={kappa} is outside [0, 1]; 0 is no decay, 1 drops the skip connection")
        if adam_layers is not None and adam_layers < 0:
            raise ValueError(f"Adam.adam_layers={adam_layers}: use a number of MoE blocks, or null for all")
        self.beta1, self.beta2, self.gamma1 = beta1, beta2, _positive("Adam", "gamma1", gamma1)
        self.eps, self.kappa, self.mu = _positive("Adam", "eps", eps), kappa, mu
        self.gamma2, self.adam_layers = _positive("Adam", "gamma2", gamma2), adam_layers
        self.bias_correction = bias_correction

    def coefficients(self) -> dict[str, float]:
        names = ("beta1", "beta2", "gamma1", "eps", "kappa", "mu", "gamma2")
        return {name: getattr(self, name) for name in names}

    def init(self, x: Tensor) -> Buffers:
        """h, p, m; without h where every block takes the Adam step."""
        return tuple(torch.zeros_like(x) for _ in range(2 if self.adam_layers is None else 3))

    def __call__(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        c, step = coefficients, u(x)
        *ball, p, m = buffers
        ball = [c["mu"] * h + step for h in ball]
        if self.adam_layers is not None and t > self.adam_layers:
            return x + c["gamma2"] * ball[0], (*ball, p, m)
        p = c["beta1"] * p + (1.0 - c["beta1"]) * step
        m = c["beta2"] * m + (1.0 - c["beta2"]) * step * step
        first, second = p, m
        if self.bias_correction:
            first, second = p / (1.0 - c["beta1"] ** t), m / (1.0 - c["beta2"] ** t)
        moved = c["gamma1"] * first / torch.sqrt(second + c["eps"])
        return x + moved - c["kappa"] * x, (*ball, p, m)


def _positive(rule: str, name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0.0):
        raise ValueError(f"{rule}.{name}={value} must be a finite number > 0")
    return value
