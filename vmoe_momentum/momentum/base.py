"""What a momentum rule is: how one MoE block moves the residual stream (MomentumSMoE, arXiv:2410.14574).

An SMoE layer is read as a step of gradient descent in depth with f = -u as the gradient, u the block's whole update
`drop_path(layer_scale(moe(norm(x))))`. A rule is a function of (x, u, buffers, t, coefficients): it evaluates u where
it likes and returns the new x and the new buffers.

    B images, N tokens, D width. x, u(x) and each buffer: [B, N, D].

To add a rule: one subclass of `MomentumRule` in any file that is imported. Constructor arguments are kept as attributes
of the same name (that is how a rule is written into checkpoints), and `in_range` says what numbers they take; YAML then
says `rule: NameOfTheClass`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

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
