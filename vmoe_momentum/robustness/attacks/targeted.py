"""Attacks towards chosen classes, from pyautoattack: the targeted parts of AutoAttack, and better targets for one."""

from typing import Any

import torch
from torch import Tensor, nn

from .budget import Budget
from .registry import DLR, HALVED, INSIDE, attack, load_package

TARGETS = 9  # as AutoAttack has; all other classes where these are fewer
LIKELY = 100  # classes that MALT compares, the likeliest


@attack(
    "Linf", "L2", spends="steps", per_step=3 * TARGETS, package="pyautoattack", min_classes=4, loss=f"targeted {DLR}",
    step=HALVED, start=INSIDE, parts=True, restarts=True, eot="gradients",
)  # fmt: skip
def apgd_t(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Towards each of the 9 likeliest other classes in turn (Croce and Hein, arXiv:2003.01690)."""
    return _apgd(model, images, budget).perturb(images, labels)


@attack(
    "Linf", "L2", spends="steps", per_step=4 * TARGETS, package="pyautoattack",
    loss="distance to the boundary with each target", step="onto that boundary, linearised, and back",
    parts=True, random_start=True, restarts=True, eot="answers",
)  # fmt: skip
def fab(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """The nearest point beyond a boundary, if it is within eps (FAB-T, Croce and Hein, arXiv:1907.02044).

    Towards each of the 9 likeliest other classes, as in AutoAttack. Random starts are the package's: within eps / 2,
    and a batch's.
    """
    options = {"norm": budget.norm, "eps": budget.eps, "n_iter": budget.steps, "seed": budget.seed}
    package = load_package("pyautoattack.fab_pt")
    found = package.FABAttack_PT(
        lambda x: model(x).float(),
        **options,
        targeted=True,
        device=images.device,
        n_target_classes=_count(model, images),
    )
    if budget.random_start:
        run = found.attack_single_run
        found.attack_single_run = lambda x, y, use_rand_start, is_targeted: run(x, y, True, is_targeted)
    return found.perturb(images, labels)


@attack(
    "Linf", "L2", spends="steps", per_step=3 * TARGETS, package="pyautoattack", min_classes=4, loss=f"targeted {DLR}",
    step=HALVED, start=INSIDE, parts=True, restarts=True, eot="gradients",
)  # fmt: skip
def malt(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """APGD towards the 9 classes that would be reached first if the model were linear (MALT, arXiv:2407.02240)."""
    targets = nearest_classes(model, images, labels, budget)
    found, standing = images.clone(), model(images).argmax(dim=1) == labels
    apgd = _apgd(model, images, budget)
    apgd.init_hyperparam(images)
    for target in targets.unbind(dim=1):
        left = standing.nonzero().flatten()
        if not len(left):
            break
        apgd.y_target = target[left]
        _, stands, _, reached = apgd.attack_single_run(images[left], labels[left])
        fallen = left[~stands]
        found[fallen], standing[fallen] = reached[~stands], False
    return found


def nearest_classes(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """[B, up to 9] other classes, the nearest first: difference of logits over the norm of its gradient.

    The norm is the dual of the attack's: exact for linear models. Of the 100 likeliest classes.
    """
    leaf = images.detach().requires_grad_()
    logits = sum(model(leaf) for _ in range(budget.eot)) / budget.eot
    gaps = logits.gather(1, labels[:, None]) - logits
    own = torch.nn.functional.one_hot(labels, logits.shape[1]).bool()
    likely = gaps.masked_fill(own, torch.inf).topk(min(LIKELY, logits.shape[1] - 1), largest=False).indices
    slopes = []
    for column in likely.T:
        (gradient,) = torch.autograd.grad(gaps.gather(1, column[:, None]).sum(), leaf, retain_graph=True)
        slopes.append(gradient.double().flatten(1).norm(p=1 if budget.norm == "Linf" else 2, dim=1))
    distances = gaps.detach().gather(1, likely) / torch.stack(slopes, dim=1).clamp_min(1e-300)
    return likely.gather(1, distances.argsort(dim=1, stable=True)[:, :TARGETS])


def _apgd(model: nn.Module, images: Tensor, budget: Budget) -> Any:
    package = load_package("pyautoattack.autopgd_base")
    options = {"norm": budget.norm, "eps": budget.eps, "n_iter": budget.steps, "seed": budget.seed}
    return package.APGDAttack_targeted(
        model, **options, eot_iter=budget.eot, device=images.device, n_target_classes=_count(model, images)
    )


def _count(model: nn.Module, images: Tensor) -> int:
    """Of targets."""
    with torch.no_grad():
        return min(TARGETS, model(images[:1]).shape[1] - 1)
