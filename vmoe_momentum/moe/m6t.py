"""M6-T's router. Legend of axes: this folder's __init__."""

from typing import Literal

import torch
from torch import Tensor

from ..ranges import COUNT, in_range
from .dispatch import TopKPlan
from .paths import Fill
from .routing import WEIGHT, RouterLosses
from .token_choice import SHARED, Factor, Rounding, TokenChoice


@in_range("router.", **SHARED, num_prototypes=COUNT, gshard_loss_weight=WEIGHT)
class M6TRouter(TokenChoice):
    """M6-T's prototypes: k groups of E/k experts, top-1 in each, outputs summed (arXiv:2105.15082).

    Each prototype has a softmax of its own over its own experts; the combine weight is the raw gate. Experts
    i*E/k ... (i+1)*E/k - 1 form prototype i. The auxiliary loss is the mean over prototypes of the GShard balance loss.

    Args:
        num_prototypes: k, 1 to 1e9, a divisor of the number of experts; a token reaches one expert in each.
        capacity_factor: As for TopKRouter with K = num_prototypes, in (0, 1e6].
        eval_capacity_factor: As for TopKRouter, in (0, 1e6].
        capacity_multiple_of: As for TopKRouter, 1 to 1e9.
        capacity_rounding: As for TopKRouter.
        group_size: As for TopKRouter, 1 to 1e9.
        gshard_loss_weight: Weight of the balance loss, in [0, 1e6]; 0 leaves it out.
        bfloat16_dispatch: As for TopKRouter.
    """

    def __init__(
        self,
        num_prototypes: int = 2,
        capacity_factor: Factor = 1.25,
        eval_capacity_factor: Factor = "dropless",
        capacity_multiple_of: int = 4,
        capacity_rounding: Rounding = "ceil",
        group_size: int | Literal["image"] = "image",
        gshard_loss_weight: float = 0.01,
        bfloat16_dispatch: bool = False,
    ) -> None:
        grouping = (capacity_multiple_of, capacity_rounding, group_size, bfloat16_dispatch)
        super().__init__(capacity_factor, eval_capacity_factor, *grouping)
        self.num_prototypes, self.gshard_loss_weight = num_prototypes, gshard_loss_weight

    def choices(self) -> int:
        return self.num_prototypes

    def add_weights(self, width: int, num_experts: int) -> None:
        if num_experts % self.num_prototypes:
            raise ValueError(
                f"router.num_prototypes={self.num_prototypes} does not divide num_experts={num_experts}; change either"
            )
        super().add_weights(width, num_experts)

    def route(
        self, logits: Tensor, noise: Tensor | None, slots: int | None, fill: Fill = "packed"
    ) -> tuple[TopKPlan, RouterLosses]:
        """logits: [G, S, E]."""
        prototypes = logits.unflatten(-1, (self.num_prototypes, -1)).softmax(dim=-1)  # [G, S, k, E/k]
        size = prototypes.shape[-1]
        # argmax of equal values is not fixed by torch; a stable sort is
        sorted_gates, sorted_index = prototypes.sort(dim=-1, descending=True, stable=True)
        best = sorted_index[..., 0]
        first = torch.arange(self.num_prototypes, device=logits.device) * size
        gates = prototypes.flatten(-2)
        plan = TopKPlan.build(gates, best + first, sorted_gates[..., 0], slots, fill=fill)
        return plan, self.balanced(*((prototypes[:, :, i], best[..., i : i + 1]) for i in range(self.num_prototypes)))
