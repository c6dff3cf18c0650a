"""Adversarial training: what the inner attack may do, and the pictures that it makes.

B images, k of them attacked, K classes. Attacks see pixels in [0, 1], and eps is in the same units.

The inner attack sees the network as it is evaluated: no drop path, no dropout, evaluation's capacity of experts, batch
norms by their running statistics, and no noise on the router. That noise is drawn for the training pass alone, once:
it is there to spread load over experts, an attacker does not meet it, and pictures that only fool one draw of it would
teach nothing about the network that is deployed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..ranges import COUNT, COUNT_OR_NONE, POSITIVE, Range, in_range
from ..robustness import Budget, parse_eps
from ..robustness.answering import routing_change
from ..robustness.asked import Norm
from ..robustness.attacks import direction, evaluated, project, step_size
from .instruments import watch_choices

Start = Literal["ball", "near", "picture"]
Objective = Callable[[Tensor], Tensor]  # logits [k, K] -> [], summed over images: what an attack drives up


@in_range(
    "model.adversarial.", steps=COUNT, beta=POSITIVE.or_(None), eps_warmup=COUNT_OR_NONE,
    share=Range(0, 1, above=True).because("1 is the whole batch"),
)  # fmt: skip
@dataclass(frozen=True)
class AdversarialSettings:
    """Training on attacked pictures: those of the batch, or beside them.

    Args:
        method: pgd trains on the attacked pictures in place of the clean ones (Madry et al., arXiv:1706.06083). trades
            trains on the clean ones and adds beta times the divergence of the attacked predictions from the clean ones
            (TRADES, arXiv:1901.08573); clean and attacked pictures go through the network as one batch, which for
            networks with batch norms is not what its authors' code does.
        norm: Of the budget.
        eps: Budget in pixels of [0, 1], such as 4/255; in (0, 1], in L2 up to 1e6.
        steps: Of the inner attack, 1 to 1e9; each costs a forward and a backward pass.
        step_size: In pixels of [0, 1], such as 1/255; in (0, 1], in L2 up to 1e6; null for min(eps, 2.5 eps / steps).
        start: Of the inner attack: a random point of the ball, a point near the picture (TRADES's: noise of 0.001), or
            the picture.
        eps_warmup: Optimizer steps over which budget and step size grow linearly from 0, 0 to 1e9.
        share: Of each batch, in (0, 1]; the rest is trained on as it is.
        beta: TRADES's weight of robustness against accuracy, in (0, 1e6]; null for 6. For trades only.
    """

    method: Literal["pgd", "trades"] = "pgd"
    norm: Norm = "Linf"
    eps: float | str = "4/255"
    steps: int = 3
    step_size: float | str | None = None
    start: Start = "ball"
    eps_warmup: int = 0
    share: float = 1.0
    beta: float | None = None

    def __post_init__(self) -> None:
        where = "model.adversarial"
        in_pixels(self.eps, self.norm, f"{where}.eps")
        if self.step_size is not None:
            in_pixels(self.step_size, self.norm, f"{where}.step_size")
        if self.method == "pgd" and self.beta is not None:
            raise ValueError(f"{where}.beta={self.beta}: is TRADES's; leave it out, or use {where}.method=trades")
        if self.method == "trades" and self.start == "picture":
            raise ValueError(
                f"{where}.start=picture: the divergence from the clean picture has no gradient there; use ball or near"
            )

    def budget(self, step: int) -> Budget:
        """At an optimizer step, from 0."""
        grown = min(1.0, (step + 1) / self.eps_warmup) if self.eps_warmup else 1.0
        return Budget(grown * in_pixels(self.eps, self.norm), self.norm, self.steps)

    def size(self, budget: Budget) -> float:
        """Of a step, in pixels; in warm-up as much smaller as the budget is."""
        if self.step_size is None:
            return step_size(budget)
        return in_pixels(self.step_size, self.norm) * budget.eps / in_pixels(self.eps, self.norm)

    def count(self, batch: int) -> int:
        """Images attacked, one at least."""
        return max(1, round(self.share * batch))

    @property
    def weight(self) -> float:
        """Of TRADES's divergence."""
        return 6.0 if self.beta is None else self.beta


def in_pixels(value: float | str, norm: Norm, setting: str = "eps") -> float:
    """`4/255` as a number. Raises ValueError: not a budget in pixels of [0, 1]."""
    limit = 1.0 if norm == "Linf" else 1e6
    try:
        found = parse_eps(value)
    except ValueError:
        found = 0.0
    if not 0 < found <= limit:
        raise ValueError(f"{setting}={value}: use a number in (0, {limit:g}], in pixels of [0, 1], such as 4/255")
    return found


def attacked(
    model: nn.Module, pixels: Tensor, objective: Objective, budget: Budget, size: float, start: Start, seed: int
) -> Tensor:
    """pixels [k, 3, H, W] in [0, 1] -> as many, within the budget, that drive the objective up, by steps of `size`.

    model: from pixels to logits. Its train flags, gradients and buffers, and all generators, are as before afterwards.
    """
    with evaluated(model, seed), torch.inference_mode(False), torch.enable_grad():
        pixels = pixels.detach().clone()
        found = started(pixels, budget, start)
        for _ in range(budget.steps):
            found.requires_grad_()
            # of the pixels only: weights keep the gradients that they have
            (gradient,) = torch.autograd.grad(objective(model(found)), found)
            found = project(pixels, found.detach() + size * direction(gradient, budget.norm), budget)
    torch.clear_autocast_cache()
    return found.detach()


def started(pixels: Tensor, budget: Budget, start: Start) -> Tensor:
    """Where an attack starts. In L2 a direction and a length, each uniform, as torchattacks has it."""
    if start == "picture":
        return pixels
    if start == "near":
        return project(pixels, pixels + 0.001 * torch.randn_like(pixels), budget)
    if budget.norm == "Linf":
        return project(pixels, pixels + (torch.rand_like(pixels) * 2 - 1) * budget.eps, budget)
    length = torch.rand(len(pixels), 1, 1, 1, device=pixels.device, dtype=pixels.dtype) * budget.eps
    return project(pixels, pixels + length * direction(torch.randn_like(pixels), "L2"), budget)


class Seen(NamedTuple):
    """How the network as it is evaluated sees attacked pictures of a training batch, beside the clean ones."""

    clean_top1: Tensor  # []
    robust_top1: Tensor  # [] right before and after the attack
    routing_change: dict[str, Tensor]  # block -> [] 1 - mean IoU of each token's expert sets; of sparse networks


@torch.no_grad()
def compared(model: nn.Module, net: nn.Module, clean: Tensor, found: Tensor, labels: Tensor) -> Seen:
    """clean, found: pixels [k, 3, H, W]; labels: [k]. Two forward passes, without compiling."""
    answers, choices = [], []
    with evaluated(model, 0), torch.compiler.set_stance("force_eager"), watch_choices(net) as chosen:
        for images in (clean, found):
            answers.append(model(images).argmax(dim=-1) == labels)
            choices.append({name: each[: len(images)] for name, each in chosen.items()})
            chosen.clear()
    torch.clear_autocast_cache()
    before, after = choices
    moved = {name: routing_change(before[name], after[name]).mean() for name in before if name in after}
    return Seen(answers[0].float().mean(), (answers[0] & answers[1]).float().mean(), moved)
