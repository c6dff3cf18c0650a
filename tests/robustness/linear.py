"""Linear classifiers: how far each image is from being misread is known, so what an attack must do at any eps is."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from vmoe_momentum.robustness.attacks import ATTACKS, Budget, run_attack

SURE = 0.03  # share of eps around the distance where rounding may decide


class Linear(nn.Module):
    """Logits of pixels in [0, 1]: [B, 3, 4, 4] -> [B, K]."""

    def __init__(self, classes: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = 0.3 + torch.rand(classes, 1, generator=generator)  # so that the likeliest is not always the nearest
        self.weight = nn.Parameter(sizes * torch.randn(classes, 48, generator=generator))
        self.bias = nn.Parameter(torch.zeros(classes))

    def forward(self, images: Tensor) -> Tensor:
        return (images.flatten(1) - 0.5) @ self.weight.T + self.bias


class Problem(NamedTuple):
    net: Linear
    images: Tensor
    labels: Tensor
    distances: Tensor  # [B, K] to each class, inf to the own one
    eps: float  # at which half of the images fall


def problem(classes: int, norm: str, count: int = 24) -> Problem:
    """Images far from the box: distance is the difference of logits over the dual norm of the weights' difference."""
    net = Linear(classes)
    images = 0.5 + 0.1 * (torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(1)) - 0.5)
    with torch.no_grad():
        logits = net(images)
    labels = logits.argmax(dim=1)
    gaps = logits.gather(1, labels[:, None]) - logits
    change = net.weight.detach() - net.weight.detach()[labels][:, None]
    lengths = change.abs().sum(dim=-1) if norm == "Linf" else change.square().sum(dim=-1).sqrt()
    distances = torch.where(gaps > 0, gaps / lengths, torch.inf)
    return Problem(net, images, labels, distances, float(distances.amin(dim=1).median()))


def check_against_closed_form(name: str, classes: int, norm: str) -> None:
    """At eps exactly those fall that are nearer than eps: too small a ball, step or sign leaves some, a larger more."""
    net, images, labels, distances, eps = problem(classes, norm)
    nearest = distances.amin(dim=1)
    routers = {"router_loss": lambda x, y: 0 * x.sum()} if ATTACKS[name].needs_router else {}
    found = run_attack(name, net, images, labels, Budget(eps, norm, steps=40, **routers))
    with torch.no_grad():
        fallen = net(found).argmax(dim=1) != labels
    sure = (nearest / eps - 1).abs() > SURE
    assert 8 < int((fallen & sure).sum()) < len(images) - 8
    assert torch.equal(fallen[sure], (nearest < eps)[sure])
