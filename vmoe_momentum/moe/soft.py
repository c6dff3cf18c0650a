"""Soft MoE: every slot is a mixture of tokens, every token a mixture of slots (arXiv:2308.00951).

Legend of axes: this folder's __init__; P slots of an expert in a group.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..ranges import COUNT, in_range
from .routing import GROUP, NOISE, Router, RouterLosses, without_autocast


class SoftPlan(NamedTuple):
    dispatch_weights: Tensor  # [G, S, E, P] sums to 1 over the tokens S
    combine_weights: Tensor  # [G, S, E, P] sums to 1 over all slots (E, P)

    @property
    def gates(self) -> Tensor:
        """[G, S, E] what an expert's slots contribute to a token."""
        return self.combine_weights.sum(dim=-1)

    def dispatch(self, x: Tensor) -> tuple[Tensor, None]:
        """x: [T, D] -> rows [E*G*P, D] ordered (expert, group, slot), as many for every expert."""
        num_groups, group_size, num_experts, slots = self.dispatch_weights.shape
        tokens = x.reshape(num_groups, group_size, x.shape[-1])
        rows = torch.einsum("gsep,gsd->egpd", self.dispatch_weights.to(x.dtype), tokens)
        return rows.reshape(num_experts * num_groups * slots, x.shape[-1]), None

    def combine(self, rows: Tensor) -> Tensor:
        """rows: [E*G*P, D] -> [T, D]."""
        num_groups, group_size, num_experts, slots = self.combine_weights.shape
        rows = rows.reshape(num_experts, num_groups, slots, rows.shape[-1])
        tokens = torch.einsum("gsep,egpd->gsd", self.combine_weights.to(rows.dtype), rows)
        return tokens.reshape(num_groups * group_size, rows.shape[-1])

    def assigned(self) -> Tensor:
        """[G, S, E] bool: every token reaches every expert."""
        return torch.ones_like(self.gates, dtype=torch.bool)

    def load(self) -> Tensor:
        """[E] summed weight of each expert in the tokens' outputs."""
        return self.gates.sum(dim=(0, 1))

    def dropped(self) -> Tensor:
        """[] nothing is."""
        return self.combine_weights.new_zeros(())


@in_range("router.", slots_per_expert=COUNT, noise_std=NOISE, group_size=GROUP)
class SoftRouter(Router):
    """logits = scale * <x / |x|, mu / |mu|>; dispatch is their softmax over tokens, combine over all slots jointly.

    The reference's SoftRouter (google-research/vmoe, vmoe/projects/soft_moe/router.py at 942a78b): |v| is
    sqrt(sum v^2 + 1e-6), the slots mix the *unnormalised* tokens, there is no auxiliary loss. Its `capacity_factor` is
    a way to say slots_per_expert = round(S * factor / E).

    Args:
        slots_per_expert: P, 1 to 1e9. The cost is that of G*E*P tokens, whatever E is; the paper's models have 1.
        noise_std: Noise on the logits while training, N(0, noise_std^2); in [0, 1e6].
        group_size: "image", or a number of tokens, 1 to 1e9, that divides B*N; holds in evaluation too.
        bfloat16_dispatch: Round tokens to bfloat16 on their way to the experts and back; the reference always does.
    """

    def __init__(
        self,
        slots_per_expert: int = 1,
        noise_std: float = 0.0,
        group_size: int | Literal["image"] = "image",
        bfloat16_dispatch: bool = False,
    ) -> None:
        super().__init__()
        self.slots_per_expert, self.noise_std = slots_per_expert, noise_std
        self.group_size, self.bfloat16_dispatch = group_size, bfloat16_dispatch

    def add_weights(self, width: int, num_experts: int) -> None:
        self.mu = nn.Parameter(torch.empty(num_experts, self.slots_per_expert, width))
        self.scale = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Flax's lecun_normal of an array (D, E, P): fan-in D*E. Only the direction of mu matters.
        num_experts, _, width = self.mu.shape
        std = (num_experts * width) ** -0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.mu, std=std, a=-2 * std, b=2 * std)
        nn.init.ones_(self.scale)

    def experts_per_token(self, num_experts: int, num_tokens: int) -> float:
        return num_experts

    def no_weight_decay(self) -> set[str]:
        return {"mu"}  # as published: its decay rules name kernels only

    def sample_noise(self, x: Tensor) -> Tensor | None:
        if not self.training or self.noise_std == 0.0:
            return None
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.randn(*x.shape[:2], *self.mu.shape[:2], device=x.device, dtype=dtype) * self.noise_std

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[SoftPlan, RouterLosses]:
        with without_autocast(x.device):
            dtype = torch.promote_types(x.dtype, torch.float32)
            mu = _normalize(self.mu.to(dtype)) * self.scale.to(dtype)
            logits = torch.einsum("bnd,epd->bnep", _normalize(x.to(dtype)), mu)
        logits = self.grouped(logits if noise is None else logits + noise)
        combine = logits.flatten(2).softmax(dim=-1).reshape(logits.shape)
        plan = SoftPlan(dispatch_weights=logits.softmax(dim=1), combine_weights=combine)
        return plan, RouterLosses(logits.new_zeros(logits.shape[0]), {})


def _normalize(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + 1e-6)
