"""Adam in depth. See base.py for what a rule is."""

import torch
from torch import Tensor

from ..ranges import COUNT_OR_NONE, MOMENTUM, POSITIVE, SHARE, in_range
from .base import Buffers, MomentumRule, Scalars, Update, zeros


@in_range(
    "Adam.", beta1=MOMENTUM, beta2=MOMENTUM, gamma1=POSITIVE, eps=POSITIVE, mu=MOMENTUM, gamma2=POSITIVE,
    kappa=SHARE.because("0 is no decay, 1 drops the skip connection"),
    adam_layers=COUNT_OR_NONE.or_(None).because("a number of MoE blocks, or null for all"),
)  # fmt: skip
class Adam(MomentumRule):
    """AdamSMoE: an Adam step at the first MoE block(s), heavy ball after. One evaluation; three buffers, or two.

    Adam step: p' = beta1 p + (1 - beta1) u(x); m' = beta2 m + (1 - beta2) u(x)^2;
    x' = x + gamma1 p' / sqrt(m' + eps) - kappa x. Heavy ball, gathering from the first block on: h' = mu h + u(x);
    x' = x + gamma2 h'.

    When to use it: the paper's choice for language; try it where updates differ much in size between coordinates.

    Source: arXiv:2410.14574 (Adam in the first layer only). The released language code
    has, in effect, kappa = 1: its Adam layer has no skip connection.

    There is no bias correction, as in the paper: at the default betas the first step is about 3.2 per coordinate, and
    1/sqrt(eps) amplifies noise where u is near 0, so compare such networks in float64 or with that in mind.

    Args:
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        gamma1: Step size of the Adam step, in (0, 1e6].
        eps: Added to the second moment under the root, in (0, 1e6].
        kappa: Decoupled decay of x in the Adam step, in [0, 1].
        mu: Momentum of the heavy ball, in [0, 1).
        gamma2: Step size of the heavy ball, in (0, 1e6].
        adam_layers: MoE blocks, from the first, that take the Adam step, 0 to 1e9; null for all of them.
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
        self.beta1, self.beta2, self.gamma1 = beta1, beta2, gamma1
        self.eps, self.kappa, self.mu = eps, kappa, mu
        self.gamma2, self.adam_layers = gamma2, adam_layers
        self.bias_correction = bias_correction

    def coefficients(self) -> dict[str, float]:
        names = ("beta1", "beta2", "gamma1", "eps", "kappa", "mu", "gamma2")
        return {name: getattr(self, name) for name in names}

    def init(self, x: Tensor) -> Buffers:
        """h, p, m; without h where every block takes the Adam step."""
        return tuple(zeros(x) for _ in range(2 if self.adam_layers is None else 3))

    def step(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
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
