"""Attacks as their authors publish them."""

import torch
from torch import Tensor, nn

from .budget import Budget
from .registry import CE, DLR, HALVED, INSIDE, MARGIN, attack, load_package


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


@attack(
    "Linf", "L2", package="pyautoattack", min_classes=4, not_in_l2=(1, 2, 3, 4, 12, 14, 18, 19, 24),
    loss=f"{CE}; targeted {DLR}; distance to the boundary (FAB-T); {MARGIN} (Square)",
    step="of each of its four attacks: 100 steps, 9 targets, 5,000 queries", start=f"{INSIDE}, of each attack",
    passes=3 * 100 * (1 + 9 + 9) + 5000, parts=True,
)  # fmt: skip
def autoattack(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """The standard AutoAttack: APGD-CE, APGD-T, FAB-T, Square (Croce and Hein, arXiv:2003.01690).

    It targets the 9 classes next in line, all others where they are fewer; its targeted loss is not defined on fewer
    than 4 classes. It has its own steps and queries: those of `budget` change nothing.
    """
    package = load_package("pyautoattack")
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    options = {"norm": budget.norm, "eps": budget.eps, "device": images.device, "seed": budget.seed}
    ensemble = package.AutoAttack(model, version="standard", **options)
    for targeted in (ensemble.apgd_targeted, ensemble.fab):
        targeted.n_target_classes = min(9, classes - 1)
    return ensemble.run_standard_evaluation(images, labels, batch_size=len(images))[0]
