"""Causal attention over the L positions before each, with learned relative positions.

    B streams, N tokens of a block of text, L positions looked back on, D width, H heads, d = D / H.

Source of the form: the released language code of MomentumSMoE (adaptive-span attention of Sukhbaatar et al.,
arXiv:1905.07799, without adaptive spans): a token sees what came before it, not itself.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RelativeAttention(nn.Module):
    """softmax((q k + q r) / sqrt(d)) v, r one learned vector per distance 1 to L, shared by heads (and layers)."""

    def __init__(self, width: int, num_heads: int, drop: float) -> None:
        super().__init__()
        self.num_heads, self.drop = num_heads, drop
        self.q, self.kv, self.proj = (nn.Linear(width, size, bias=False) for size in (width, 2 * width, width))

    def forward(self, x: Tensor, past: Tensor, distances: Tensor) -> Tensor:
        """x: [B, N, D]; past: [B, L, D], what came before x at this depth; distances: [L, d], of the farthest first."""
        size, span = x.shape[1], past.shape[1]
        q = self._heads(self.q(x))
        k, v = (self._heads(part) for part in self.kv(torch.cat([past, x], dim=1)).chunk(2, dim=-1))
        bias = banded(q @ distances.to(q.dtype).T) * q.shape[-1] ** -0.5
        drop = self.drop if self.training else 0.0
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=drop)
        assert k.shape[2] == size + span
        return self.proj(found.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, d]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def banded(scores: Tensor) -> Tensor:
    """[..., N, L], of each token with the L before it, the farthest first -> [..., N, L + N] over all keys in order.

    Token n looks at keys n to n + L - 1; what it must not see is -inf. Rows of L + N + 1 read as rows of L + N move one
    to the right each.
    """
    *lead, size, span = scores.shape
    padded = F.pad(scores, (0, size + 1), value=-torch.inf)
    return padded.flatten(-2)[..., : size * (span + size)].unflatten(-1, (size, span + size))
