"""Every router against a float64 loop over tokens and slots, and the contracts that all of them keep."""

import inspect
import math

import pytest
import torch
from registered import registered
from torch import Tensor, nn

from vmoe_momentum.moe import (
    ExpertChoiceRouter,
    GShardRouter,
    M6TRouter,
    Router,
    SoftRouter,
    SparseMlp,
    TopKRouter,
)
from vmoe_momentum.specs import from_spec, to_spec

B, N, D, F, E = 3, 10, 8, 12, 4

ROUTERS = {
    "TopK": TopKRouter(2, capacity_factor=0.6, capacity_multiple_of=1),
    "ExpertChoice": ExpertChoiceRouter(capacity_factor=1.2),
    "ExpertChoice groups": ExpertChoiceRouter(capacity_factor=0.8, capacity_multiple_of=1, group_size=15),
    "ExpertChoice slots": ExpertChoiceRouter(capacity=3),
    "ExpertChoice all": ExpertChoiceRouter(capacity_factor=float(E), capacity_multiple_of=7),
    "Soft": SoftRouter(),
    "Soft slots": SoftRouter(slots_per_expert=3, noise_std=0.4, group_size=6),
    "GShard": GShardRouter(capacity_factor=0.6, capacity_multiple_of=1),
    "GShard dropless": GShardRouter(capacity_factor="dropless", group_size=15),
    "M6T": M6TRouter(capacity_factor=0.6, capacity_multiple_of=1),
    "M6T 4": M6TRouter(num_prototypes=4, group_size=30),
    "M6T 1": M6TRouter(num_prototypes=1, capacity_factor="dropless"),
}


def make(router: Router, dtype: torch.dtype = torch.float64, experts: int = E) -> SparseMlp:
    layer = SparseMlp(D, F, experts, router, nn.GELU).to(dtype)
    for parameter in layer.parameters():
        if parameter.ndim != 3 or parameter.shape[-1] == D and parameter.shape[1] != F:  # all but experts' kernels
            nn.init.normal_(parameter)
    return layer


def expert(layer: SparseMlp, e: int, x: Tensor) -> Tensor:
    experts = layer.experts
    hidden = nn.functional.gelu(experts.fc1.weight[e] @ x + experts.fc1.bias[e])
    return experts.fc2.weight[e] @ hidden + experts.fc2.bias[e]


def rounded(count: float, multiple: int, rounding: str = "ceil") -> int:
    count = math.ceil(count) if rounding == "ceil" else round(count)
    return math.ceil(count / multiple) * multiple


def naive_expert_choice(layer: SparseMlp, x: Tensor, noise: Tensor | None) -> Tensor:
    router = layer.router
    logits = x @ router.weight.T + (0 if noise is None else noise)
    gates, y = logits.softmax(-1), [torch.zeros(D, dtype=x.dtype) for _ in x]
    slots = rounded(len(x) * router.capacity_factor / E, router.capacity_multiple_of, router.capacity_rounding)
    slots = router.capacity or slots
    for e in range(E):
        for s in sorted(range(len(x)), key=lambda s, e=e: (-float(gates[s, e]), s))[:slots]:
            y[s] = y[s] + gates[s, e] * expert(layer, e, x[s])
    return torch.stack(y)


