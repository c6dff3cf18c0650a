"""Attacks that choose classes or margins, against closed forms, other code and loops written out."""

import math

import pytest
import torch
from linear import Linear, check_against_closed_form, problem
from test_attacks import EPS, Net, accuracy, data
from torch import Tensor

from vmoe_momentum.robustness.attacks import (
    Budget,
    cross_entropy,
    input_gradient,
    nearest_classes,
    probability_margin,
    run_attack,
)

torchattacks = pytest.importorskip("torchattacks")
pytest.importorskip("pyautoattack")


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize(
    ("name", "classes"),
    [("fgsm", 2), ("pgd", 2), ("pgd-margin", 2), ("pma", 2), ("pgd-routing", 2), ("apgd", 2), ("fab", 2),
     ("apgd-t", 10), ("fab", 10), ("malt", 10), ("malt", 14)],
)  # fmt: skip
def test_on_linear_models_exactly_those_fall_that_can(name: str, classes: int, norm: str) -> None:
    check_against_closed_form(name, classes, norm)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("classes", [5, 10, 14])
def test_the_nearest_classes_of_a_linear_model(classes: int, norm: str) -> None:
    net, images, labels, distances, eps = problem(classes, norm)
    targets = nearest_classes(net, images, labels, Budget(eps, norm))
    assert torch.equal(targets, distances.argsort(dim=1)[:, : min(9, classes - 1)])
    assert not bool((targets == labels[:, None]).any())
    assert not torch.equal(targets[:, 0], net(images).topk(2).indices[:, 1])  # likeliest is something else


def hidden(classes: int) -> tuple[Linear, Tensor, Tensor, float]:
    """The last class is the least likely by far, and the only one within eps."""
    net = Linear(classes)
    with torch.no_grad():
        net.weight *= 0.01
        net.weight[-1] = 5.0
        net.bias[-1] = -9.0
        net.bias[0] = 2.0
    images = torch.full((3, 3, 4, 4), 0.5) + 0.01 * torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    return net, images, torch.zeros(3, dtype=torch.long), 11.5 / (5 * 48)


def test_a_class_that_only_looks_far_away_is_found() -> None:
    """It is none of the 9 likeliest, which are all that APGD-T, FAB and AutoAttack try; nor one of 100 likeliest."""
    net, images, labels, eps = hidden(12)
    budget = Budget(eps, steps=20)
    assert nearest_classes(net, images, labels, budget)[:, 0].tolist() == [11] * 3
    assert accuracy(net, run_attack("malt", net, images, labels, budget), labels) == 0.0
    for name in ("apgd-t", "fab"):
        assert accuracy(net, run_attack(name, net, images, labels, budget), labels) == 1.0
    net, images, labels, eps = hidden(102)
    assert nearest_classes(net, images, labels, Budget(eps)).shape == (3, 9)
    assert 101 not in nearest_classes(net, images, labels, Budget(eps))


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 3 / 255), ("L2", 0.3)])
def test_apgd_t_is_torchattacks(norm: str, eps: float) -> None:
    """Two codes of one attack; each draws its own starts, so that single images may differ."""
    net = Net().eval()
    images, labels = data(net, 40)
    mine = run_attack("apgd-t", net, images, labels, Budget(eps, norm, steps=30))
    theirs = torchattacks.APGDT(net, norm=norm, eps=eps, steps=30, n_classes=4)(images, labels)
    with torch.no_grad():
        fallen, also = (net(x).argmax(dim=1) != labels for x in (mine, theirs))
    assert 0.2 < float(fallen.float().mean()) < 0.9
    assert int((fallen != also).sum()) <= 1


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 3 / 255), ("L2", 0.3)])
def test_fab_is_torchattacks(norm: str, eps: float) -> None:
    """Nothing is drawn, so pixels agree."""
    net = Net().eval()
    images, labels = data(net, 20)
    mine = run_attack("fab", net, images, labels, Budget(eps, norm, steps=10))
    theirs = torchattacks.FAB(net, norm=norm, eps=eps, steps=10, multi_targeted=True, n_classes=4)(images, labels)
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)
    assert 0.1 < accuracy(net, mine, labels) < 0.9


def test_malt_and_apgd_t_agree_where_all_classes_are_targets() -> None:
    """In another order; each falls if any target makes it fall."""
    net = Net().eval()
    images, labels = data(net, 40)
    found = [run_attack(name, net, images, labels, Budget(3 / 255, steps=30)) for name in ("malt", "apgd-t")]
    left = [accuracy(net, each, labels) for each in found]
    assert abs(left[0] - left[1]) <= 1 / 40 and 0.1 < left[0] < 0.8


def test_the_probability_margin_weighs_two_cross_entropies() -> None:
    """Gradient p_y of the true class's less p_k of the nearest one's (the paper's analysis); and value by hand."""
    net = Net(scale=0.3).eval()
    images, labels = data(net)
    with torch.no_grad():
        p = net(images).softmax(dim=1)
    others = p.masked_fill(torch.nn.functional.one_hot(labels, 4).bool(), -1)
    k = others.argmax(dim=1)
    own, nearest = (input_gradient(net, images, y, cross_entropy, Budget(0.0)) for y in (labels, k))
    p_y, p_k = (p.gather(1, y[:, None]).view(-1, 1, 1, 1) for y in (labels, k))
    found = input_gradient(net, images, labels, probability_margin, Budget(0.0))
    torch.testing.assert_close(found, p_y * own - p_k * nearest, atol=1e-6, rtol=1e-4)
    logits = torch.tensor([[math.log(0.6), math.log(0.1), math.log(0.3)]])
    for label, margin in ((0, -0.3), (1, 0.5), (2, 0.3)):
        assert probability_margin(logits, logits, torch.tensor([label])).item() == pytest.approx(margin, abs=1e-6)


def test_pma_is_the_loop() -> None:
    """Image by image, written out: steps of eps (1 + cos), the iterate of the largest margin of logits."""
    net, steps = Net(scale=0.5).eval(), 7
    images, labels = data(net)
    expected = []
    for image, label in zip(images, labels.tolist(), strict=True):
        x, best, highest = image.clone(), None, -math.inf
        for step in range(steps + 1):
            x.requires_grad_()
            logits = net(x[None])[0]
            others = [k for k in range(4) if k != label]
            reached = float(max(logits[k] for k in others) - logits[label])
            best, highest = (x.detach().clone(), reached) if reached > highest else (best, highest)
            p = logits.double().exp() / logits.double().exp().sum()
            (gradient,) = torch.autograd.grad(max(p[k] for k in others) - p[label], x)
            x = x.detach() + EPS * (1 + math.cos(math.pi * step / steps)) * gradient.sign()
            x = torch.max(torch.min(x, image + EPS), image - EPS).clamp(0, 1)
        expected.append(best)
    found = run_attack("pma", net, images, labels, Budget(EPS, steps=steps))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-6, rtol=0)


def test_saturated_probabilities_still_have_a_margin_to_climb() -> None:
    """30 logits ahead, 1 - p is 0 in float32, and with it the gradient of the true class."""
    logits = torch.tensor([[30.0, 0.0, -1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(probability_margin(logits, logits, torch.tensor([0])).sum(), logits)
    p = 1 / (1 + math.exp(30) + math.exp(-1))  # of class 1: gained at p (1 - p + p_y), lost by the true one at as much
    assert gradient[0, 1].item() == pytest.approx(2 * p, rel=1e-3)
    assert gradient[0, 0].item() == pytest.approx(-(2 + math.exp(-1)) * p, rel=1e-3)
