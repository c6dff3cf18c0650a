"""Experts choose tokens (arXiv:2202.09368). Legend of axes: this folder's __init__."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..ranges import COUNT, COUNT_OR_NONE, POSITIVE, in_range
from .dispatch import capacity
from .routing import GROUP, NOISE, LinearGate, RouterLosses


class ExpertChoicePlan(NamedTuple):
    """Every expert takes C tokens of each group; a token may be taken by any number of experts, also none."""

    gates: Tensor  # [G, S, E] softmax over experts
    token: Tensor  # [G, E, C] token of the group in each slot, largest gate first
    weight: Tensor  # [G, E, C] its gate

    def dispatch(self, x: Tensor) -> tuple[Tensor, None]:
        """x: [T, D] -> rows [E*G*C, D], as many for every expert."""
        return x.index_select(0, self._where()), None

    def combine(self, rows: Tensor) -> Tensor:
        """rows: [E*G*C, D] -> [T, D], sums weighted by the gates; 0 for tokens nobody took."""
        weight = self.weight.transpose(0, 1).reshape(-1, 1).to(rows.dtype)
        tokens = rows.new_zeros(self.gates.shape[0] * self.gates.shape[1], rows.shape[-1])
        return tokens.index_add(0, self._where(), rows * weight)

    def _where(self) -> Tensor:
        """[E*G*C] row of x that lies in each slot."""
        groups = torch.arange(self.token.shape[0], device=self.token.device).view(-1, 1, 1)
        return (self.token + groups * self.gates.shape[1]).transpose(0, 1).reshape(-1)

    def assigned(self) -> Tensor:
        """[G, S, E] bool: does this token reach this expert?"""
        reached = torch.zeros_like(self.gates, dtype=torch.bool)
        return reached.scatter(1, self.token.transpose(1, 2), True)

    def load(self) -> Tensor:
        """[E] tokens taken: equal by construction."""
        return self.assigned().sum(dim=(0, 1))

    def dropped(self) -> Tensor:
        """[] share of tokens that no expert took; 0 of none."""
        return 1.0 - self.assigned().any(dim=-1).float().mean() if self.gates.numel() else self.gates.new_zeros(())


@in_range(
    "router.", capacity_factor=POSITIVE.because("experts per token on average"), noise_std=NOISE, group_size=GROUP,
    capacity_multiple_of=COUNT.because("1 is no rounding"),
    capacity=COUNT_OR_NONE.because("a number of slots, or 0 to take them from capacity_factor"),
)  # fmt: skip
class ExpertChoiceRouter(LinearGate):
    """Each expert takes the C tokens of its group with the largest gates, softmax(x W + noise) over experts.

    The reference's NoisyTopItemsPerExpertRouter (google-research/vmoe, vmoe/nn/routing.py at 942a78b): ties go to the
    earlier token, the combine weight is the raw gate, there is no auxiliary loss. Which tokens are taken depends on
    the others of the group, so keep group_size="image" where a logit must depend on its own image alone.

    Args:
        capacity_factor: C is about S*factor/E, so that a token is taken by `factor` experts on average; in (0, 1e6].
        capacity_multiple_of: C is rounded up to a multiple of this, 1 to 1e9 (C at most S); 4 in the reference, 1 in
            Soft MoE's comparison.
        capacity_rounding: How S*factor/E becomes an integer before that.
        noise_std: Noise on the logits while training, N(0, (noise_std / E)^2); in [0, 1e6].
        group_size: "image", or a number of tokens, 1 to 1e9, that divides B*N; holds in evaluation too.
        bfloat16_dispatch: Round tokens to bfloat16 on their way to the experts and back.
        capacity: C itself, 0 to 1e9 (at most S), whatever the factor says; 0 for the factor.
    """

    def __init__(
        self,
        capacity_factor: float = 1.0,
        capacity_multiple_of: int = 4,
        capacity_rounding: Literal["ceil", "round"] = "ceil",
        noise_std: float = 1.0,
        group_size: int | Literal["image"] = "image",
        bfloat16_dispatch: bool = False,
        capacity: int = 0,
    ) -> None:
        super().__init__()
        self.capacity = capacity
        self.capacity_factor, self.capacity_multiple_of = capacity_factor, capacity_multiple_of
        self.capacity_rounding, self.noise_std = capacity_rounding, noise_std
        self.group_size, self.bfloat16_dispatch = group_size, bfloat16_dispatch
        self.check_rounding()

    def experts_per_token(self, num_experts: int, num_tokens: int) -> float:
        if self.capacity:
            size = num_tokens if self.group_size == "image" else self.group_size
            return self.slots(size, num_experts) * num_experts / size
        return min(self.capacity_factor, num_experts)

    def slots(self, group_size: int, num_experts: int) -> int:
        """C; never more than there are tokens."""
        if self.capacity:
            return min(self.capacity, group_size)
        slots = capacity(
            group_size, num_experts, self.capacity_factor, self.capacity_rounding, self.capacity_multiple_of
        )
        return min(slots, group_size)

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[ExpertChoicePlan, RouterLosses]:
        logits = self.logits(x)
        gates = self.grouped(logits if noise is None else logits + noise).softmax(dim=-1)
        weight, token = gates.sort(dim=1, descending=True, stable=True)
        slots = self.slots(*gates.shape[1:])
        plan = ExpertChoicePlan(gates, token[:, :slots].transpose(1, 2), weight[:, :slots].transpose(1, 2))
        clean_gates = gates if noise is None else self.grouped(logits).softmax(dim=-1)
        return plan, RouterLosses(gates.new_zeros(gates.shape[0]), {}, clean_gates)
