"""Post-norm blocks of a language model that thread the carry. Legend of axes: attention.py."""

from typing import Any, Literal, get_args

from torch import Tensor, nn

from ..moe import Router, SparseMlp
from ..momentum import Carry, Coefficients, MomentumRule, ThreadsCarry
from ..momentum.threads import shifted
from .attention import RelativeAttention

Form = Literal["paper", "released"]


class SparseBlock(ThreadsCarry):
    """h = LN(x + attention(x)), then a step of the rule by the experts' update, and norms behind it.

    form paper: x' = LN(step(h)), with Residual a plain post-norm transformer. form released: x' = LN(h + LN(step(h))),
    as the released code has it, in the baseline too: two residual connections and two norms a sparse layer.
    """

    mlp: SparseMlp

    def __init__(
        self,
        width: int,
        num_heads: int,
        drop: float,
        *,
        hidden: int,
        num_experts: int,
        router: Router,
        rule: MomentumRule,
        step: int,
        form: Form,
    ) -> None:
        super().__init__()
        self.attn, self.norm1 = RelativeAttention(width, num_heads, drop), nn.LayerNorm(width)
        self.norm2, self.ls2 = nn.Identity(), nn.Identity()  # names that ThreadsCarry asks for
        self.mlp = SparseMlp(width, hidden, num_experts, router, nn.ReLU, drop, drop_outputs=False)
        self.rule, self.step, self.momentum = rule, step, Coefficients(rule)
        self.norm3 = nn.LayerNorm(width)
        self.norm4 = nn.LayerNorm(width) if form == "released" else None

    def forward(self, x: Tensor, carry: Carry, past: Tensor, distances: Tensor) -> tuple[Tensor, Carry]:
        """x: [B, N, D]; past: [B, L, D], x of the L positions before; distances: [L, d]."""
        h = self.norm1(x + self.attn(x, past, distances))
        moved, carry = self.sparse_step(h, carry, self.mlp.router.sample_noise(h))
        return moved if self.norm4 is None else self.norm4(h + moved), carry


class DenseBlock(nn.Module):
    """GLaM's block between sparse ones: attention and one feed-forward layer, both post-norm."""

    def __init__(self, width: int, num_heads: int, drop: float, *, hidden: int, rule: MomentumRule, step: int) -> None:
        """step: t of the sparse block to come."""
        super().__init__()
        self.attn, self.norm1 = RelativeAttention(width, num_heads, drop), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.drop, self.norm3 = nn.Dropout(drop), nn.LayerNorm(width)
        self.rule, self.step = rule, step

    def forward(self, x: Tensor, carry: Carry, past: Tensor, distances: Tensor) -> tuple[Tensor, Carry]:
        """As SparseBlock's."""
        h = self.norm1(x + self.attn(x, past, distances))

        def u(y: Tensor, shift: Tensor | None = None) -> Tensor:
            return self.fc2(self.drop(self.fc1(shifted(y, shift)).relu()))

        moved, buffers = self.rule.dense_step(h, u, carry.momentum, self.step, self.rule.coefficients())
        return self.norm3(moved), carry._replace(momentum=buffers)


def check_form(form: Any) -> None:
    """Raises ValueError: no such form."""
    if form not in get_args(Form):
        raise ValueError(f"form={form}: use {' or '.join(get_args(Form))}")
