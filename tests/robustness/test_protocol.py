"""What reports say of attacks, and what the time that is left is reckoned with, against what attacks do."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from vmoe_momentum.robustness.attacks import ATTACKS, Budget, run_attack
from vmoe_momentum.robustness.cells import Cell
from vmoe_momentum.robustness.pictures import Pictures
from vmoe_momentum.robustness.protocol import cost, protocols

pytest.importorskip("torchattacks")


class Counting(nn.Module):
    """Answers 0 whatever it is shown, with a little gradient; counts passes over one image, a backward one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, images: Tensor) -> Tensor:
        self.passes += len(images)
        if torch.is_grad_enabled() and images.requires_grad:
            images = images.clone()
            images.register_hook(self._back)
        means = 1e-3 * images.mean(dim=(2, 3))
        return torch.cat([means[:, :1] + 9.0, *(means * k for k in range(1, 5))], dim=1)

    def routers(self, images: Tensor, labels: Tensor) -> Tensor:
        return self(images).mean()

    def _back(self, gradient: Tensor) -> None:
        self.passes += 2 * len(gradient)


def cell_of(name: str, **budget) -> Cell:
    pictures = Pictures("data", [Path("x.png")] * 2, [0] * 2)
    return Cell(pictures, "attack", name, "4", attack=name, budget=Budget(4 / 255, **budget))


@pytest.mark.parametrize("name", [name for name in ATTACKS if name != "autoattack"])
@pytest.mark.parametrize("budget", [{"steps": 8, "queries": 256}, {"steps": 24, "queries": 768}])
def test_an_attack_costs_what_it_is_reckoned_with(name: str, budget: dict[str, int]) -> None:
    model, cell = Counting().eval(), cell_of(name, **budget)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    routers = model.routers if ATTACKS[name].needs_router else None
    run_attack(name, model, images, torch.zeros(2, dtype=torch.long), cell.budget._replace(router_loss=routers))
    assert model.passes / 2 == pytest.approx(cost(cell), rel=0.35, abs=2)


def test_noise_costs_a_pass_and_the_ensemble_most() -> None:
    plain = cell_of("fgsm")._replace(kind="noise", attack=None)
    costs = {name: cost(cell_of(name)) for name in ATTACKS}
    assert cost(plain) == 1 and max(costs, key=costs.get) == "autoattack"
    assert cost(cell_of("pgd")._replace(router_aware=True)) == 1 + 2 * 60


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_says_how_it_works(name: str) -> None:
    """Loss, step size, start, restarts, budget, type of numbers; a size in numbers where it is constant."""
    (told,) = protocols([cell_of(name, steps=5, queries=256)])
    assert told["loss"] != "its own" and told["step"] != "its own" and told["start"] and told["restarts"] == 1
    assert (told["condition"], told["severity_or_eps"], told["pictures"]) == (name, "4", 2)
    assert told["dtype"] == "float32" and told["norm"] == "Linf" and told["eps"] == 4 / 255 and told["seed"] == 0
    steps, queries = (ATTACKS[name].spends == what for what in ("steps", "queries"))
    assert told.get("steps") == (5 if steps else None) and told.get("queries") == (256 if queries else None)
    sizes = {"fgsm": 4 / 255, "pgd": 2 / 255, "pgd-margin": 2 / 255, "pgd-routing": 2 / 255}
    assert told.get("step_size") == (pytest.approx(sizes[name]) if name in sizes else None)