def naive_soft(layer: SparseMlp, x: Tensor, noise: Tensor | None) -> Tensor:
    router, slots = layer.router, layer.router.slots_per_expert
    unit = torch.stack([row / (row.square().sum() + 1e-6).sqrt() for row in x])
    logits = torch.stack(
        [
            router.scale * unit @ (router.mu[e, p] / (router.mu[e, p].square().sum() + 1e-6).sqrt())
            for e in range(E)
            for p in range(slots)
        ],
        dim=1,
    )
    logits = logits if noise is None else logits + noise.reshape(len(x), -1)
    dispatch, combine = logits.softmax(0), logits.softmax(1)
    outputs = torch.stack([expert(layer, q // slots, dispatch[:, q] @ x) for q in range(E * slots)])
    return combine @ outputs


def naive_gshard(layer: SparseMlp, x: Tensor, noise: Tensor | None) -> Tensor:
    router = layer.router
    gates, y = (x @ router.weight.T).softmax(-1), [torch.zeros(D, dtype=x.dtype) for _ in x]
    factor = router.capacity_factor if layer.training else router.eval_capacity_factor
    slots = len(x) if factor == "dropless" else rounded(len(x) * 2 * factor / E, router.capacity_multiple_of)
    used, chosen = [0] * E, [sorted(range(E), key=lambda e, g=g: (-float(g[e]), e))[:2] for g in gates]
    for rank in range(2):
        for s, experts in enumerate(chosen):
            weight = gates[s, experts[rank]] / gates[s, experts].sum()
            if rank == 1 and noise is not None and not float(noise[s]) < 2 * float(weight):
                continue
            used[experts[rank]] += 1
            if used[experts[rank]] <= slots:
                y[s] = y[s] + weight * expert(layer, experts[rank], x[s])
    return torch.stack(y)


def naive_m6t(layer: SparseMlp, x: Tensor, noise: Tensor | None) -> Tensor:
    router, k = layer.router, layer.router.num_prototypes
    factor = router.capacity_factor if layer.training else router.eval_capacity_factor
    slots = len(x) if factor == "dropless" else rounded(len(x) * k * factor / E, router.capacity_multiple_of)
    y, size = [torch.zeros(D, dtype=x.dtype) for _ in x], E // k
    for prototype in range(k):
        gates, used = (x @ router.weight[prototype * size : (prototype + 1) * size].T).softmax(-1), [0] * size
        for s in range(len(x)):
            best = max(range(size), key=lambda e, s=s: (float(gates[s, e]), -e))
            used[best] += 1
            if used[best] <= slots:
                y[s] = y[s] + gates[s, best] * expert(layer, prototype * size + best, x[s])
    return torch.stack(y)


NAIVE = {
    ExpertChoiceRouter: naive_expert_choice,
    SoftRouter: naive_soft,
    GShardRouter: naive_gshard,
    M6TRouter: naive_m6t,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [name for name in ROUTERS if name != "TopK"])
def test_naive_loop(name: str, training: bool) -> None:
    """Values and gradients, a group at a time. (TopKRouter has test_layer.py.)"""
    layer = make(ROUTERS[name]).train(training)
    x = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    noise = layer.router.sample_noise(x)
    assert (noise is None) == (not training or name in ("Soft", "M6T", "M6T 4", "M6T 1"))
    size = N if layer.router.group_size == "image" else layer.router.group_size
    groups = x.reshape(-1, size, D)
    noises = [None] * len(groups) if noise is None else noise.reshape(len(groups), size, *noise.shape[2:])
    route = NAIVE[type(ROUTERS[name])]
    expected = torch.stack([route(layer, *group) for group in zip(groups, noises, strict=True)]).reshape(x.shape)
    ours = layer(x, noise)[0]
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    inputs, cotangent = [x, *layer.parameters()], torch.randn_like(ours)
    gradients = [torch.autograd.grad(y, inputs, cotangent, allow_unused=True) for y in (ours, expected)]
    for actual, wanted in zip(*gradients, strict=True):
        wanted = torch.zeros_like(actual) if wanted is None else wanted  # one prototype of one expert: a constant gate
        torch.testing.assert_close(actual, wanted, atol=1e-11, rtol=1e-11)


def test_gshard_uses_the_second_expert_in_proportion_to_its_gate() -> None:
    """Over many draws each second choice is kept with probability 2 g2, and its slot is free when it is not."""
    layer = make(GShardRouter(capacity_factor="dropless")).train()
    x = torch.randn(1, N, D, dtype=torch.float64)
    kept = torch.stack([layer.router(x, layer.router.sample_noise(x))[0].kept for _ in range(4000)]).double().mean(0)
    evaluated = layer.eval().router(x, None)[0]
    assert bool(evaluated.kept.all())
    torch.testing.assert_close(evaluated.weight.sum(-1), torch.ones(1, N, dtype=torch.float64))
    assert (kept[..., 0] == 1).all()
    assert (kept[..., 1] - 2 * evaluated.weight[..., 1]).abs().max() < 4 * 0.5 / math.sqrt(4000)


def test_gshard_balance_loss_by_hand() -> None:
    """E * sum_e f_e m_e over all E experts, whatever is dropped or left out."""
    layer = make(GShardRouter(gshard_loss_weight=0.5)).eval()
    x = torch.randn(B, N, D, dtype=torch.float64)
    gates = (x @ layer.router.weight.T).softmax(-1)
    share = torch.stack([(gates.argmax(-1) == e).double().mean(1) for e in range(E)], dim=-1)
    expected = E * (share * gates.mean(1)).sum(-1)
    _, losses = layer.router(x, None)
    torch.testing.assert_close(losses.parts["gshard"], expected)
    torch.testing.assert_close(losses.auxiliary, 0.5 * expected)


def test_m6t_balance_loss_is_the_mean_over_prototypes() -> None:
    layer = make(M6TRouter(2, gshard_loss_weight=1.0)).eval()
    x = torch.randn(B, N, D, dtype=torch.float64)
    expected = torch.zeros(B, dtype=torch.float64)
    for experts in ([0, 1], [2, 3]):
        gates = (x @ layer.router.weight[experts].T).softmax(-1)
        share = torch.stack([(gates.argmax(-1) == e).double().mean(1) for e in range(2)], dim=-1)
        expected += 2 * (share * gates.mean(1)).sum(-1) / 2
    torch.testing.assert_close(layer.router(x, None)[1].auxiliary, expected)


def test_ties_go_to_the_earlier_token_and_the_lower_expert() -> None:
    x = torch.ones(1, 6, D)
    for router, reached in (
        (ExpertChoiceRouter(1.0, capacity_multiple_of=1), [[True] * E] * 2 + [[False] * E] * 4),
        (GShardRouter(), [[True, True, False, False]] * 6),
        (M6TRouter(2), [[True, False, True, False]] * 6),
    ):
        layer = make(router, torch.float32).eval()
        nn.init.ones_(layer.router.weight)
        assert layer.router(x, None)[0].assigned()[0].tolist() == reached


def test_every_router_is_here() -> None:
    assert {type(router) for router in ROUTERS.values()} == set(registered(Router).values())


@pytest.mark.parametrize("name", ROUTERS)
def test_contracts(name: str) -> None:
    """Finite, every parameter has a gradient, [G] losses, a plan that tells what it did, settings that travel."""
    layer = make(ROUTERS[name], torch.float32).train()
    x = torch.randn(B, N, D, requires_grad=True)
    noise = layer.router.sample_noise(x)
    outputs, auxiliary, _ = layer(x, noise)
    assert outputs.shape == x.shape
    assert auxiliary.shape == ()
    plan, losses = layer.router(x, noise)
    num_groups, size, num_experts = plan.gates.shape
    assert (num_groups * size, num_experts) == (B * N, E)
    assert all(value.shape == (num_groups,) for value in [losses.auxiliary, *losses.parts.values()])
    assert plan.assigned().shape == plan.gates.shape
    assert plan.load().shape == (E,)
    assert 0 <= float(plan.dropped()) < 1
    rows, ends = plan.dispatch(x.flatten(0, 1))
    if ends is None:
        assert len(rows) % E == 0
    else:
        assert ends.dtype == torch.int32
        assert int(ends[-1]) == len(rows)
        assert (ends.diff() >= 0).all()
    (outputs.square().sum() + auxiliary).backward()
    for parameter_name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        if name != "M6T 4":  # four prototypes of one expert: the gate is constant
            assert parameter.grad.abs().max() > 0, parameter_name
    spec = to_spec(ROUTERS[name])
    assert to_spec(from_spec(spec, Router, "router")) == spec


@pytest.mark.parametrize("name", [name for name, router in ROUTERS.items() if router.group_size == "image"])
def test_evaluation_ignores_batch_mates(name: str) -> None:
    layer = make(ROUTERS[name]).eval()
    x = torch.randn(B, N, D, dtype=torch.float64)
    assert layer.router.sample_noise(x) is None
    together = layer(x)[0]
    for image in range(B):
        torch.testing.assert_close(layer(x[image : image + 1])[0], together[image : image + 1], atol=1e-13, rtol=0)


# what the others are made of
TRACED = ("TopK", "ExpertChoice groups", "Soft slots", "M6T 4")


@pytest.mark.parametrize(
    "name", [name if name in TRACED else pytest.param(name, marks=pytest.mark.long) for name in ROUTERS]
)
def test_compiles_whole_and_exports_with_a_dynamic_batch(name: str) -> None:
    layer, x = make(ROUTERS[name], torch.float32).eval(), torch.randn(6, N, D)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x)[0], layer(x)[0], atol=1e-5, rtol=1e-5)
    size = layer.router.group_size
    if size != "image" and (N * 6) % size == 0 and size % N:
        return  # a group that cuts through images fixes the batch
    dim = torch.export.Dim("batch", min=1) if size == "image" else torch.export.Dim("groups") * (size // N)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: dim},), strict=False).module()
    for count in (3, 9):
        x = torch.randn(count, N, D)
        torch.testing.assert_close(program(x)[0], layer(x)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ROUTERS)
def test_autocast_keeps_routing_in_float32(name: str) -> None:
    layer = make(ROUTERS[name], torch.float32).eval()
    x = torch.randn(B, N, D)
    exact = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        plan, _ = layer.router(x, None)
        result = layer(x)[0]
    torch.testing.assert_close(plan.gates, layer.router(x, None)[0].gates, atol=0, rtol=0)
    assert result.dtype == torch.float32
    assert 0 < (exact - result).abs().max() < 0.06 * exact.abs().max()


CAPACITY = {
    "capacity_factor": 0.3, "eval_capacity_factor": 0.3, "capacity_multiple_of": 1, "capacity_rounding": "round",
    "group_size": N * B, "bfloat16_dispatch": True,
}  # fmt: skip
BASE = {"capacity_factor": 0.7, "capacity_multiple_of": 3}
CHANGES = {
    ExpertChoiceRouter: (
        BASE,
        {k: v for k, v in CAPACITY.items() if k != "eval_capacity_factor"}
        | {"noise_std": 3.0, "capacity_factor": 1.5, "capacity": 2},
    ),
    SoftRouter: ({}, {"slots_per_expert": 2, "noise_std": 1.0, "group_size": N * B, "bfloat16_dispatch": True}),
    GShardRouter: (BASE, CAPACITY | {"gshard_loss_weight": 0.5}),
    M6TRouter: (BASE, CAPACITY | {"num_prototypes": 4, "gshard_loss_weight": 0.5}),
}


def observe(router: Router) -> list[Tensor]:
    """Outputs and losses in both modes, from the same weights, tokens and noise draw."""
    seen = []
    for training in (True, False):
        torch.manual_seed(1)
        layer = make(router).train(training)
        torch.manual_seed(2)
        x = torch.randn(B, N, D, dtype=torch.float64)
        seen += layer(x, layer.router.sample_noise(x))[:2]
    return seen


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, (_, changes) in CHANGES.items() for name in changes])
def test_every_setting_changes_something(cls: type[Router], name: str) -> None:
    base, changes = CHANGES[cls]
    assert set(changes) == set(inspect.signature(cls).parameters)
    if name == "capacity_rounding":  # 10 tokens: a number of slots that ceil and round see differently
        base = {"capacity_factor": 0.42, "capacity_multiple_of": 1}
    before, after = observe(cls(**base)), observe(cls(**{**base, name: changes[name]}))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ExpertChoiceRouter(capacity_factor=0.0), "router.capacity_factor=0.0"),
        (lambda: ExpertChoiceRouter(capacity_multiple_of=0), "router.capacity_multiple_of=0"),
        (lambda: ExpertChoiceRouter(capacity_rounding="floor"), "router.capacity_rounding=floor"),
        (lambda: ExpertChoiceRouter(noise_std=-1), "router.noise_std=-1"),
        (lambda: SoftRouter(slots_per_expert=0), "router.slots_per_expert=0"),
        (lambda: SoftRouter(noise_std=-1), "router.noise_std=-1"),
        (lambda: SoftRouter(group_size="batch"), "router.group_size='batch'"),
        (lambda: GShardRouter(capacity_factor=-1), "router.capacity_factor=-1"),
        (lambda: M6TRouter(num_prototypes=0), "router.num_prototypes=0"),
        (lambda: make(M6TRouter(3)), "router.num_prototypes=3 does not divide num_experts=4"),
        (lambda: make(GShardRouter(), experts=1), "num_experts=1: GShardRouter sends a token to two"),
        (lambda: TopKRouter(1.5), "router.top_k=1.5"),
        (lambda: TopKRouter(group_size=2.5), "router.group_size=2.5"),
        (lambda: TopKRouter(capacity_factor=None), "router.capacity_factor=None"),
        (lambda: TopKRouter(noise_std=float("nan")), "router.noise_std=nan"),
        (
            lambda: make(TopKRouter(eval_capacity_factor=0.001, capacity_rounding="round")).eval()(torch.ones(1, 9, D)),
            "router.eval_capacity_factor=0.001 leaves no slot",
        ),
        (lambda: make(TopKRouter(capacity=-1)), "router.capacity=-1"),
        (lambda: make(SoftRouter(group_size=7))(torch.randn(B, N, D).double()), "router.group_size=7 does not divide"),
    ],
)
def test_impossible_settings_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_capacity_that_drops_nothing_in_a_group_drops_nothing_in_an_image() -> None:
    """Groups of 8 tokens with 8 slots an expert; an image of 17 tokens is then routed by itself, without limit."""
    router = TopKRouter(eval_capacity_factor=1.3, group_size=8).for_layer(16, 4).eval()
    x = torch.randn(3, 17, 16)
    x[:, :, 0] += 5.0  # most tokens want the same experts
    assert router.takes_tokens_alone(17, 4)
    plan, _ = router(x, None)
    assert float(plan.dropped()) == 0.0 and plan.gates.shape[:2] == (3, 17)


