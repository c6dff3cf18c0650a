"""Attacks against plain loops, and the hygiene around torchattacks."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vmoe_momentum.robustness.attacks import (
    ATTACKS,
    Budget,
    attack,
    check_attack,
    check_budget,
    cross_entropy,
    direction,
    frozen,
    input_gradient,
    margin,
    project,
    projected_gradient,
    run_attack,
)

pytest.importorskip("torchattacks")
EPS = 8 / 255
# the ensemble is long, and has a test of its own
ALONE = [name for name in ATTACKS if name != "autoattack"]


class Net(nn.Module):
    """A small smooth classifier of 16-pixel images into 4 classes, with a BatchNorm and dropout to get wrong."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Dropout(0.5))
        self.head, self.scale = nn.Linear(8 * 196, 4), scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.head(self.features((x - 0.5) / 0.25).flatten(1))


def data(net: nn.Module, count: int = 12) -> tuple[Tensor, Tensor]:
    """Images with pure black and white in them, labelled as the net sees them."""
    images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    images[:, :, :3], images[:, :, -3:] = 0.0, 1.0
    with torch.no_grad():
        return images, net.eval()(images).argmax(dim=1)


def allowed(name: str, eps: float, norm: str = "Linf", **budget) -> Budget:
    """With a routers' loss for what is nothing without one."""
    routers = {"router_loss": lambda x, y: (x[:, 0] * x[:, 1]).mean()} if ATTACKS[name].needs_router else {}
    return Budget(eps, norm, **budget, **routers)


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((net.eval()(images).argmax(dim=1) == labels).float().mean())


def naive_pgd(net: nn.Module, images: Tensor, labels: Tensor, eps: float, steps: int, loss: str) -> Tensor:
    """Image by image, written out."""
    step, found = min(eps, 2.5 * eps / steps), []
    for image, label in zip(images, labels.tolist(), strict=True):
        x = image.clone()
        for _ in range(steps):
            x.requires_grad_()
            logits = net(x[None])[0]
            if loss == "ce":
                value = torch.logsumexp(logits, 0) - logits[label]
            else:
                value = max(logits[k] for k in range(4) if k != label) - logits[label]
            (gradient,) = torch.autograd.grad(value, x)
            x = x.detach() + step * gradient.sign()
            x = torch.max(torch.min(x, image + eps), image - eps).clamp(0, 1)
        found.append(x)
    return torch.stack(found)


@pytest.mark.parametrize(("name", "loss"), [("pgd", "ce"), ("pgd-margin", "margin")])
def test_pgd_is_the_loop(name: str, loss: str) -> None:
    net = Net()
    images, labels = data(net)
    found = run_attack(name, net, images, labels, Budget(EPS, steps=5))
    torch.testing.assert_close(found, naive_pgd(net, images, labels, EPS, 5, loss), atol=1e-6, rtol=0)


def test_ours_is_torchattacks_where_both_are_sound() -> None:
    net = Net()
    images, labels = data(net)
    mine = projected_gradient(net, images, labels, cross_entropy, Budget(EPS, steps=7))
    torch.testing.assert_close(mine, run_attack("pgd", net, images, labels, Budget(EPS, steps=7)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(("norm", "eps"), [("Linf", EPS), ("L2", 0.5)])
def test_pgd_is_foolbox(norm: str, eps: float, steps: int) -> None:
    foolbox = pytest.importorskip("foolbox")
    net = Net()
    images, labels = data(net)
    kind = {"Linf": foolbox.attacks.LinfPGD, "L2": foolbox.attacks.L2PGD}[norm]
    peer = kind(abs_stepsize=min(eps, 2.5 * eps / steps), steps=steps, random_start=False)
    expected = peer(foolbox.PyTorchModel(net.eval(), bounds=(0, 1), device="cpu"), images, labels, epsilons=eps)[1]
    found = run_attack("pgd", net, images, labels, Budget(eps, norm, steps=steps))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 4 / 255), pytest.param("L2", 0.4, marks=pytest.mark.long)])
def test_autoattack_is_no_weaker_than_its_parts(norm: str, eps: float) -> None:
    """4 classes: fewer than the 9 it targets by default. Its official form, not torchattacks' ten steps."""
    pytest.importorskip("pyautoattack")
    net = Net()
    images, labels = data(net, 4)
    before = torch.get_rng_state()
    found = run_attack("autoattack", net, images, labels, Budget(eps, norm))
    assert torch.equal(torch.get_rng_state(), before)
    size = (found - images).flatten(1)
    assert float((size.abs().amax(dim=1) if norm == "Linf" else size.norm(dim=1)).max()) <= eps + 1e-6
    parts = [run_attack(name, net, images, labels, Budget(eps, norm, steps=50)) for name in ("apgd", "pgd-margin")]
    assert accuracy(net, found, labels) <= min(accuracy(net, part, labels) for part in parts) < 1.0


