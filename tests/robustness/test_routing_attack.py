"""pgd-routing on a toy whose second expert hides behind a choice without a gradient; what it can reach is searched."""

import pytest
import torch
from torch import Tensor, nn

from vmoe_momentum.robustness.attacks import ATTACKS, Budget, routing, run_attack

EPS, STEPS = 0.1, 20


class Hidden(nn.Module):
    """Pixels [B, 3, 2, 2]: their mean a chooses an expert, the mean b of the second half of them goes into it.

    a at most 0.55: a constant answer, right, without a gradient. Above it: the second expert, which is right where b is
    above 0.5. So what follows the answer's gradient sees nothing, and what only crosses over is still right.
    """

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        a, b = flat.mean(dim=1), flat[:, 6:].mean(dim=1)
        second = torch.where(b > 0.5, 1.0, -1.0) + 10 * (b - 0.5)
        score = torch.where(a > 0.55, second, torch.ones_like(second))
        return torch.stack([torch.zeros_like(score), score], dim=1)

    def router_loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """How near the second expert is."""
        return x.flatten(1).mean(dim=1).sub(0.55).clamp_max(0.0).mean()


def pictures() -> Tensor:
    """Both halves near 0.5: b has to fall and the other half to rise, further than b falls."""
    generator = torch.Generator().manual_seed(0)
    first = 0.58 + 0.02 * torch.rand(12, 6, generator=generator)
    second = 0.505 + 0.02 * torch.rand(12, 6, generator=generator)
    return torch.cat([first, second], dim=1).reshape(12, 3, 2, 2)


def searched(model: Hidden, images: Tensor) -> Tensor:
    """[B] which can be misread: the answer depends on the means of both halves only, so a grid of two shifts tells."""
    shifts = torch.linspace(-EPS, EPS, 81)
    fallen = torch.zeros(len(images), dtype=torch.bool)
    for up in shifts:
        for down in shifts:
            change = torch.cat([up.expand(6), down.expand(6)]).reshape(1, 3, 2, 2)
            fallen |= model(images + change).argmax(dim=1) == 0
    return fallen


def standing(name: str, model: Hidden) -> Tensor:
    images, labels = pictures(), torch.ones(12, dtype=torch.long)
    loss = model.router_loss if ATTACKS[name].needs_router or ATTACKS[name].router else None
    found = run_attack(name, model, images, labels, Budget(EPS, steps=STEPS, router_loss=loss))
    assert (found - images).abs().amax() <= EPS + 1e-6
    return model(found).argmax(dim=1) == 1


def test_it_finds_what_a_search_finds_and_the_margin_alone_does_not() -> None:
    model = Hidden()
    assert bool(searched(model, pictures()).all())
    assert not bool(standing("pgd-routing", model).any())
    images, labels = pictures(), torch.ones(12, dtype=torch.long)
    found = run_attack("pgd-margin", model, images, labels, Budget(EPS, steps=STEPS))
    assert bool((model(found).argmax(dim=1) == 1).all())


MISTAKES = {
    "routers only": ("input_gradient", lambda model, images, labels, loss, budget: torch.zeros_like(images)),
    "answers only": ("router_gradient", lambda images, labels, budget: torch.zeros_like(images)),
    "away from the second expert": ("router_gradient", lambda images, labels, budget: -torch.ones_like(images)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_toy_sees_mistakes(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing, *MISTAKES[mistake])
    assert bool(standing("pgd-routing", Hidden()).any())
