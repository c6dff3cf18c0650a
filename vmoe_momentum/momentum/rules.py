"""The classic rules: none, heavy ball, Nesterov, complex. See base.py for what a rule is."""

import math
from typing import Literal

from torch import Tensor

from ..ranges import MOMENTUM, POSITIVE, Range, in_range
from .base import Buffers, LookAhead, LooksAhead, MomentumRule, Scalars, Update, zeros


@in_range("Residual.", gamma=POSITIVE)
class Residual(MomentumRule):
    """Plain SMoE, x' = x + gamma u(x): gradient descent with step gamma. One evaluation, no buffer.

    Args:
        gamma: Step size, in (0, 1e6]; 1 is the standard residual connection, bitwise.
    """

    def __init__(self, gamma: float = 1.0) -> None:
        self.gamma = gamma

    def coefficients(self) -> dict[str, float]:
        return {"gamma": self.gamma}

    def init(self, x: Tensor) -> Buffers:
        return ()

    def step(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        return x + coefficients["gamma"] * u(x), buffers


@in_range("HeavyBall.", mu=MOMENTUM.because("the paper uses 0.7"), gamma=POSITIVE)
class HeavyBall(MomentumRule):
    """MomentumSMoE: p' = mu p + u(x); x' = x + gamma p'. One evaluation, one buffer.

    Source: arXiv:2410.14574 (there p is the negative of ours: f = -u). The paper uses mu = 0.7, gamma = 1.
    mu = 0 equals Residual. Near a fixed point, with sigma an eigenvalue of -du/dx, it converges for real sigma iff
    0 < gamma sigma < 2 + 2 mu; for complex sigma the region is an ellipse, narrower than Residual's disc along the
    imaginary axis.

    Args:
        mu: Momentum, in [0, 1); strictly inside when learned.
        gamma: Step size, in (0, 1e6].
        learn: Each block learns its own mu (through a sigmoid) and gamma, from these values on. Ours for every MoE
            block; the paper's appendix learns them too.
        dense_blocks: The MLPs of dense blocks take the same step and gather momentum, too, from the first MoE block
            on; before it their step is a plain one of gamma. Ours, a control: the paper has momentum in MoE blocks
            only. Not with learn.
    """

    def __init__(self, mu: float = 0.7, gamma: float = 1.0, learn: bool = False, dense_blocks: bool = False) -> None:
        if learn and mu == 0.0:
            raise ValueError(f"HeavyBall.mu={mu}: use a number in (0, 1) where it is learned; the paper uses 0.7")
        if learn and dense_blocks:
            raise ValueError("HeavyBall.dense_blocks=True: dense blocks learn no mu and gamma; use learn=False")
        self.mu, self.gamma, self.learn, self.dense_blocks = mu, gamma, learn, dense_blocks

    @property
    def learned(self) -> tuple[str, ...]:
        return ("mu", "gamma") if self.learn else ()

    def coefficients(self) -> dict[str, float]:
        return {"mu": self.mu, "gamma": self.gamma}

    def init(self, x: Tensor) -> Buffers:
        return (zeros(x),)

    def step(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        p = coefficients["mu"] * buffers[0] + u(x)
        return x + coefficients["gamma"] * p, (p,)

    def dense_step(
        self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars
    ) -> tuple[Tensor, Buffers]:
        if not self.dense_blocks or t == 0:
            return super().dense_step(x, u, buffers, t, coefficients)
        return self(x, u, buffers, t, coefficients)


@in_range("Nesterov.", mu=MOMENTUM, gamma=POSITIVE)
class Nesterov(LooksAhead):
    """Looks ahead along its momentum: y = x + mu gamma p; p' = mu p + u(y); x' = x + gamma p'.

    One evaluation, one buffer. mu = 0 equals Residual. With schedule "time_varying" mu is (t - 1) / (t + 2) at the t-th
    MoE block since the start or the last restart (`momentum_restart` of the network), Nesterov's own sequence. When to
    use it: as HeavyBall, where that overshoots. Source: Nesterov 1983, in the velocity form of Sutskever et al. 2013.

    Args:
        mu: Momentum, in [0, 1); not used by the time-varying schedule.
        gamma: Step size, in (0, 1e6].
        schedule: Constant mu, or (t - 1) / (t + 2).
        look_ahead: y in the stream, before the block's norm; or added behind that norm, and behind those of dense
            blocks, too.
    """

    def __init__(
        self,
        mu: float = 0.7,
        gamma: float = 1.0,
        schedule: Literal["constant", "time_varying"] = "constant",
        look_ahead: LookAhead = "before_norm",
    ) -> None:
        if schedule not in ("constant", "time_varying"):
            raise ValueError(f"Nesterov.schedule={schedule}: use constant or time_varying")
        self.mu, self.gamma, self.schedule = mu, gamma, schedule
        self._keep_look_ahead(look_ahead)

    def coefficients(self) -> dict[str, float]:
        return {"mu": self.mu, "gamma": self.gamma}

    def init(self, x: Tensor) -> Buffers:
        return (zeros(x),)

    def step(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        p = self._mu(t, coefficients) * buffers[0] + self.ahead(x, u, buffers, t, coefficients)
        return x + coefficients["gamma"] * p, (p,)

    def distance(self, t: int, coefficients: Scalars) -> float | Tensor:
        return self._mu(t, coefficients) * coefficients["gamma"]

    def _mu(self, t: int, coefficients: Scalars) -> float | Tensor:
        return coefficients["mu"] if self.schedule == "constant" else (t - 1) / (t + 2)


@in_range("Complex.", mu=MOMENTUM, phi=Range(-math.pi, math.pi).because("it is in radians"), gamma=POSITIVE)
class Complex(MomentumRule):
    """Momentum that turns: p' = mu e^(i phi) p + u(x), x' = x + Re(gamma p'). One evaluation, two buffers (Re p, Im p).

    phi = 0 equals HeavyBall, phi = pi is negative momentum. When to use it: layers whose Jacobian has complex
    eigenvalues, where HeavyBall's region is narrow; negative momentum damps. Source: complex momentum (Lorraine et al.,
    arXiv:2102.08431), here in depth.

    Args:
        mu: Modulus of the momentum, in [0, 1).
        phi: Its phase in radians, in [-pi, pi].
        gamma: Step size, in (0, 1e6].
    """

    def __init__(self, mu: float = 0.7, phi: float = math.pi / 8, gamma: float = 1.0) -> None:
        self.mu, self.phi, self.gamma = mu, phi, gamma

    def coefficients(self) -> dict[str, float]:
        return {"mu": self.mu, "phi": self.phi, "gamma": self.gamma}

    def init(self, x: Tensor) -> Buffers:
        return (zeros(x), zeros(x))

    def step(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        mu, (real, imaginary) = coefficients["mu"], buffers
        cosine, sine = math.cos(self.phi), math.sin(self.phi)
        turned = cosine * real - sine * imaginary, sine * real + cosine * imaginary
        real, imaginary = mu * turned[0] + u(x), mu * turned[1]
        return x + coefficients["gamma"] * real, (real, imaginary)
