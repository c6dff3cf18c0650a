"""AutoAttack, stage by stage, so that what it has found outlives its process."""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from .budget import Budget
from .registry import CE, DLR, INSIDE, MARGIN, attack, load_package


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
    checks = importlib.import_module(f"{package.__name__}.checks")
    options = {"norm": budget.norm, "eps": budget.eps, "device": images.device, "seed": budget.seed}
    ensemble = package.AutoAttack(model, version="standard", **options)
    checks.check_dynamic(model, images, logger=ensemble.logger)
    with torch.no_grad():
        logits = model(images)
        begun = {} if budget.stages is None else budget.stages.load()
        found = begun.get("found", images).to(images.device)
        standing = begun.get("standing", logits.argmax(dim=1) == labels).to(images.device)
        shares = begun.get("shares", standing.double().mean()[None]).tolist()  # that stand, before and after each stage
        for stage in _stages(ensemble, min(9, logits.shape[1] - 1))[len(shares) - 1 :]:
            if not bool(standing.any()):
                break
            place = standing.nonzero()[:, 0]
            made = stage.perturb(images[place], labels[place])
            fell = model(made).argmax(dim=1) != labels[place]
            found = found.index_copy(0, place[fell], made[fell])
            standing = standing.index_fill(0, place[fell], False)
            shares.append(float(standing.double().mean()))
            if budget.stages is not None:
                budget.stages.keep({"found": found, "standing": standing, "shares": torch.tensor(shares).double()})
    told = dict(zip(("clean", "apgd-ce", "apgd-t", "fab-t", "square"), shares, strict=False))
    checks.check_square_sr(told, logger=ensemble.logger)
    return found


def _stages(ensemble: Any, targets: int) -> list[Any]:
    """Its four attacks, one by one what its run_standard_evaluation runs in one go: each seeds its own random numbers.

    That one goes on from a file, too; but not in 0.2.0, which reads back another set of attacks than it wrote, and
    without the pictures that it had found.
    """
    for targeted in (ensemble.apgd_targeted, ensemble.fab):
        targeted.n_target_classes = targets
    ensemble.apgd.loss, ensemble.fab.targeted = "ce", True
    return [ensemble.apgd, ensemble.apgd_targeted, ensemble.fab, ensemble.square]
