"""Sparse layers of other people, for moe_layer.py: [B, N, D] -> [B, N, D], E experts of width F, K of them a token.

The packages lie in a folder of their own (`make bench-peers`), as none of them is needed otherwise:
transformers, st-moe-pytorch, mixture-of-experts, soft-moe-pytorch. One that is not there is left out, by name.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn


class Shape(NamedTuple):
    images: int  # B
    tokens: int  # N
    width: int  # D
    hidden: int  # F
    experts: int  # E
    top_k: int = 2  # K

    def __str__(self) -> str:
        return f"T={self.images * self.tokens} D={self.width} F={self.hidden} E={self.experts} K={self.top_k}"


class Loop(nn.Module):
    """What most people write first: a softmax, top-k, and a loop over experts that pick their rows."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate, self.top_k = nn.Linear(s.width, s.experts, bias=False), s.top_k
        self.experts = nn.ModuleList(Mlp(s.width, s.hidden, act_layer=GELUTanh) for _ in range(s.experts))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weight, chosen = self.gate(tokens).softmax(dim=-1).topk(self.top_k)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(chosen == number)
            out = out.index_add(0, token, expert(tokens[token]) * weight[token, rank, None])
        return out.view_as(x)


class OneHot(nn.Module):
    """GShard's form: dispatch and combine as products with [B, N, E, C], capacity factor 1.05, an image a group."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.gate, self.s = nn.Linear(s.width, s.experts, bias=False), s
        self.capacity = -(-s.tokens * s.top_k * 105 // (100 * s.experts))
        self.w1 = nn.Parameter(torch.randn(s.experts, s.width, s.hidden) * s.width**-0.5)
        self.w2 = nn.Parameter(torch.randn(s.experts, s.hidden, s.width) * s.hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(dim=-1).topk(self.s.top_k)  # [B, N, K]
        hot = F.one_hot(chosen.transpose(1, 2).flatten(1), self.s.experts)  # first choices first: [B, K*N, E]
        place = ((hot.cumsum(1) - 1) * hot).sum(-1)
        slot = F.one_hot(place.clamp_max(self.capacity), self.capacity + 1)[..., : self.capacity]
        mask = (hot.unsqueeze(-1) * slot.unsqueeze(-2)).view(len(x), self.s.top_k, -1, self.s.experts, self.capacity)
        mask = mask.to(x.dtype)
        rows = torch.einsum("bknec,bnd->ebcd", mask, x).flatten(1, 2)
        rows = F.gelu(rows @ self.w1, approximate="tanh") @ self.w2
        rows = rows.view(self.s.experts, len(x), self.capacity, -1)
        return torch.einsum("bknec,bnk,ebcd->bnd", mask, weight, rows)


def transformers_block(implementation: str) -> Callable[[Shape], nn.Module]:
    """Mixtral's block, whose experts have three matrices: F is two thirds, so that the products are as many."""

    def build(s: Shape) -> nn.Module:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=s.width, intermediate_size=s.hidden * 2 // 3 // 16 * 16, num_local_experts=s.experts,
            num_experts_per_tok=s.top_k, hidden_act="gelu_pytorch_tanh", experts_implementation=implementation,
        )  # fmt: skip
        block = MixtralSparseMoeBlock(config)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        return block

    return build


def st_moe(s: Shape) -> nn.Module:
    from st_moe_pytorch import MoE

    experts = nn.ModuleList(Mlp(s.width, s.hidden, act_layer=GELUTanh) for _ in range(s.experts))
    factor = 1.05 * s.top_k  # theirs is of tokens, not of assignments
    return First(MoE(s.width, s.experts, gating_top_n=s.top_k, experts=experts, is_distributed=False,
                     capacity_factor_train=factor, capacity_factor_eval=factor))  # fmt: skip


def mixture_of_experts(s: Shape) -> nn.Module:
    from mixture_of_experts import MoE

    factor = 1.05 * s.top_k
    return First(MoE(s.width, s.experts, hidden_dim=s.hidden, activation=GELUTanh,
                     capacity_factor_train=factor, capacity_factor_eval=factor))  # fmt: skip


def soft_moe(s: Shape) -> nn.Module:
    from soft_moe_pytorch import SoftMoE

    slots = s.top_k * s.tokens // s.experts
    return SoftMoE(s.width, num_slots=slots, num_experts=s.experts, expert_mult=s.hidden / s.width,
                   is_distributed=False, offload_unused_experts_to_cpu=False)  # fmt: skip


class First(nn.Module):
    """Of a layer's outputs and losses."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


PEERS: dict[str, Callable[[Shape], nn.Module]] = {
    "per-expert loop": Loop,
    "one-hot einsum": OneHot,
    "transformers eager": transformers_block("eager"),
    "transformers grouped_mm": transformers_block("grouped_mm"),
    "transformers batched_mm": transformers_block("batched_mm"),
    "st-moe-pytorch": st_moe,
    "mixture-of-experts": mixture_of_experts,
    "soft-moe-pytorch": soft_moe,
}
