"""Attacks as their authors publish them."""

from torch import Tensor, nn

from .budget import Budget
from .registry import CE, DLR, HALVED, INSIDE, attack, load_package


@attack(
    "Linf", "L2", spends="steps", package="torchattacks", loss=CE, step=HALVED, start=INSIDE, parts=True,
    restarts=True, eot="gradients",
)  # fmt: skip
def apgd(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Step sizes that adapt, cross-entropy (Croce and Hein, arXiv:2003.01690)."""
    return _apgd(model, images, labels, "ce", budget)


@attack(
    "Linf", "L2", spends="steps", package="torchattacks", min_classes=3, loss=DLR, step=HALVED, start=INSIDE,
    parts=True, restarts=True, eot="gradients",
)  # fmt: skip
def apgd_dlr(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """The same on the difference of logits ratio, which scaling the logits does not change."""
    return _apgd(model, images, labels, "dlr", budget)


def _apgd(model: nn.Module, images: Tensor, labels: Tensor, loss: str, budget: Budget) -> Tensor:
    options = {"norm": budget.norm, "eps": budget.eps, "steps": budget.steps, "seed": budget.seed}
    return load_package("torchattacks").APGD(model, **options, loss=loss, eot_iter=budget.eot)(images, labels)
