"""Momentum across depth: (x, u, buffers) in, (new x, new buffers) out. Knows nothing of MoE, timm or Lightning."""

from .adam import Adam
from .base import MomentumRule
from .carry import Carry
from .coefficients import Coefficients
from .robust import Robust
from .rules import Complex, HeavyBall, Nesterov, Residual
from .sam import SAM
from .threads import ThreadsCarry

__all__ = [
    "SAM",
    "Adam",
    "Carry",
    "Coefficients",
    "Complex",
    "HeavyBall",
    "MomentumRule",
    "Nesterov",
    "Residual",
    "Robust",
    "ThreadsCarry",
]
