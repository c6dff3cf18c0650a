"""Routers: tokens -> (plan, losses). Legend of axes: this folder's __init__.

To add a router: one subclass of `Router` here (or in a file of its own, imported by __init__). Constructor arguments
are kept as attributes of the same name (that is how a router is written into checkpoints); YAML then says
`router: {class_path: NameOfTheClass, init_args: {...}}`. One such settings object serves a whole network: each layer
takes `for_layer(width, num_experts)`, a copy with weights of its own.
"""

import copy
import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import losses
from .plan import TopKPlan, capacity


class RouterLosses(NamedTuple):
    auxiliary: Tensor  # [G] weighted sum, what training adds to its loss
    parts: dict[str, Tensor]  # each [G], unweighted, for the log


class Router(nn.Module):
    """Base of all routers. Calls give `(plan, losses)`; the plan has dispatch, combine and assigned."""

    def add_weights(self, width: int, num_experts: int) -> None:
        """Create and initialise this layer's parameters. Raises ValueError: settings that E rules out."""
        raise NotImplementedError

    def sample_noise(self, x: Tensor) -> Tensor | None:
        """This step's routing noise, None for none. Drawn once a block, however often a rule evaluates the layer."""
        return None

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[TopKPlan, RouterLosses]:
        """x: [B, N, D]."""
        raise NotImplementedError

    def for_layer(self, width: int, num_experts: int) -> "Router":
        """A copy of this router's settings with weights for one layer."""
        router = copy.deepcopy(self)
        router.add_weights(width, num_experts)
        return router


