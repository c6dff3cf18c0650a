"""Momentum across depth: (x, u, buffers) in, (new x, new buffers) out. Knows nothing of MoE, timm or Lightning."""

from .carry import Carry
from .coefficients import Coefficients
from .rules import Adam, HeavyBall, MomentumRule, Residual

__all__ = ["Adam", "Carry", "Coefficients", "HeavyBall", "MomentumRule", "Residual"]
