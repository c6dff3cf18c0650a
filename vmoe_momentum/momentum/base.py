"""What a momentum rule is: how one MoE block moves the residual stream (MomentumSMoE, arXiv:2410.14574).

An SMoE layer is read as a step of gradient descent in depth with f = -u as the gradient, u the block's whole update
`drop_path(layer_scale(moe(norm(x))))`. A rule is a function of (x, u, buffers, t, coefficients): it evaluates u where
it likes and returns the new x and the new buffers.

    B images, N tokens, D width. x, u(x) and each buffer: [B, N, D].

To add a rule: one subclass of `MomentumRule`, with a `step`, in any file that is imported. Constructor arguments are
kept as attributes of the same name (that is how a rule is written into checkpoints), and `in_range` says what
numbers they take; YAML then says `rule: NameOfTheClass`.
"""

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

    def step(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        """One step at one MoE block; x, u(x) and the buffers are float32, or float64.

        u: the update as a function of the residual stream. The auxiliary loss and the routing statistics of the block
        are those of its *last* evaluation, so evaluate last where the step is made. t: 1, 2, ... counts MoE blocks.
        """
        raise NotImplementedError(f"{type(self).__name__}.step: a rule says how it moves the stream")

    def __call__(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        """The step in float32 where the stream x is of a half type, rounded to that type once, at the end.

        In halves a rule goes wrong without a word: an eps of 1e-8 is 0 in float16, squares of small updates vanish.
        """
        kind, wide = x.dtype, at_least_float32(x.dtype)
        if not isinstance(kind, torch.dtype) or kind == wide:  # while timm's fx tools trace, types are not known
            return self.step(x, u, buffers, t, coefficients)
        buffers = tuple(buffer.to(wide) for buffer in buffers)
        moved, buffers = self.step(x.to(wide), lambda y: u(y.to(kind)).to(wide), buffers, t, coefficients)
        return moved.to(kind), buffers

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for half types; others as they are."""
    return torch.promote_types(dtype, torch.float32)


def zeros(x: Tensor) -> Tensor:
    """A buffer before the first block, in float32 at least. x: [B, N, D]."""
    return torch.zeros_like(x, dtype=at_least_float32(x.dtype))
