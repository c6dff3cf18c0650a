"""Attacks along the gradient of the pixels."""

from torch import Tensor, nn

from .budget import Budget
from .losses import Loss, cross_entropy, direction, input_gradient, margin
from .registry import CE, FIXED, MARGIN, attack, load_package
from .wrapping import project


@attack("Linf", "L2", package="torchattacks", router=True, loss=CE, step="eps", passes=3)
def fgsm(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """One step of eps along the sign of the cross-entropy's gradient (Goodfellow et al., arXiv:1412.6572).

    Linf from torchattacks, which has no L2 form; ours along the gradient itself there, and with a router's loss.
    """
    if budget.norm == "Linf" and budget.router_loss is None:
        return load_package("torchattacks").FGSM(model, eps=budget.eps)(images, labels)
    gradient = input_gradient(model, images, labels, cross_entropy, budget)
    return images + budget.eps * direction(gradient, budget.norm)


@attack("Linf", "L2", spends="steps", package="torchattacks", router=True, loss=CE, step=FIXED)
def pgd(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Projected gradient on the cross-entropy (Madry et al., arXiv:1706.06083), without a random start.

    Linf from torchattacks. Ours in L2, where it adds 1e-10 to the norm of a gradient of the batch's mean, so that steps
    shrink for confident models; and with a router's loss.
    """
    if budget.norm == "Linf" and budget.router_loss is None:
        step = step_size(budget)
        return load_package("torchattacks").PGD(model, budget.eps, step, budget.steps, random_start=False)(
            images, labels
        )
    return projected_gradient(model, images, labels, cross_entropy, budget)


@attack("Linf", "L2", spends="steps", router=True, loss=MARGIN, step=FIXED)
def pgd_margin(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Projected gradient on the margin: where saturated cross-entropy hides the gradient this one still sees it."""
    return projected_gradient(model, images, labels, margin, budget)


def step_size(budget: Budget) -> float:
    """2.5 eps / steps: reaches the border and back (Madry et al.'s choice on CIFAR), never more than eps."""
    return min(budget.eps, 2.5 * budget.eps / budget.steps)


def projected_gradient(model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, budget: Budget) -> Tensor:
    """x <- P(x + a g) with g the gradient's sign, or direction in L2; keeps the last iterate, as PGD does."""
    found = images
    for _ in range(budget.steps):
        gradient = input_gradient(model, found, labels, loss, budget)
        found = project(images, found + step_size(budget) * direction(gradient, budget.norm), budget)
    return found
