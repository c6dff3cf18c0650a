"""Random starts, restarts and passes: what each attack takes, what it makes of them, and what it refuses."""

from itertools import pairwise

import pytest
import torch
from test_attacks import ALONE, EPS, Net, allowed, data
from torch import Tensor, nn

from vmoe_momentum.robustness.attacks import (
    ATTACKS,
    PLAIN,
    Budget,
    Classifier,
    check_budget,
    cross_entropy,
    frozen,
    input_gradient,
    margin,
    run_attack,
    starting_point,
)

pytest.importorskip("torchattacks")
OTHER = {"random_start": True, "restarts": 3, "eot": 4}
CASES = [(name, option) for name in ATTACKS for option in PLAIN]
TAKEN = [(name, option) for name, option in CASES if getattr(ATTACKS[name], option)]


class Rugged(nn.Module):
    """Waves whose crests lie within eps of each other, so that it matters where an attack starts. 6 classes."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(6)
        self.waves = nn.Parameter(12 * torch.randn(48, 40, generator=generator))
        self.head = nn.Parameter(torch.randn(40, 6, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x.flatten(1) @ self.waves) @ self.head


def standing(name: str) -> tuple[nn.Module, Tensor, Tensor, Budget]:
    """Images, and a budget so small that the attack leaves some of them that another start would not."""
    net, images = Rugged().eval(), torch.rand(100, 3, 4, 4, generator=torch.Generator().manual_seed(7))
    budget = allowed(
        name, 0.03 if name in ("apgd", "fab") else 0.004, steps=1, queries=max(5, ATTACKS[name].min_queries)
    )
    with torch.no_grad():
        return net, images, net(images).argmax(dim=1), budget


class Noisy(nn.Module):
    """Sees each image through noise, also in evaluation."""

    def __init__(self, size: float = 0.05) -> None:
        super().__init__()
        self.net, self.size = Net(), size

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x + self.size * torch.randn_like(x))


class Flipping(nn.Module):
    """Two linear logits, so small that losses are linear, too; three passes in ten have a slope of the wrong sign."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1e-3 * torch.randn(48, generator=torch.Generator().manual_seed(4)))

    def forward(self, x: Tensor) -> Tensor:
        draw = 1 + 2 * torch.randn(len(x), 1, device=x.device)
        return draw * ((x.flatten(1) - 0.5) @ self.weight)[:, None] * torch.tensor([-1.0, 1.0])


