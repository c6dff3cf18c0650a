"""GShard's router. Legend of axes: this folder's __init__."""

from typing import Literal

import torch
from torch import Tensor

from ..ranges import in_range
from .dispatch import TopKPlan
from .paths import Fill
from .routing import WEIGHT, RouterLosses
from .token_choice import SHARED, Factor, Rounding, TokenChoice


@in_range("router.", **SHARED, gshard_loss_weight=WEIGHT)
class GShardRouter(TokenChoice):
    """GShard's top-2 gating with random routing (arXiv:2006.16668, Algorithm 1).

    Each token takes its two best experts with weights g1, g2 divided by g1 + g2. While training the second is used with
    probability 2 g2 only, and takes no slot when it is not: so Top2GatingOnLogits of lingvo and praxis, with
    second_expert_policy "random" and threshold 0.5. All first choices queue before all second ones. In evaluation,
    ours: always both, nothing random.

    Args:
        capacity_factor: As for TopKRouter with K = 2, in (0, 1e6].
        eval_capacity_factor: As for TopKRouter, in (0, 1e6].
        capacity_multiple_of: As for TopKRouter, 1 to 1e9.
        capacity_rounding: As for TopKRouter.
        group_size: As for TopKRouter, 1 to 1e9.
        gshard_loss_weight: Weight of the balance loss, E * sum_e f_e m_e, in [0, 1e6]; 0 leaves it out.
        bfloat16_dispatch: As for TopKRouter.
    """

    def __init__(
        self,
        capacity_factor: Factor = 1.0,
        eval_capacity_factor: Factor = "dropless",
        capacity_multiple_of: int = 4,
        capacity_rounding: Rounding = "ceil",
        group_size: int | Literal["image"] = "image",
        gshard_loss_weight: float = 0.01,
        bfloat16_dispatch: bool = False,
    ) -> None:
        grouping = (capacity_multiple_of, capacity_rounding, group_size, bfloat16_dispatch)
        super().__init__(capacity_factor, eval_capacity_factor, *grouping)
        self.gshard_loss_weight = gshard_loss_weight

    def choices(self) -> int:
        return 2

    def add_weights(self, width: int, num_experts: int) -> None:
        if num_experts < 2:
            raise ValueError(f"num_experts={num_experts}: GShardRouter sends a token to two experts; use 2 or more")
        super().add_weights(width, num_experts)

    def sample_noise(self, x: Tensor) -> Tensor | None:
        """[B, N, 1] uniform in [0, 1), while training."""
        return torch.rand(*x.shape[:2], 1, device=x.device) if self.training else None

    def route(
        self, logits: Tensor, noise: Tensor | None, slots: int | None, fill: Fill = "packed"
    ) -> tuple[TopKPlan, RouterLosses]:
        """logits: [G, S, E]; noise: [G, S, 1], uniform."""
        gates = logits.softmax(dim=-1)
        sorted_gates, sorted_index = gates.sort(dim=-1, descending=True, stable=True)
        weight, expert = sorted_gates[..., :2], sorted_index[..., :2]
        weight = weight / weight.sum(dim=-1, keepdim=True)
        wanted = None
        if noise is not None:
            second = noise < 2.0 * weight[..., 1:]
            wanted = torch.cat([torch.ones_like(second), second], dim=-1)
        plan = TopKPlan.build(gates, expert, weight, slots, wanted=wanted, fill=fill)
        return plan, self.balanced((gates, expert))
