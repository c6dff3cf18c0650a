"""Attacks whose pictures other models fall for, too: momentum over the steps, and inputs of many sizes.

Ours, with torchattacks as the oracle: it divides by a gradient's mean, and a picture without a gradient is NaN from
there on; and it has no L2 form.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .budget import Budget
from .gradients import OPTIONS
from .losses import cross_entropy, direction, input_gradient
from .registry import CE, attack
from .wrapping import project, starting_point

EVEN = "eps / steps"
DECAY = 1.0  # of the gradients gathered; the value of both papers
SMALLEST, CHANCE = 0.9, 0.5  # of the side that an input is shrunk to at most, and how often it is


@attack("Linf", "L2", spends="steps", router=True, loss=CE, step=EVEN, **OPTIONS)
def mi_fgsm(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Steps along gradients gathered over the steps (Dong et al., arXiv:1710.06081, Algorithm 1)."""
    return gathered(model, images, labels, DECAY, budget)


@attack("Linf", "L2", spends="steps", router=True, loss=f"{CE} of inputs of many sizes", step=EVEN, **OPTIONS)
def di_fgsm(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Each step's gradient with even odds on shrunk and padded images (DI2-FGSM, Xie et al., arXiv:1803.06978).

    Shrunk to 0.9 to 1 of the side, as torchattacks does: networks here take one size, so they cannot be enlarged.
    """
    return gathered(Diverse(model), images, labels, 0.0, budget)


@attack("Linf", "L2", spends="steps", router=True, loss=f"{CE} of inputs of many sizes", step=EVEN, **OPTIONS)
def mi_di_fgsm(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Both (M-DI2-FGSM of arXiv:1803.06978): of the three the one that transfers best."""
    return gathered(Diverse(model), images, labels, DECAY, budget)


def gathered(model: nn.Module, images: Tensor, labels: Tensor, decay: float, budget: Budget) -> Tensor:
    """g <- decay g + gradient / its mean size; x <- P(x + eps / steps * direction of g)."""
    found, momentum = starting_point(images, budget), torch.zeros_like(images)
    for _ in range(budget.steps):
        gradient = input_gradient(model, found, labels, cross_entropy, budget)
        size = gradient.double().abs().flatten(1).mean(dim=1).view(-1, 1, 1, 1)
        momentum = decay * momentum + torch.where(size > 0, gradient / size.clamp_min(1e-300), 0.0).float()
        found = project(images, found + budget.eps / budget.steps * direction(momentum, budget.norm), budget)
    return found


class Diverse(nn.Module):
    """A model that is shown its images as they are or, by a coin, smaller in a black frame; one draw for a batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        side = images.shape[-1]
        small = int(torch.randint(int(side * SMALLEST), side, (1,)))
        top, left = (int(torch.randint(side - small, (1,))) for _ in range(2))
        shrunk = F.interpolate(images, size=(small, small), mode="bilinear", align_corners=False)
        framed = F.pad(shrunk, (left, side - small - left, top, side - small - top))
        return self.model(framed if float(torch.rand(1)) < CHANCE else images)