@pytest.mark.parametrize(
    ("name", "side", "classes", "norm", "message"),
    [
        ("apgd-dlr", 16, 2, "Linf", "apgd-dlr: needs 3 classes, there are 2"),
        ("autoattack", 16, 3, "Linf", "autoattack: needs 4 classes"),
        ("square", 24, 10, "L2", "square: in L2 it cannot cut up 24-pixel images"),
    ],
)
def test_what_cannot_be_attacked_is_said_first(name: str, side: int, classes: int, norm: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_attack(name, side, classes, norm)
    check_attack("square", 24, 2, "Linf")


@pytest.mark.parametrize("side", [*range(4, 40), 96, 224])
def test_which_sides_square_cuts_up_in_l2(side: int) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * side**2, 2))
    images = torch.rand(2, 3, side, side)
    labels = net(images).argmax(dim=1)  # so that it has something to do
    budget = Budget(0.1, "L2", queries=2)
    if side in ATTACKS["square"].not_in_l2:
        with pytest.raises((RuntimeError, ZeroDivisionError)):
            run_attack("square", net, images, labels, budget)
    else:
        run_attack("square", net, images, labels, budget)


LAYOUTS = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other row": lambda x: x.repeat_interleave(2, dim=0)[::2],
    "one image spread": lambda x: x[:1].expand_as(x),
}
PAIRS = [
    pytest.param(name, norm, marks=pytest.mark.long if name == "autoattack" else ())
    for name in ATTACKS
    for norm in ATTACKS[name].norms
]


@pytest.mark.parametrize(("name", "norm"), PAIRS)
def test_memory_layouts_change_nothing(name: str, norm: str) -> None:
    """Of images, whatever their strides; and a channels-last network is attacked as well as another."""
    pytest.importorskip(ATTACKS[name].package or "torch")
    net = Net().eval()
    images, labels = data(net, 4)
    budget = allowed(name, 0.5 if norm == "L2" else EPS, norm, steps=2, queries=max(10, ATTACKS[name].min_queries))
    for what, change in LAYOUTS.items():
        other = change(images)
        assert what == "every other row" or not other.is_contiguous()
        expected = run_attack(name, net, other.contiguous(), labels, budget)
        assert torch.equal(run_attack(name, net, other, labels, budget), expected), what

    class Turned(Net):  # whose gradients of contiguous pixels are channels-last
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.contiguous(memory_format=torch.channels_last))

    found = run_attack(name, Turned().to(memory_format=torch.channels_last).eval(), images, labels, budget)
    change = (found - images).flatten(1)
    assert float((change.abs().amax(dim=1) if norm == "Linf" else change.norm(dim=1)).max()) <= budget.eps + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("name", "norm"), PAIRS)
def test_logits_of_every_type(name: str, norm: str, dtype: torch.dtype) -> None:
    """A model may compute in halves or doubles: attacked as it would be behind `.float()`."""
    pytest.importorskip(ATTACKS[name].package or "torch")

    class Typed(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.to(dtype)).to(wanted)

    wanted = dtype
    net = Typed().eval().to(dtype)
    images, labels = data(net, 4)
    budget = allowed(name, 0.5 if norm == "L2" else EPS, norm, steps=2, queries=max(10, ATTACKS[name].min_queries))
    found = run_attack(name, net, images, labels, budget)
    assert found.dtype == torch.float32
    if dtype != torch.float64:
        wanted = torch.float32
        assert torch.equal(found, run_attack(name, net, images, labels, budget))


def test_fgsm_by_its_definition() -> None:
    net = Net()
    images, labels = data(net)
    leaf = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(leaf), labels, reduction="sum"), leaf)
    expected = (images + EPS * gradient.sign()).clamp(0, 1)
    torch.testing.assert_close(run_attack("fgsm", net, images, labels, Budget(EPS)), expected)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("name", ALONE)
def test_ball_and_box_hold_and_zero_budget_is_the_clean_image(name: str, norm: str) -> None:
    net = Net()
    images, labels = data(net)
    eps = EPS if norm == "Linf" else 0.5
    found = run_attack(name, net, images, labels, allowed(name, eps, norm, steps=4, queries=128))
    change = (found - images).flatten(1)
    size = change.abs().amax(dim=1) if norm == "Linf" else change.norm(dim=1)
    assert float(size.max()) <= eps + 1e-6 and float(size.max()) > 0.2 * eps
    assert float(found.min()) >= 0 and float(found.max()) <= 1
    assert found.dtype == torch.float32 and not found.requires_grad and not found.is_inference()
    assert torch.equal(run_attack(name, net, images, labels, allowed(name, 0.0, norm)), images)


