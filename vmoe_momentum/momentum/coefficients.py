"""The scalars of one block: a rule's constants, or this block's own parameters."""

import math

import torch
from torch import Tensor, nn

from .base import MomentumRule, at_least_float32


class Coefficients(nn.Module):
    """Calls give `{name: float or [] tensor}`.

    A learned scalar is stored as `raw_NAME`; those in `rule.unit_interval` are the sigmoid of it. All are 0-d, hence
    free of weight decay under the usual rule (nothing with fewer than two axes is decayed).
    """

    def __init__(self, rule: MomentumRule) -> None:
        super().__init__()
        self.constants = rule.coefficients()
        self.learned, self.unit_interval = rule.learned, rule.unit_interval
        for name in self.learned:
            self.register_parameter(f"raw_{name}", nn.Parameter(torch.empty((), dtype=torch.float32)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Learned scalars at the rule's constants."""
        for name in self.learned:
            value = self.constants[name]
            raw = math.log(value / (1.0 - value)) if name in self.unit_interval else value
            nn.init.constant_(getattr(self, f"raw_{name}"), raw)

    def forward(self) -> dict[str, float | Tensor]:
        scalars: dict[str, float | Tensor] = dict(self.constants)
        for name in self.learned:
            raw = getattr(self, f"raw_{name}")
            raw = raw.to(at_least_float32(raw.dtype))
            scalars[name] = raw.sigmoid() if name in self.unit_interval else raw
        return scalars
