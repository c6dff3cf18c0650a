"""Attacks on routers and experts together."""

import torch
from torch import Tensor, nn

from .budget import Budget
from .gradients import OPTIONS, best_iterate, step_size
from .losses import direction, input_gradient, margin
from .registry import FIXED, MARGIN, attack


@attack(
    "Linf", "L2", spends="steps", per_step=7, needs_router=True, step=FIXED, **OPTIONS,
    loss=f"routers' loss, handing over to {MARGIN}",
)  # fmt: skip
def pgd_routing(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """First towards other experts, then, step by step more, against the answer that these give.

    Ours, grown from the auxiliary-loss option of V-MoE's attacks (Puigcerver et al., arXiv:2210.10253). Both gradients
    are brought to one length, so neither drowns the other; the routers' share falls from 1 to 1 / steps. Experts that
    hide behind a choice without a gradient come into sight when tokens cross over; the best iterate is kept, since
    tokens may cross back.
    """
    task = budget._replace(router_loss=None)

    def climb(found: Tensor, step: int) -> Tensor:
        share = 1 - step / budget.steps
        on_answer = input_gradient(model, found, labels, margin, task)
        on_routers = router_gradient(found, labels, budget)
        both = (1 - share) * direction(on_answer, "L2") + share * direction(on_routers, "L2")
        return found + step_size(budget) * direction(both, budget.norm)

    return best_iterate(model, images, labels, climb, task)


def router_gradient(images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Of the routers' loss alone, averaged over the passes of the budget."""
    assert budget.router_loss is not None  # run_attack refuses models without routers
    images = images.detach().requires_grad_()
    losses = [budget.router_loss(images, labels) for _ in range(budget.eot)]
    total = sum(losses[1:], losses[0]) / budget.eot
    return torch.autograd.grad(total * len(images), images)[0]