@pytest.mark.parametrize(("norm", "eps"), [("Linf", 32 / 255), ("L2", 2.0)])
@pytest.mark.parametrize("name", ALONE)
def test_attacks_make_a_model_worse(name: str, norm: str, eps: float) -> None:
    net = Net()
    images, labels = data(net, 24)
    found = run_attack(name, net, images, labels, allowed(name, eps, norm, steps=20, queries=512))
    assert accuracy(net, images, labels) == 1.0
    assert accuracy(net, found, labels) <= 0.7


@pytest.mark.parametrize("name", ALONE)
def test_nothing_is_left_behind(name: str) -> None:
    """Train flags of every sub-module, requires_grad, .grad, random state; inside inference_mode too."""
    net = Net().train()
    net.features[1].eval()  # a frozen BatchNorm inside a training model
    net.head.bias.requires_grad_(False)
    images, labels = data(net)
    net.train()
    net.features[1].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    flags = [module.training for module in net.modules()]
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    budget = allowed(name, EPS, steps=3, queries=128)
    with torch.inference_mode():
        found = run_attack(name, net, images.clone(), labels, budget)
    assert torch.equal(torch.rand(3), expected)
    with torch.no_grad():
        assert torch.equal(run_attack(name, net, images.double(), labels, budget), found)
    assert found.dtype == torch.float32
    assert [module.training for module in net.modules()] == flags and True in flags and False in flags
    assert not net.head.bias.requires_grad and net.head.weight.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert not torch.equal(found, images)
    assert torch.equal(run_attack(name, net.eval(), images, labels, budget), found)  # in eval mode all along


def test_also_after_an_error() -> None:
    net = Net().train()

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run_attack("pgd", Broken(), *data(Net()), Budget(EPS))
    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_pixels_and_budgets_out_of_range_are_refused() -> None:
    net = Net()
    images, labels = data(net)
    for wrong in (images * 255, 2 * images - 1, torch.full_like(images, float("nan"))):
        with pytest.raises(ValueError, match=r"attacks work on pixels in \[0, 1\]"):
            run_attack("pgd", net, wrong, labels, Budget(EPS))
    with pytest.raises(ValueError, match="eps=4: pixels lie in"):
        check_budget("pgd", Budget(4.0))
    for eps in (-0.1, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="eps="):
            check_budget("pgd", Budget(eps))
    with pytest.raises(ValueError, match="attacks=pgdd: no such attack"):
        check_budget("pgdd", Budget(EPS))
    with pytest.raises(ValueError, match="norm=L1: pgd knows Linf, L2"):
        check_budget("pgd", Budget(EPS, "L1"))
    with pytest.raises(ValueError, match="steps=0"):
        check_budget("pgd", Budget(EPS, steps=0))


def test_saturated_logits_hide_the_cross_entropy_not_the_margin() -> None:
    """Logits times 1,000: most images have no cross-entropy gradient at all, and PGD on it leaves them standing."""
    net = Net(scale=1000.0)
    images, labels = data(net, 40)
    gradient = input_gradient(net, images, labels, cross_entropy, Budget(0.0))
    assert float((gradient.flatten(1).abs().amax(dim=1) == 0).float().mean()) > 0.2
    budget = Budget(16 / 255, steps=20)
    names = ("pgd", "pgd-margin", "apgd", "apgd-dlr")
    left = {name: accuracy(net, run_attack(name, net, images, labels, budget), labels) for name in names}
    assert left["pgd-margin"] < left["pgd"] - 0.1 and left["apgd-dlr"] < left["apgd"] - 0.1


def test_l2_steps_do_not_shrink_for_confident_models() -> None:
    net = Net(scale=300.0)
    images, labels = data(net)
    images = 0.25 + images / 2  # away from the box
    found = run_attack("pgd", net, images, labels, Budget(0.3, "L2", steps=1))
    moved = (found - images).flatten(1).norm(dim=1)
    gradient = input_gradient(net, images, labels, cross_entropy, Budget(0.0)).flatten(1).norm(dim=1)
    torch.testing.assert_close(moved[gradient > 0], torch.full_like(moved, 0.3)[gradient > 0])
    assert float(direction(torch.zeros(1, 3, 2, 2), "L2").abs().max()) == 0.0


