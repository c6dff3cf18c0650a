"""Every optimizer that timm offers moves stacked experts as it would move separate layers, or is refused by name."""

import importlib.util
import io

import pytest
import torch
from timm.optim import get_optimizer_info, list_optimizers
from torch import nn

from vmoe_momentum import HeavyBall, SoftRouter, TopKRouter, create_model
from vmoe_momentum.moe.experts import StackedLinear
from vmoe_momentum.training import OptimizerSettings
from vmoe_momentum.training.per_expert import ELEMENTWISE, PerExpert

HAS_EINSUM = importlib.util.find_spec("opt_einsum") is not None
E, OUT, IN = 3, 36, 33  # large enough for factored moments (32), small enough for matrices of matrices
REFUSED = {
    "adahessian": "gradients of gradients",
    **{name: "CUDA required for" for name in list_optimizers() if name.startswith(("bnb", "fused"))},
    **dict.fromkeys(("kron", "kronc", "kronw"), "share its random draws" if HAS_EINSUM else "pip install opt_einsum"),
}
OFFERED = [name for name in list_optimizers() if name not in REFUSED]


class Stacked(nn.Module):
    """What experts are among: a matrix, a norm and a learned scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(IN, E, bias=False)
        self.experts = StackedLinear(E, IN, OUT)
        self.norm, self.raw_mu = nn.LayerNorm(IN), nn.Parameter(torch.tensor(0.3))


class Separate(nn.Module):
    """The same weights, E layers."""

    def __init__(self, stacked: Stacked) -> None:
        super().__init__()
        self.router, self.norm, self.raw_mu = (
            nn.Linear(IN, E, bias=False),
            nn.LayerNorm(IN),
            nn.Parameter(torch.ones(())),
        )
        self.experts = nn.ModuleList(nn.Linear(IN, OUT) for _ in range(E))
        with torch.no_grad():
            for name, parameter in stacked.named_parameters():
                if name.startswith("experts."):
                    for layer, tensor in zip(self.experts, parameter, strict=True):
                        layer.get_parameter(name.removeprefix("experts.")).copy_(tensor)
                else:
                    self.get_parameter(name).copy_(parameter)

    def stack(self) -> dict[str, torch.Tensor]:
        own = {n: p for n, p in self.named_parameters() if not n.startswith("experts.")}
        return own | {
            f"experts.{n}": torch.stack([layer.get_parameter(n) for layer in self.experts]) for n in ("weight", "bias")
        }


def start() -> Stacked:
    torch.manual_seed(0)
    net = Stacked()
    nn.init.normal_(net.experts.bias, std=0.1)
    return net


def gradients(net: Stacked, step: int) -> dict[str, torch.Tensor]:
    """Of other sizes for each expert, so that one norm for all differs from one each."""
    generator = torch.Generator().manual_seed(step)
    found = {}
    for name, p in net.named_parameters():
        found[name] = torch.randn(p.shape, generator=generator)
        if name.startswith("experts."):
            found[name] = found[name] * torch.tensor([0.1, 1.0, 10.0]).view(-1, *[1] * (p.ndim - 1))
    return found


def give(net: nn.Module, found: dict[str, torch.Tensor]) -> None:
    for name, gradient in found.items():
        if isinstance(net, Stacked) or not name.startswith("experts."):
            net.get_parameter(name).grad = gradient.clone()
        else:
            for layer, one in zip(net.experts, gradient, strict=True):
                layer.get_parameter(name.removeprefix("experts.")).grad = one.clone()


def walk(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 / (1 + step)  # as a schedule does
        give(net, gradients(start(), step))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OFFERED)
def test_as_on_separate_layers_and_resumed_to_the_bit(name: str) -> None:
    stacked = start()
    separate = Separate(stacked)
    settings = OptimizerSettings(name, lr=0.01, weight_decay=0.1)
    ours, theirs = settings.build(stacked), settings.build(separate)
    assert isinstance(ours, PerExpert) is (name not in ELEMENTWISE) and not isinstance(theirs, PerExpert)
    walk(separate, theirs, range(4))
    walk(stacked, ours, range(2))
    file = io.BytesIO()
    torch.save((stacked.state_dict(), ours.state_dict()), file)
    walk(stacked, ours, range(2, 4))
    for parameter, tensor in separate.stack().items():
        torch.testing.assert_close(stacked.get_parameter(parameter), tensor, rtol=1e-5, atol=1e-6)

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = start()
    resumed.load_state_dict(weights)
    again = settings.build(resumed)
    again.load_state_dict(state)
    walk(resumed, again, range(2, 4))
    for parameter, tensor in stacked.named_parameters():
        assert torch.equal(resumed.get_parameter(parameter), tensor), parameter


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_train_is_refused_by_name(name: str) -> None:
    if name.startswith(("bnb", "fused")) and torch.cuda.is_available():
        pytest.skip("their packages decide")
    with pytest.raises(ValueError, match=f"model.optimizer.name={name}: .*{REFUSED[name]}.*; use another one"):
        OptimizerSettings(name).build(start())


@pytest.mark.parametrize("name", OFFERED)
def test_betas_that_an_optimizer_does_not_take_are_refused(name: str) -> None:
    told = get_optimizer_info(name)
    settings = OptimizerSettings(name, betas=(0.8, 0.9))
    if told.has_betas and told.num_betas == 2:
        for group in settings.build(start()).param_groups:
            assert group.get("betas", group.get("beta1")) in ((0.8, 0.9), 0.8)  # adafactor keeps the first
    else:
        with pytest.raises(ValueError, match=f"model.optimizer.betas=.*{name} takes"):
            settings.build(start())


@pytest.mark.parametrize("name", ["muon", "lamb", "adafactor"])
@pytest.mark.parametrize("router", [TopKRouter(), SoftRouter(slots_per_expert=2)])
def test_whole_networks(name: str, router) -> None:
    """Every parameter moves; Soft MoE's slots are one matrix of E*P rows."""
    net = create_model("vmoe_tiny_patch4_16", rule=HeavyBall(mu=0.5, learn=True), router=router)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = OptimizerSettings(name, lr=0.1).build(net)
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert not [n for n, p in net.named_parameters() if torch.equal(p, before[n])]
    slots = [p for n, p in net.named_parameters() if n.endswith("router.mu")]
    shapes = {tuple(part.shape) for group in optimizer.inner.param_groups for part in group["params"]}
    assert (len(slots) > 0) is ((8, 64) in shapes) and not any(len(shape) == 3 and shape[0] == 4 for shape in shapes)


def test_a_network_cut_up_over_devices_is_refused() -> None:
    net = start()
    net.experts.weight = nn.Parameter(torch.zeros(7))  # as sharding leaves it
    with pytest.raises(ValueError, match="model.optimizer.name=lamb: .*trainer.strategy cuts experts up"):
        OptimizerSettings("lamb").build(net)
    OptimizerSettings("adamw").build(net)
