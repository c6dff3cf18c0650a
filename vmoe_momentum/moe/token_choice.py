"""Routers in which tokens choose experts, and V-MoE's among them.

Legend of axes: this folder's __init__.
"""

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from ..ranges import COUNT, COUNT_OR_NONE, POSITIVE, in_range
from . import losses
from .dispatch import TopKPlan, capacity
from .paths import Fill, fill
from .routing import GROUP, NOISE, WEIGHT, LinearGate, RouterLosses

Factor = float | Literal["dropless"]
Rounding = Literal["ceil", "round"]

FACTOR = POSITIVE.or_("dropless")
SHARED = {  # what all of them take, see TokenChoice
    "capacity_factor": FACTOR, "eval_capacity_factor": FACTOR, "group_size": GROUP,
    "capacity_multiple_of": COUNT.because("1 is no rounding"),
}  # fmt: skip


class TokenChoice(LinearGate):
    """What they share: each token asks K experts once each, and experts with finite capacity drop the surplus.

    A subclass says how many choices a token has, and routes. Its arguments of these names are TopKRouter's.
    """

    gshard_loss_weight: float

    def __init__(
        self,
        capacity_factor: Factor,
        eval_capacity_factor: Factor,
        capacity_multiple_of: int,
        capacity_rounding: Rounding,
        group_size: int | Literal["image"],
        bfloat16_dispatch: bool,
    ) -> None:
        super().__init__()
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.capacity_multiple_of, self.capacity_rounding = capacity_multiple_of, capacity_rounding
        self.group_size, self.bfloat16_dispatch = group_size, bfloat16_dispatch
        self.check_rounding()

    @abstractmethod
    def choices(self) -> int:
        """K, the experts one token asks."""

    def experts_per_token(self, num_experts: int, num_tokens: int) -> float:
        return self.choices()

    def balanced(self, *choices: tuple[Tensor, Tensor]) -> RouterLosses:
        """For routers whose one loss is GShard's, weighted by their gshard_loss_weight.

        choices: gates [G, S, E] and experts [G, S, K], best first, of each part of the gate; the loss is their mean.
        """
        if self.gshard_loss_weight == 0:
            return RouterLosses(choices[0][0].new_zeros(choices[0][0].shape[0]), {})
        balance = torch.stack([losses.gshard_loss(*choice) for choice in choices]).mean(dim=0)
        return RouterLosses(self.gshard_loss_weight * balance, {"gshard": balance})

    def slots(self, group_size: int, num_experts: int) -> int | None:
        """Capacity C in this mode; None where nothing can be dropped, as a token asks an expert at most once."""
        setting = "capacity_factor" if self.training else "eval_capacity_factor"
        factor = getattr(self, setting)
        if factor == "dropless":
            return None
        assignments, rounding = group_size * self.choices(), (self.capacity_rounding, self.capacity_multiple_of)
        slots = capacity(assignments, num_experts, factor, *rounding, setting)
        return None if slots >= group_size else slots

    def takes_tokens_alone(self, num_tokens: int, num_experts: int) -> bool:
        return self.slots(self._tokens_together(num_tokens), num_experts) is None

    def images_together(self, num_tokens: int, num_experts: int) -> int:
        # In evaluation without dropping each image is a group of its own: then any batch size will do.
        alone = not self.training and self.takes_tokens_alone(num_tokens, num_experts)
        return 1 if alone else super().images_together(num_tokens, num_experts)

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[TopKPlan, RouterLosses]:
        logits = self.logits(x)
        slots = self.slots(self._tokens_together(x.shape[1]), logits.shape[-1])
        if self.group_size != "image" and (self.training or slots is not None):
            logits = self.grouped(logits)
        if noise is not None:
            noise = noise.reshape(*logits.shape[:2], noise.shape[-1])
        return self.route(logits, noise, slots, fill(x, self.even))

    def _tokens_together(self, num_tokens: int) -> int:
        return num_tokens if self.group_size == "image" else self.group_size

    @abstractmethod
    def route(
        self, logits: Tensor, noise: Tensor | None, slots: int | None, fill: Fill = "packed"
    ) -> tuple[TopKPlan, RouterLosses]:
        """Everything after the gate's matrix product.

        logits: [G, S, E]; noise: this router's, [G, S, any]; slots: C, None where nothing is dropped; fill: of
        the rows, see paths.py.
        """


