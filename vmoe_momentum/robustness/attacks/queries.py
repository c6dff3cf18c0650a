"""Attacks that ask for answers and need no gradient."""

import torch
from torch import Tensor, nn

from .budget import Budget
from .losses import direction, margin
from .registry import MARGIN, attack, load_package
from .wrapping import project, starting_point


# In L2 five windows of a fifth of the side, and a sixth where there is room for one but for the margin before it.
@attack(
    "Linf", "L2", spends="queries", package="torchattacks", not_in_l2=(1, 2, 3, 4, 12, 14, 18, 19, 24),
    loss=MARGIN, step="squares of 2 eps, in L2 windows, smaller with the queries",
    start="random stripes, in L2 windows", parts=True,
    restarts=True, eot="answers",
)  # fmt: skip
def square(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Random search over squares, margin loss, no gradients (Andriushchenko et al., arXiv:1912.00049).

    The schedule of their sizes is stretched or shrunk to the queries. Its random numbers are a batch's, so results
    depend a little on the batch size.
    """
    options = {"norm": budget.norm, "eps": budget.eps, "n_queries": budget.queries, "seed": budget.seed}
    with torch.no_grad():
        return load_package("torchattacks").Square(model, **options)(images, labels)


@attack(
    "Linf", "L2", spends="queries", min_queries=128, loss=MARGIN, step="eps / 4 along Adam's direction",
    random_start=True, restarts=True, eot="answers",
)  # fmt: skip
def spsa(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Gradient of the margin from differences along random signs, Adam on it (Uesato et al., arXiv:1802.05666).

    Ours: torchattacks' default is one Adam step, at most 2.55/255 whatever eps is. `queries` forward passes an image:
    2 * 64 probes a step. In L2 the step is a quarter of eps along Adam's direction.
    """
    probes, delta, rate = 64, 0.01, budget.eps / 4
    found = starting_point(images, budget)
    first, second = torch.zeros_like(images), torch.zeros_like(images)
    with torch.no_grad():
        for step in range(1, budget.queries // (2 * probes) + 1):
            gradient = torch.zeros_like(images)
            for _ in range(probes):
                signs = torch.randint(0, 2, images.shape, device=images.device).float() * 2 - 1
                up, down = (margin(found, model(found + side * delta * signs), labels) for side in (1, -1))
                gradient += ((up - down) / (2 * delta)).view(-1, 1, 1, 1) * signs / probes
            first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
            ascent = first / (1 - 0.9**step) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
            found = project(
                images, found + rate * (ascent if budget.norm == "Linf" else direction(ascent, "L2")), budget
            )
    return found