def margins(net: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return margin(images, net.eval()(images), labels)


@pytest.mark.parametrize(("name", "option"), CASES)
def test_an_option_is_taken_or_refused(name: str, option: str) -> None:
    budget = allowed(name, EPS, **{option: OTHER[option]})
    if (name, option) in TAKEN:
        check_budget(name, budget)
    else:
        with pytest.raises(ValueError, match=f"{option}={OTHER[option]}: {name} has its own; leave it {PLAIN[option]}"):
            run_attack(name, Net(), *data(Net()), budget)


@pytest.mark.parametrize(("name", "option"), TAKEN)
def test_what_is_taken_changes_what_is_found(name: str, option: str) -> None:
    """Inside the ball and the box as ever; found again with the same seed."""
    pytest.importorskip(ATTACKS[name].package or "torch")
    net, images, labels, plain = standing(name)
    if option == "eot":
        net = Noisy().eval()
        images, labels = data(net.net)
        plain = allowed(name, 4 / 255, steps=3, queries=max(10, ATTACKS[name].min_queries))
    budget = plain._replace(**{option: OTHER[option]})
    found, again = (run_attack(name, net, images, labels, budget) for _ in range(2))
    assert torch.equal(found, again)
    assert not torch.equal(found, run_attack(name, net, images, labels, plain))
    assert float((found - images).abs().max()) <= budget.eps + 1e-6
    assert float(found.min()) >= 0 and float(found.max()) <= 1


@pytest.mark.parametrize("name", [name for name in ALONE if ATTACKS[name].restarts])
def test_more_restarts_never_find_less(name: str) -> None:
    """Image by image; and of every start that fooled one it is fooled."""
    pytest.importorskip(ATTACKS[name].package or "torch")
    net, images, labels, budget = standing(name)
    reached = [
        margins(net, run_attack(name, net, images, labels, budget._replace(restarts=n)), labels) for n in (1, 2, 4)
    ]
    for fewer, more in pairwise(reached):
        assert bool((more >= fewer).all())
    assert bool((reached[-1] > reached[0]).any())


class Shelf(nn.Module):
    """Flat around the picture, so that it has no gradient there; falls off to both sides, to the right below 0."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.middle = nn.Parameter(images.mean(dim=(1, 2, 3)))

    def forward(self, x: Tensor) -> Tensor:
        away = x.mean(dim=(1, 2, 3)) - self.middle
        lead = 1 - 300 * (away - 0.001).relu() - 100 * (-away - 0.001).relu().clamp_max(0.009)
        return torch.stack([lead, torch.zeros_like(lead)], dim=1)


@pytest.mark.parametrize("name", ["pgd", "pgd-margin"])
def test_one_start_in_four_that_fools_is_enough(name: str) -> None:
    """At the picture nothing shows the way, and about half of the random starts lead to the side where none falls."""
    images = torch.full((16, 3, 4, 4), 0.5) + 0.01 * torch.rand(16, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    net, labels = Shelf(images), torch.zeros(16, dtype=torch.long)
    budget = Budget(0.03, steps=10)
    left = {
        (random, n): int((margins(net, run_attack(name, net, images, labels, budget._replace(
            random_start=random, restarts=n)), labels) <= 0).sum())
        for random, n in ((False, 1), (True, 1), (False, 2), (True, 12))
    }  # fmt: skip
    assert left[False, 1] == 16
    assert 2 < left[True, 1] < 14 and 2 < left[False, 2] < 14
    assert left[True, 12] == 0


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_starts_are_uniform_and_an_image_s_own(norm: str) -> None:
    """In the L2 ball of n dimensions the share within radius r is r^n."""
    images = torch.full((400, 3, 1, 1), 0.5) + 1e-3 * torch.rand(400, 3, 1, 1)
    budget = Budget(0.1, norm, random_start=True)
    start = starting_point(images, budget)
    change = (start - images).flatten(1) / budget.eps
    assert bool((change.abs() <= 1 + 1e-5).all()) and float(change.mean().abs()) < 0.08
    if norm == "Linf":
        assert float(change.var()) == pytest.approx(1 / 3, rel=0.1)
    else:
        radius = change.norm(dim=1)
        assert float(radius.max()) <= 1 + 1e-5
        assert float((radius < 0.5).float().mean()) == pytest.approx(0.125, abs=0.05)
    order = torch.randperm(400)
    assert torch.equal(starting_point(images[order], budget), start[order])
    assert torch.equal(starting_point(images[7:8], budget), start[7:8])
    assert not torch.equal(starting_point(images, budget._replace(seed=1)), start)
    assert len(start.flatten(1).unique(dim=0)) == 400
    assert torch.equal(starting_point(images, Budget(0.1, norm)), images)
    edge = torch.ones(2, 3, 4, 4)
    assert float(starting_point(edge, budget).max()) <= 1


@pytest.mark.parametrize("name", ["fgsm", "pgd", "pgd-margin", "pma", "pgd-routing"])
def test_starts_and_restarts_do_not_depend_on_the_batch(name: str) -> None:
    net = Net()
    images, labels = data(net, 6)
    budget = allowed(name, EPS, steps=3, random_start=True, restarts=2)
    whole = run_attack(name, net, images, labels, budget)
    alone = [run_attack(name, net, images[i : i + 1], labels[i : i + 1], budget) for i in range(6)]
    torch.testing.assert_close(torch.cat(alone), whole, atol=1e-6, rtol=0)


def test_gradients_are_averaged_over_draws() -> None:
    """That of the mean over passes, each with its own draw; logits likewise for attacks that cannot."""
    net = Noisy().eval()
    images, labels = data(net.net, 4)
    with frozen(net, 5), torch.enable_grad():
        single = [input_gradient(net, images, labels, cross_entropy, Budget(0.0)) for _ in range(3)]
    with frozen(net, 5), torch.enable_grad():
        together = input_gradient(net, images, labels, cross_entropy, Budget(0.0, eot=3))
    torch.testing.assert_close(together, sum(single) / 3)
    assert float((single[0] - single[1]).abs().max()) > 1e-3
    with frozen(net, 6), torch.no_grad():
        each = torch.stack([net(images) for _ in range(3)])
    with frozen(net, 6), torch.no_grad():
        torch.testing.assert_close(Classifier(net, 3)(images), each.mean(dim=0))


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ["fgsm", "pgd", "pgd-margin"])
def test_averaged_gradients_climb_where_single_ones_wander(name: str, norm: str) -> None:
    """On average the logits are linear, so the best point is known: eps along the weights."""
    net = Flipping()
    images = torch.full((8, 3, 4, 4), 0.5)
    labels, eps = torch.zeros(8, dtype=torch.long), 0.02 if norm == "Linf" else 0.5
    length = net.weight.abs().sum() if norm == "Linf" else net.weight.norm()
    gained = []
    for passes in (1, 100):
        found = run_attack(name, net, images, labels, Budget(eps, norm, steps=4, eot=passes))
        gained.append((((found - images).flatten(1) @ net.weight) / (eps * length)).mean().item())
    assert gained[1] > 0.9 and gained[0] < gained[1] - 0.1


@pytest.mark.parametrize("name", [name for name in ALONE if ATTACKS[name].eot])
def test_passes_are_multiplied(name: str) -> None:
    pytest.importorskip(ATTACKS[name].package or "torch")
    net = Net().eval()
    images, labels = data(net, 4)
    counts = []
    for passes in (1, 5):
        calls = []
        handle = net.register_forward_hook(lambda module, inputs, output, calls=calls: calls.append(len(output)))
        budget = allowed(
            name, 0.1 / 255, steps=10, queries=max(20, ATTACKS[name].min_queries), eot=passes
        )  # too small to end early
        run_attack(name, net, images, labels, budget)
        handle.remove()
        counts.append(sum(calls))
    assert 3.8 * counts[0] < counts[1] <= 5 * counts[0]