@in_range(
    "router.", **SHARED, noise_std=NOISE, top_k=COUNT.because("1 or 2 in V-MoE"),
    capacity=COUNT_OR_NONE.because("a number of slots, or 0 to take them from capacity_factor"),
    importance_loss_weight=WEIGHT, load_loss_weight=WEIGHT, gshard_loss_weight=WEIGHT,
)  # fmt: skip
class TopKRouter(TokenChoice):
    """V-MoE's noisy top-k token choice (arXiv:2106.05974, section 2 and appendix A.2).

    gates = softmax(x W + noise) over all experts, *before* the choice; each token takes the K largest (the lower expert
    on a tie) and combines their outputs with the raw gates.

    Args:
        top_k: Experts chosen by each token, 1 to 1e9 and at most E.
        noise_std: Noise on the logits while training, N(0, (noise_std / E)^2); in [0, 1e6].
        renormalize: Divide a token's combine weights by their sum over its K choices. Not in V-MoE.
        capacity_factor: While training, an expert takes about S*K*factor/E assignments of a group, the factor in
            (0, 1e6]; the rest is dropped. "dropless" drops nothing.
        eval_capacity_factor: The same in evaluation, in (0, 1e6]. Where nothing can be dropped ("dropless", the
            default, or a factor of E/K and more) each image is routed by itself, whatever group_size says: a logit
            never depends on batch mates. V-MoE-S/32 evaluates with 4.0 = E/K.
        capacity_multiple_of: Capacity is rounded up to a multiple of this, 1 to 1e9; the reference's default is 4.
        capacity_rounding: How S*K*factor/E becomes an integer before that.
        capacity: This many slots an expert and group, 0 to 1e9, in both modes and whatever the factors say; 0 for the
            factors.
        batch_priority: Full experts keep the tokens with the largest gate instead of the first ones (BPR).
        group_size: Tokens routed together, with capacity and losses of their own: "image", or 1 to 1e9, a divisor of
            B*N (the reference trains with 8 images a group, so 8*N). A group may cut through images.
        importance_loss_weight: Weight of the importance loss in the auxiliary loss, in [0, 1e6]; 0 leaves it out.
        load_loss_weight: The same for the load loss, in [0, 1e6], which exists only while noise is added.
        gshard_loss_weight: The same for the GShard balance loss, in [0, 1e6].
        bfloat16_dispatch: Round tokens to bfloat16 on their way to the experts and back, as the reference's TPU
            recipes do; the experts compute in the network's own type.
        gate_bias: Add a bias to the logits, as sparse language models do. Not in V-MoE.
    """

    def __init__(
        self,
        top_k: int = 2,
        noise_std: float = 1.0,
        renormalize: bool = False,
        capacity_factor: Factor = 1.05,
        eval_capacity_factor: Factor = "dropless",
        capacity_multiple_of: int = 4,
        capacity_rounding: Rounding = "ceil",
        capacity: int = 0,
        batch_priority: bool = False,
        group_size: int | Literal["image"] = "image",
        importance_loss_weight: float = 0.005,
        load_loss_weight: float = 0.005,
        gshard_loss_weight: float = 0.0,
        bfloat16_dispatch: bool = False,
        gate_bias: bool = False,
    ) -> None:
        grouping = (capacity_multiple_of, capacity_rounding, group_size, bfloat16_dispatch)
        super().__init__(capacity_factor, eval_capacity_factor, *grouping)
        self.gate_bias = gate_bias
        self.top_k, self.noise_std, self.renormalize = top_k, noise_std, renormalize
        self.capacity, self.batch_priority = capacity, batch_priority
        self.importance_loss_weight, self.load_loss_weight = importance_loss_weight, load_loss_weight
        self.gshard_loss_weight = gshard_loss_weight

    def choices(self) -> int:
        return self.top_k

    def add_weights(self, width: int, num_experts: int) -> None:
        if self.top_k > num_experts:
            raise ValueError(f"router.top_k={self.top_k} is more than num_experts={num_experts}; use 1..{num_experts}")
        super().add_weights(width, num_experts)

    def slots(self, group_size: int, num_experts: int) -> int | None:
        if self.capacity:
            return self.capacity if self.capacity < group_size else None
        return super().slots(group_size, num_experts)

    def route(
        self, logits: Tensor, noise: Tensor | None, slots: int | None, fill: Fill = "packed"
    ) -> tuple[TopKPlan, RouterLosses]:
        """logits, noise: [G, S, E]."""
        noisy = logits if noise is None else logits + noise
        clean_gates = logits.softmax(dim=-1)
        gates = clean_gates if noise is None else noisy.softmax(dim=-1)
        # A stable sort, not topk: on equal gates the lower expert wins, everywhere.
        sorted_gates, sorted_index = gates.sort(dim=-1, descending=True, stable=True)
        weight, expert = sorted_gates[..., : self.top_k], sorted_index[..., : self.top_k]
        if self.renormalize:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        plan = TopKPlan.build(gates, expert, weight, slots, self.batch_priority, fill=fill)

        # Left out rather than multiplied by zero: a loss that is not wanted costs time and may be ill-defined.
        parts = {}
        if self.importance_loss_weight > 0:
            parts["importance"] = losses.importance_loss(clean_gates)
        if self.gshard_loss_weight > 0:
            parts["gshard"] = losses.gshard_loss(gates, expert)
        if self.load_loss_weight > 0 and noise is not None:
            parts["load"] = losses.load_loss(logits, noisy, expert, self.noise_std / logits.shape[-1])
        wanted = [getattr(self, f"{name}_loss_weight") * loss for name, loss in parts.items()]
        total = sum(wanted[1:], wanted[0]) if wanted else logits.new_zeros(logits.shape[0])
        return plan, RouterLosses(total, parts, clean_gates)