def test_batch_size_and_order_do_not_matter() -> None:
    net = Net()
    images, labels = data(net, 14)
    order = list(range(14))
    random.Random(0).shuffle(order)
    for name in ("fgsm", "pgd", "pgd-margin", "pma", "pgd-routing"):
        budget = allowed(name, EPS, steps=4)
        whole = run_attack(name, net, images, labels, budget)
        for size in (1, 7):
            parts = [
                run_attack(name, net, images[i : i + size], labels[i : i + size], budget) for i in range(0, 14, size)
            ]
            torch.testing.assert_close(torch.cat(parts), whole, atol=1e-6, rtol=0)
        torch.testing.assert_close(run_attack(name, net, images[order], labels[order], budget), whole[order])


def test_a_router_loss_joins_the_objective() -> None:
    net = Net()
    images, labels = data(net)
    # a loss that only cares for brightness, much larger than the rest
    aware = Budget(EPS, steps=3, router_loss=lambda x, y: 1e4 * x.sum())
    none = Budget(EPS, steps=3, router_loss=lambda x, y: 0 * x.sum())
    for name in ("fgsm", "pgd", "pgd-margin"):
        plain = run_attack(name, net, images, labels, Budget(EPS, steps=3))
        torch.testing.assert_close(run_attack(name, net, images, labels, none), plain, atol=1e-6, rtol=0)
        found = run_attack(name, net, images, labels, aware)
        torch.testing.assert_close(found, (images + EPS).clamp(0, 1))


def test_projection_and_margin_by_hand() -> None:
    images = torch.full((1, 3, 1, 1), 0.5)
    far = images + torch.tensor([3.0, 0.0, 4.0]).view(1, 3, 1, 1)
    torch.testing.assert_close(project(images, far, Budget(0.1, "L2")).flatten(), torch.tensor([0.56, 0.5, 0.58]))
    torch.testing.assert_close(project(images, far, Budget(0.1)).flatten(), torch.tensor([0.6, 0.5, 0.6]))
    assert torch.equal(project(images, far * torch.nan, Budget(0.1)), images)
    logits = torch.tensor([[3.0, 1.0, 2.5]])
    assert margin(images, logits, torch.tensor([0])).item() == -0.5
    assert margin(images, logits, torch.tensor([1])).item() == 2.0


def test_spsa_uses_its_queries_and_its_budget() -> None:
    """torchattacks' own stops at 2.55/255 whatever eps is."""
    net = Net()
    images, labels = data(net)
    calls = []
    net.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    found = run_attack("spsa", net, images, labels, Budget(32 / 255, queries=640))
    assert sum(calls) == 640 * len(images)
    assert float((found - images).abs().max()) > 20 / 255


@pytest.mark.parametrize(
    ("name", "spent", "seeded"),
    [("fgsm", 1, False), ("pgd", 20, False), ("pgd-margin", 20, False), ("apgd", 22, True), ("apgd-dlr", 22, True),
     ("square", 40, True), ("spsa", 128, True), ("pma", 41, False), ("pgd-routing", 41, False), ("apgd-t", 67, True),
     ("malt", 65, True), ("fab", 128, False)],
)  # fmt: skip
def test_budgets_and_seeds_are_used(name: str, spent: int, seeded: bool) -> None:
    """Forward passes an image, a few more for starts and ends; other random numbers with another seed."""
    net = Net()
    images, labels = data(net)
    calls = []
    handle = net.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    budget = allowed(name, 0.1 / 255, steps=20, queries=128 if name == "spsa" else 40)  # too small to end early
    run_attack(name, net, images, labels, budget)
    handle.remove()
    assert spent <= sum(calls) / len(images) <= spent + 3
    budget = allowed(name, EPS, steps=3, queries=256)
    first, again, other = (run_attack(name, net, images, labels, budget._replace(seed=s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and torch.equal(first, other) != seeded


def test_frozen_is_seeded_and_restores_numpy_untouched() -> None:
    state = np.random.get_state()[1].copy()
    draws = []
    for seed in (3, 3, 4):
        with frozen(Net(), seed):
            draws.append(torch.rand(1).item())
    assert draws[0] == draws[1] != draws[2]
    assert np.array_equal(np.random.get_state()[1], state)


def test_a_new_attack_is_one_function() -> None:
    @attack("Linf")
    def brighten(model, images, labels, budget):
        return images + 2 * budget.eps

    try:
        net = Net()
        images, labels = data(net)
        found = run_attack("brighten", net, images, labels, Budget(EPS))
        torch.testing.assert_close(found, (images + EPS).clamp(0, 1))  # held inside the ball
    finally:
        del ATTACKS["brighten"]
