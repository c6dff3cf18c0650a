"""What a momentum rule is: how one MoE block moves the residual stream (MomentumSMoE, arXiv:2410.14574).

An SMoE layer is read as a step of gradient descent in depth with f = -u as the gradient, u the block's whole update
`drop_path(layer_scale(moe(norm(x))))`. A rule is a function of (x, u, buffers, t, coefficients): it evaluates u where
it likes and returns the new x and the new buffers. u takes a second argument, what is added to norm(x):
`u(x, shift) = drop_path(layer_scale(moe(norm(x) + shift)))`.

    B images, N tokens, D width. x, u(x) and each buffer: [B, N, D].

To add a rule: one subclass of `MomentumRule`, with a `step`, in any file that is imported. Constructor arguments are
kept as attributes of the same name (that is how a rule is written into checkpoints), and `in_range` says what
numbers they take; YAML then says `rule: NameOfTheClass`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

Buffers = tuple[Tensor, ...]
LookAhead = Literal["before_norm", "after_norm"]
Scalars = Mapping[str, float | Tensor]


class Update(Protocol):
    """The block's update at x, with `shift` added behind its norm; [B, N, D] all three."""

    def __call__(self, x: Tensor, shift: Tensor | None = None, /) -> Tensor: ...


class MomentumRule(ABC):
    """Base of all rules.

    `coefficients()` names the scalars of the update. `learned` names those that each block owns as parameters instead
    (`blocks.i.momentum.*`); `unit_interval` those of them that stay strictly inside (0, 1), through a sigmoid.
    """

    unit_interval: tuple[str, ...] = ("mu",)

    @property
    def learned(self) -> tuple[str, ...]:
        return ()

    @abstractmethod
    def coefficients(self) -> dict[str, float]:
        """The constants of the update by name; also the initial values where they are learned."""

    @abstractmethod
    def init(self, x: Tensor) -> Buffers:
        """Zero buffers before the first MoE block. x: [B, N, D]."""

    def step(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        """One step at one MoE block; x, u(x) and the buffers are float32, or float64.

        u: the update as a function of the residual stream. The auxiliary loss and the routing statistics of the block
        are those of its last evaluation, so evaluate last where the step is made. t: 1, 2, ... counts MoE blocks.
        """
        raise NotImplementedError(f"{type(self).__name__}.step: a rule says how it moves the stream")

    def dense_step(
        self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars
    ) -> tuple[Tensor, Buffers]:
        """What a dense block makes of its MLP's update u. t: of the MoE block to come, 0 where that has no momentum.

        A plain residual connection that the buffers pass unchanged, unless the rule says otherwise. Types are the
        stream's, and the buffers' float32.
        """
        return x + u(x), buffers

    def __call__(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> tuple[Tensor, Buffers]:
        """The step in float32 where the stream x is of a half type, rounded to that type once, at the end.

        In halves a rule goes wrong without a word: an eps of 1e-8 is 0 in float16, squares of small updates vanish.
        """
        kind, wide = x.dtype, at_least_float32(x.dtype)
        if not isinstance(kind, torch.dtype) or kind == wide:  # while timm's fx tools trace, types are not known
            return self.step(x, u, buffers, t, coefficients)
        buffers = tuple(buffer.to(wide) for buffer in buffers)

        def widened(y: Tensor, shift: Tensor | None = None) -> Tensor:
            return (u(y.to(kind)) if shift is None else u(y.to(kind), shift)).to(wide)

        moved, buffers = self.step(x.to(wide), widened, buffers, t, coefficients)
        return moved.to(kind), buffers

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in vars(self).items())})"


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32 for half types; others as they are."""
    return torch.promote_types(dtype, torch.float32)


def zeros(x: Tensor) -> Tensor:
    """A buffer before the first block, in float32 at least. x: [B, N, D]."""
    return torch.zeros_like(x, dtype=at_least_float32(x.dtype))


class LooksAhead(MomentumRule):
    """Base of the rules that evaluate the layer ahead of where they stand, by `distance` along the momentum.

    look_ahead: before_norm, in the residual stream, u(x + ahead), as the papers write it; or after_norm, u(x, ahead):
    what the experts and the router are given is norm(x) + ahead, and so are dense blocks' MLPs, as in the released
    vision code of MomentumSMoE (its robust rule). What is carried there is in the stream's scale, what it is added to
    in the norm's.
    """

    look_ahead: LookAhead

    def _keep_look_ahead(self, look_ahead: LookAhead) -> None:
        """Raises ValueError: no such place."""
        if look_ahead not in get_args(LookAhead):
            name = f"{type(self).__name__}.look_ahead"
            raise ValueError(f"{name}={look_ahead}: use {' or '.join(get_args(LookAhead))}")
        self.look_ahead = look_ahead

    @abstractmethod
    def distance(self, t: int, coefficients: Scalars) -> float | Tensor:
        """Of the look-ahead, in units of the momentum, at MoE block t."""

    def ahead(self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars) -> Tensor:
        """u, evaluated ahead."""
        shift = self.distance(t, coefficients) * buffers[0]
        return u(x + shift) if self.look_ahead == "before_norm" else u(x, shift)

    def dense_step(
        self, x: Tensor, u: Update, buffers: Buffers, t: int, coefficients: Scalars
    ) -> tuple[Tensor, Buffers]:
        if self.look_ahead == "before_norm":
            return x + u(x), buffers
        return x + self.ahead(x, u, buffers, t, coefficients), buffers
