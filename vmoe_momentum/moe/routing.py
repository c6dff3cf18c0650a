"""What every router has: tokens -> (plan, losses). Legend of axes: this folder's __init__.

To add a router: one subclass of `Router` (of `TokenChoice`, where tokens choose) in any file that is imported.
Constructor arguments are kept as attributes of the same name (that is how a router is written into checkpoints), and
`in_range` says what numbers they take; YAML then says `router: {class_path: NameOfTheClass, init_args: {...}}`. One
such settings object serves a whole network: each layer takes `for_layer(width, num_experts)`, a copy with weights of
its own.
"""

import copy
import math
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ranges import COUNT, NOT_NEGATIVE

NOISE = NOT_NEGATIVE.because("0 is no noise")
GROUP = COUNT.or_("image").because("a number of tokens, or image for each image by itself")
WEIGHT = NOT_NEGATIVE.because("0 leaves it out")


class RouterLosses(NamedTuple):
    auxiliary: Tensor  # [G] weighted sum, what training adds to its loss
    parts: dict[str, Tensor]  # each [G], unweighted; those whose weight is 0 are not computed
    gates: Tensor | None = None  # [G, S, E] without noise, where those of the plan have it


class Plan(Protocol):
    """Where tokens go and how they come back."""

    @property
    def gates(self) -> Tensor:
        """[G, S, E] the share each expert has in a token."""

    def dispatch(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: [T, D] -> rows [R, D] expert by expert, and their ends [E] int32: expert e has rows[ends[e-1]:ends[e]].
        None where every expert has R / E of them."""

    def combine(self, rows: Tensor) -> Tensor:
        """rows: [R, D], the experts' outputs -> [T, D]."""

    def assigned(self) -> Tensor:
        """[G, S, E] bool: does this token reach this expert?"""

    def load(self) -> Tensor:
        """[E] what each expert received."""

    def dropped(self) -> Tensor:
        """[] share lost to full experts."""


class Router(nn.Module, ABC):
    """Base of all routers. Calls give `(plan, losses)`."""

    group_size: int | Literal["image"]
    bfloat16_dispatch: bool
    noise_std: float = 0.0  # while training, on the logits
    even: bool = False  # are rows to lie as every rank can tell from the batch's shape? set where experts are spread

    @abstractmethod
    def add_weights(self, width: int, num_experts: int) -> None:
        """Create and initialise this layer's parameters. Raises ValueError: settings that E rules out."""

    @abstractmethod
    def experts_per_token(self, num_experts: int, num_tokens: int) -> float:
        """How many experts one token touches in evaluation, on average. num_tokens: N of an image."""

    def takes_tokens_alone(self, num_tokens: int, num_experts: int) -> bool:
        """In this mode, does what happens to a token depend on that token only? num_tokens: N of an image."""
        return False

    def images_together(self, num_tokens: int, num_experts: int) -> int:
        """In this mode, the fewest images of `num_tokens` tokens each that make whole groups."""
        return 1 if self.group_size == "image" else self.group_size // math.gcd(self.group_size, num_tokens)

    def no_weight_decay(self) -> set[str]:
        """Names of own parameters that weight decay must spare."""
        return set()

    def sample_noise(self, x: Tensor) -> Tensor | None:
        """This step's random numbers, None for none. Drawn once a block, however often a rule evaluates the layer."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, noise: Tensor | None) -> tuple[Plan, RouterLosses]:
        """x: [B, N, D]."""

    def for_layer(self, width: int, num_experts: int) -> "Router":
        """A copy of this router's settings with weights for one layer."""
        router = copy.deepcopy(self)
        router.add_weights(width, num_experts)
        return router

    def check_rounding(self) -> None:
        if self.capacity_rounding not in ("ceil", "round"):
            raise ValueError(f"router.capacity_rounding={self.capacity_rounding}: use ceil or round")

    def grouped(self, x: Tensor) -> Tensor:
        """[B, N, ...] -> [G, S, ...], row-major: a group may cut through images."""
        if self.group_size == "image":
            return x
        num_tokens = x.shape[0] * x.shape[1]
        if num_tokens % self.group_size:
            raise ValueError(
                f"router.group_size={self.group_size} does not divide the batch's {num_tokens} tokens "
                f"({x.shape[0]} images of {x.shape[1]}); change the batch size, or use group_size=image"
            )
        return x.reshape(-1, self.group_size, *x.shape[2:])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items() if _is_setting(name, value))


def _is_setting(name: str, value: Any) -> bool:
    return not name.startswith("_") and name != "training" and isinstance(value, int | float | str)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The type that autocast computes in here; None where it is off. The meta device knows none."""
    kind = device.type
    on = kind != "meta" and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Routing is computed in float32 also where the rest is not."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


class LinearGate(Router):
    """Routers whose logits are x W, or x W + b with `gate_bias`."""

    gate_bias: bool = False

    def add_weights(self, width: int, num_experts: int) -> None:
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        if self.gate_bias:
            self.bias = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # Flax's default for a Dense layer: truncated normal of variance 1/D (0.8796 is the std of one cut at 2).
        std = self.weight.shape[1] ** -0.5 / 0.87962566103423978
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)
        if self.gate_bias:
            nn.init.zeros_(self.bias)

    def sample_noise(self, x: Tensor) -> Tensor | None:
        if not self.training or self.noise_std == 0.0:
            return None
        num_experts = self.weight.shape[0]
        dtype = torch.promote_types(x.dtype, torch.float32)
        return torch.randn(*x.shape[:2], num_experts, device=x.device, dtype=dtype) * (self.noise_std / num_experts)

    def logits(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, E]. At least float32: in bfloat16 the softmax flips top-k choices."""
        with without_autocast(x.device):
            dtype = torch.promote_types(x.dtype, torch.float32)
            return F.linear(x.to(dtype), self.weight.to(dtype), self.bias.to(dtype) if self.gate_bias else None)
