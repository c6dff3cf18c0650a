"""Blocks whose sparse MLP moves the residual stream by a momentum rule, whatever they are made of otherwise."""

from torch import Tensor, nn

from .base import MomentumRule
from .carry import Carry
from .coefficients import Coefficients


class ThreadsCarry(nn.Module):
    """A block with a sparse step: `x, carry = self.sparse_step(x, carry, noise)`.

    Its parts have these names, by which instruments find them; nn.Identity() where there is none:
    norm2 (before the experts), mlp (a SparseMlp), ls2 (behind it: its output is u), norm3 (behind the step).

    B sequences, N tokens, D width.
    """

    rule: MomentumRule
    step: int  # t of the rule, 1 where momentum starts, 0 for a plain residual connection
    momentum: Coefficients
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    norm3: nn.Module

    def sparse_step(
        self, x: Tensor, carry: Carry, noise: Tensor | None, drop_mask: Tensor | None = None
    ) -> tuple[Tensor, Carry]:
        """x: [B, N, D]. noise: the router's, drawn once however often the rule evaluates u. drop_mask: [B, 1, 1], a
        factor on u, not on the momentum gathered."""
        found = []

        def u(y: Tensor, shift: Tensor | None = None) -> Tensor:
            update, aux_loss, gates = self.mlp(shifted(self.norm2(y), shift), noise)
            found.append((aux_loss, gates))
            update = self.ls2(update)
            return update if drop_mask is None else update * drop_mask

        if self.step == 0:
            x, buffers = x + u(x), carry.momentum
        else:
            buffers = self.rule.init(x) if self.step == 1 else carry.momentum
            x, buffers = self.rule(x, u, buffers, self.step, self.momentum())
        aux_loss, gates = found[-1]
        asked = None if carry.gates is None else (*carry.gates, gates)
        return self.norm3(x), Carry(buffers, carry.aux_loss + aux_loss, asked)


def shifted(x: Tensor, shift: Tensor | None) -> Tensor:
    """In the type of x; without a shift x itself."""
    return x if shift is None else x + shift.to(x.dtype)