def test_explicit_slots_of_expert_choice() -> None:
    """As the reference's `capacity`: used as it is, at most S; and counted as active."""
    by_factor, by_slots = ExpertChoiceRouter(0.8, capacity_multiple_of=1), ExpertChoiceRouter(capacity=2)
    assert by_factor.slots(N, E) == by_slots.slots(N, E) == 2 and ExpertChoiceRouter(capacity=99).slots(N, E) == N
    assert by_slots.experts_per_token(E, N) == pytest.approx(0.8)
    assert ExpertChoiceRouter(capacity=3, group_size=15).experts_per_token(E, N) == pytest.approx(0.8)


# ---- images that are not finite, and none at all

# what of a batch mate may reach an image: by default nothing
COUPLED = {"ExpertChoice groups", "GShard dropless", "M6T 4"}  # groups of several images compete for slots
MIXED = {"Soft slots"}  # slots of such groups are sums over all their images


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_a_non_finite_image_does_not_reach_its_batch_mates(name: str, training: bool, bad: float) -> None:
    """Neither forwards nor, in gradients of the pixels, backwards; wherever it lies, whole or one token of it."""
    settings = [ROUTERS[name]]
    if hasattr(settings[0], "eval_capacity_factor"):
        spec = to_spec(settings[0])
        dropping = {"capacity_factor": 0.4, "eval_capacity_factor": 0.4, "capacity_multiple_of": 1}
        settings += [from_spec({**spec, "init_args": spec["init_args"] | dropping}, Router, "router")]
    for router in settings:
        layer = make(router).train(training)
        x = torch.randn(B, N, D, dtype=torch.float64)
        noise = layer.router.sample_noise(x)
        clean = layer(x, noise)[0]
        for image in range(B):
            for tokens in (slice(None), slice(4, 5)):
                mates = [mate for mate in range(B) if mate != image]
                given = x.clone()
                given[image, tokens] = bad
                given.requires_grad_()
                outputs = layer(given, noise)[0]
                (gradient,) = torch.autograd.grad(outputs.sum(), given)
                if name in MIXED:
                    continue
                assert outputs[mates].isfinite().all() and gradient[mates].isfinite().all()
                if name not in COUPLED:  # not bitwise: rows move, and BLAS sums by where a row lies
                    torch.testing.assert_close(outputs[mates], clean[mates], atol=1e-13, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ROUTERS)
def test_no_images_have_no_outputs_and_no_loss(name: str, training: bool) -> None:
    for dtype in (torch.float32, torch.float64):
        layer = make(ROUTERS[name], dtype).train(training)
        x = torch.randn(0, N, D, dtype=dtype, requires_grad=True)
        noise = layer.router.sample_noise(x)
        outputs, auxiliary, _ = layer(x, noise)
        assert outputs.shape == x.shape and float(auxiliary) == 0.0
        (outputs.sum() + auxiliary).backward()
        assert all(p.grad is None or float(p.grad.abs().sum()) == 0.0 for p in layer.parameters())
        plan, _ = layer.router(x, noise)
        assert float(plan.dropped()) == 0.0 and not plan.load().any()
