"""What attacks drive up, and which way that is."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..asked import Norm
from .budget import Budget

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # images, logits, labels -> [B], to be made large


def cross_entropy(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def margin(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the true one: positive where wrong, and no saturation."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), -torch.inf)
    return others.amax(dim=1) - true


def probability_margin(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """The margin of probabilities. In double: in float32 1 - p is 0 from a logit difference of 17 on, here of 36."""
    return margin(images, logits.double().softmax(dim=1), labels)


def mean_margin(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """[B] over the passes of the budget, without gradients."""
    with torch.no_grad():
        return torch.stack([margin(images, model(images), labels) for _ in range(budget.eot)]).mean(dim=0)


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, budget: Budget) -> Tensor:
    """Of the sum over images: a mean would make each gradient, and any epsilon added to its norm, depend on B.

    Averaged over the passes of the budget: expectation over randomness (Athalye et al., arXiv:1707.07397).
    """
    images = images.detach().requires_grad_()
    gradients = torch.zeros_like(images)
    for _ in range(budget.eot):
        total = loss(images, model(images), labels).sum()
        if budget.router_loss is not None:
            total = total + budget.router_loss(images, labels) * len(images)
        gradients += torch.autograd.grad(total, images)[0]
    return gradients / budget.eot


def direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Of steepest ascent; zero where the gradient is zero."""
    if norm == "Linf":
        return gradient.sign()
    length = gradient.double().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return torch.where(length > 0, gradient / length.clamp_min(1e-300), 0.0).to(gradient.dtype)
