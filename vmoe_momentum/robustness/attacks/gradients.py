"""Attacks along the gradient of the pixels."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .budget import Budget
from .losses import Loss, cross_entropy, direction, input_gradient, margin, mean_margin, probability_margin
from .registry import CE, FIXED, MARGIN, attack, load_package
from .wrapping import project, starting_point

OPTIONS: dict[str, Any] = {"random_start": True, "restarts": True, "eot": "gradients"}  # of all in this file


@attack("Linf", "L2", package="torchattacks", router=True, loss=CE, step="eps", **OPTIONS)
def fgsm(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """One step of eps along the sign of the cross-entropy's gradient (Goodfellow et al., arXiv:1412.6572).

    Linf from torchattacks, which has no L2 form; ours along the gradient itself there, with a router's loss, from a
    random start (Wong et al., arXiv:2001.03994) and over several passes.
    """
    if _as_packaged(budget):
        return load_package("torchattacks").FGSM(model, eps=budget.eps)(images, labels)
    start = starting_point(images, budget)
    gradient = input_gradient(model, start, labels, cross_entropy, budget)
    return start + budget.eps * direction(gradient, budget.norm)


@attack("Linf", "L2", spends="steps", package="torchattacks", router=True, loss=CE, step=FIXED, **OPTIONS)
def pgd(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Projected gradient on the cross-entropy (Madry et al., arXiv:1706.06083).

    Linf from torchattacks. Ours in L2, where it adds 1e-10 to the norm of a gradient of the batch's mean, so that steps
    shrink for confident models; with a router's loss, from a random start, since theirs depends on the batch, and over
    several passes.
    """
    if _as_packaged(budget):
        step = step_size(budget)
        return load_package("torchattacks").PGD(model, budget.eps, step, budget.steps, random_start=False)(
            images, labels
        )
    return projected_gradient(model, images, labels, cross_entropy, budget)


@attack("Linf", "L2", spends="steps", router=True, loss=MARGIN, step=FIXED, **OPTIONS)
def pgd_margin(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Projected gradient on the margin: where saturated cross-entropy hides the gradient this one still sees it."""
    return projected_gradient(model, images, labels, margin, budget)


@attack(
    "Linf", "L2", spends="steps", per_step=4, **OPTIONS,
    loss="largest other probability - true probability", step="2 eps, down to 0 along a cosine",
)  # fmt: skip
def pma(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """The probability margin attack (Xie et al., arXiv:2411.15210): the margin of probabilities, not of logits.

    Its gradient is p_y times that of the cross-entropy less p_k times that of the k nearest class. The sizes of steps
    are those of the authors' code; which first follows one of the two probabilities by itself, and this does not.
    """

    def climb(found: Tensor, step: int) -> Tensor:
        size = budget.eps * (1 + math.cos(math.pi * step / budget.steps))
        return found + size * direction(input_gradient(model, found, labels, probability_margin, budget), budget.norm)

    return best_iterate(model, images, labels, climb, budget)


def _as_packaged(budget: Budget) -> bool:
    return budget.norm == "Linf" and budget.router_loss is None and not budget.random_start and budget.eot == 1


def step_size(budget: Budget) -> float:
    """2.5 eps / steps: reaches the border and back (Madry et al.'s choice on CIFAR), never more than eps."""
    return min(budget.eps, 2.5 * budget.eps / budget.steps)


def projected_gradient(model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, budget: Budget) -> Tensor:
    """x <- P(x + a g) with g the gradient's sign, or direction in L2; keeps the last iterate, as PGD does."""
    found = starting_point(images, budget)
    for _ in range(budget.steps):
        gradient = input_gradient(model, found, labels, loss, budget)
        found = project(images, found + step_size(budget) * direction(gradient, budget.norm), budget)
    return found


def best_iterate(
    model: nn.Module, images: Tensor, labels: Tensor, climb: Callable[[Tensor, int], Tensor], budget: Budget
) -> Tensor:
    """x <- P(climb(x, step)); of each image the iterate of the largest margin of logits, the start among them."""
    found = best = starting_point(images, budget)
    highest = mean_margin(model, best, labels, budget)
    for step in range(budget.steps):
        found = project(images, climb(found, step), budget)
        reached = mean_margin(model, found, labels, budget)
        better = reached > highest
        best = torch.where(better.view(-1, 1, 1, 1), found, best)
        highest = torch.where(better, reached, highest)
    return best