class TopKRouter(Router):
    """V-MoE's noisy top-k token choice (arXiv:2106.05974, section 2 and appendix A.2).

    gates = softmax(x W + noise) over all experts, *before* the choice; each token takes the K largest (the lower expert
    on a tie) and combines their outputs with the raw gates.

    Args:
        top_k: Experts chosen by each token, 1 to E.
        noise_std: Noise on the logits while training, N(0, (noise_std / E)^2).
        renormalize: Divide a token's combine weights by their sum over its K choices. Not in V-MoE.
        capacity_factor: While training, an expert takes about S*K*factor/E assignments of a group; the rest is dropped.
            "dropless" drops nothing.
        eval_capacity_factor: The same in evaluation. Where nothing can be dropped ("dropless", the default, or a
            factor of E/K and more) each image is routed by itself, whatever group_size says: a logit never depends on
            batch mates. V-MoE-S/32 evaluates with 4.0 = E/K.
        capacity_multiple_of: Capacity is rounded up to a multiple of this; the reference's default is 4.
        capacity_rounding: How S*K*factor/E becomes an integer before that.
        batch_priority: Full experts keep the tokens with the largest gate instead of the first ones (BPR).
        group_size: Tokens routed together, with capacity and losses of their own: "image", or a number that divides
            B*N (the reference trains with 8 images a group, so 8*N).
        importance_loss_weight: Weight of the importance loss in the auxiliary loss; <= 0 leaves it out.
        load_loss_weight: The same for the load loss, which exists only while noise is added.
        gshard_loss_weight: The same for the GShard balance loss.
    """

    def __init__(
        self,
        top_k: int = 2,
        noise_std: float = 1.0,
        renormalize: bool = False,
        capacity_factor: float | Literal["dropless"] = 1.05,
        eval_capacity_factor: float | Literal["dropless"] = "dropless",
        capacity_multiple_of: int = 4,
        capacity_rounding: Literal["ceil", "round"] = "ceil",
        batch_priority: bool = False,
        group_size: int | Literal["image"] = "image",
        importance_loss_weight: float = 0.005,
        load_loss_weight: float = 0.005,
        gshard_loss_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.top_k, self.noise_std, self.renormalize = top_k, noise_std, renormalize
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.capacity_multiple_of, self.capacity_rounding = capacity_multiple_of, capacity_rounding
        self.batch_priority, self.group_size = batch_priority, group_size
        self.importance_loss_weight, self.load_loss_weight = importance_loss_weight, load_loss_weight
        self.gshard_loss_weight = gshard_loss_weight
        self._check()

    def _check(self) -> None:
        def refuse(name: str, way_out: str) -> None:
            raise ValueError(f"router.{name}={getattr(self, name)!r}: {way_out}")

        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            if factor != "dropless" and (isinstance(factor, str) or not (math.isfinite(factor) and factor > 0)):
                refuse(name, 'use a number > 0 or "dropless"')
        if self.group_size != "image" and (isinstance(self.group_size, str) or self.group_size < 1):
            refuse("group_size", 'use a number of tokens >= 1 or "image"')
        if self.capacity_rounding not in ("ceil", "round"):
            refuse("capacity_rounding", "use ceil or round")
        if self.top_k < 1:
            refuse("top_k", "a token needs at least one expert; use 1 or 2")
        if self.noise_std < 0:
            refuse("noise_std", "use 0 (no noise) or more")
        if self.capacity_multiple_of < 1:
            refuse("capacity_multiple_of", "use 1 (no rounding) or more")

    def add_weights(self, width: int, num_experts: int) -> None:
        if self.top_k > num_experts:
            raise ValueError(f"router.top_k={self.top_k} is more than num_experts={num_experts}; use 1..{num_experts}")
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Flax's default for a Dense layer: truncated normal of variance 1/D (0.8796 is the std of one cut at 2).
        std = self.weight.shape[1] ** -0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def sample_noise(self, x: Tensor) -> Tensor | None:
        if not self.training or self.noise_std == 0.0:
            return None
        num_experts = self.weight.shape[0]
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.randn(*x.shape[:2], num_experts, device=x.device, dtype=dtype) * (self.noise_std / num_experts)

    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[TopKPlan, RouterLosses]:
        logits = self._logits(x)
        if noise is not None:
            noise = noise.reshape(logits.shape)
        return self.route(logits, noise)

    def _logits(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [G, S, E]. At least float32: in bfloat16 the softmax flips top-k choices."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
        group_size, num_experts = self.group_size, logits.shape[-1]
        if group_size == "image" or (not self.training and self.slots(group_size, num_experts) is None):
            return logits
        num_tokens = logits.shape[0] * logits.shape[1]
        if num_tokens % group_size:
            raise ValueError(
                f"router.group_size={group_size} does not divide the batch's {num_tokens} tokens "
                f"({logits.shape[0]} images of {logits.shape[1]}); change the batch size, or use group_size=image"
            )
        return logits.reshape(-1, group_size, num_experts)

    def route(self, logits: Tensor, noise: Tensor | None) -> tuple[TopKPlan, RouterLosses]:
        """Everything after the gate's matrix product. logits, noise: [G, S, E]."""
        noisy = logits if noise is None else logits + noise
        clean_gates = logits.softmax(dim=-1)
        gates = clean_gates if noise is None else noisy.softmax(dim=-1)
        # A stable sort, not topk: on equal gates the lower expert wins, everywhere.
        sorted_gates, sorted_index = gates.sort(dim=-1, descending=True, stable=True)
        weight, expert = sorted_gates[..., : self.top_k], sorted_index[..., : self.top_k]
        if self.renormalize:
            weight = weight / weight.sum(dim=-1, keepdim=True)
        plan = TopKPlan.build(gates, expert, weight, self.slots(*gates.shape[1:]), self.batch_priority)

        parts = {
            "importance": losses.importance_loss(clean_gates),
            "gshard": losses.gshard_loss(gates, expert),
        }
        if noise is not None:
            parts["load"] = losses.load_loss(logits, noisy, expert, self.noise_std / logits.shape[-1])
        weights = {name: getattr(self, f"{name}_loss_weight") for name in parts}
        # Left out rather than multiplied by zero: a loss that is not wanted may be ill-defined.
        wanted = [weights[name] * parts[name] for name in parts if weights[name] > 0]
        return plan, RouterLosses(sum(wanted, torch.zeros_like(parts["importance"])), parts)

    def slots(self, group_size: int, num_experts: int) -> int | None:
        """Capacity C in this mode; None where nothing can be dropped, as a token asks an expert at most once."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor == "dropless":
            return None
        assignments = group_size * self.top_k
        slots = capacity(assignments, num_experts, factor, self.capacity_rounding, self.capacity_multiple_of)
        return None if slots >= group_size else slots

    def extra_repr(self) -> str:
        return f"top_k={self.top_k}, capacity_factor={self.capacity_factor}, group_size={self.group_size}"
