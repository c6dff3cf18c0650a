"""The sparse layer against a naive loop over tokens, and what each setting changes."""

import inspect
import math
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from vmoe_momentum.moe import GShardRouter, M6TRouter, Router, SparseMlp, TopKRouter
from vmoe_momentum.moe.paths import Fill

B, N, D, F, E = 3, 10, 8, 12, 4


def make(router: Router, dtype: torch.dtype = torch.float64, **arguments) -> SparseMlp:
    layer = SparseMlp(D, F, E, router, nn.GELU, **arguments).to(dtype)
    nn.init.normal_(layer.experts.fc1.bias)
    nn.init.normal_(layer.experts.fc2.bias)
    nn.init.normal_(layer.router.weight)
    return layer


def naive(layer: SparseMlp, x: Tensor, group_size: int, slots: int, noise: Tensor | None) -> Tensor:
    """V-MoE's definition, one token at a time."""
    router, experts = layer.router, layer.experts
    tokens = x.reshape(-1, D)
    logits = tokens @ router.weight.T
    gates = (logits if noise is None else logits + noise.reshape(-1, E)).softmax(-1)
    known = gates.detach()
    outputs = [torch.zeros(D, dtype=x.dtype) for _ in tokens]
    for start in range(0, len(tokens), group_size):
        group = range(start, start + group_size)
        chosen = {t: sorted(range(E), key=lambda e, t=t: (-float(known[t, e]), e))[: router.top_k] for t in group}
        order = sorted(group, key=lambda t: -float(known[t].max())) if router.batch_priority else group
        used = [0] * E
        for rank in range(router.top_k):
            for t in order:
                e = chosen[t][rank]
                used[e] += 1
                if used[e] <= slots:
                    weight = gates[t, e] / (gates[t, chosen[t]].sum() if router.renormalize else 1.0)
                    hidden = nn.functional.gelu(experts.fc1.weight[e] @ tokens[t] + experts.fc1.bias[e])
                    outputs[t] = outputs[t] + weight * (experts.fc2.weight[e] @ hidden + experts.fc2.bias[e])
    return torch.stack(outputs).reshape(x.shape)


@pytest.mark.parametrize("batch_priority", [False, True])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("factor", [0.4, 1.0, "dropless"])
@pytest.mark.parametrize(("top_k", "group_size"), [(1, "image"), (2, 15), (3, 5), (4, "image")])
def test_naive_loop(top_k: int, group_size, factor, renormalize: bool, batch_priority: bool) -> None:
    """Values and gradients in float64, training mode, with noise."""
    router = TopKRouter(
        top_k,
        group_size=group_size,
        capacity_factor=factor,
        capacity_multiple_of=1,
        renormalize=renormalize,
        batch_priority=batch_priority,
    )
    layer = make(router).train()
    x = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    noise = layer.router.sample_noise(x)
    size = N if group_size == "image" else group_size
    slots = B * N if factor == "dropless" else math.ceil(size * top_k * factor / E)
    ours, expected = layer(x, noise)[0], naive(layer, x, size, slots, noise)
    torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn_like(ours)
    inputs = [x, *layer.parameters()]
    gradients = [torch.autograd.grad(y, inputs, cotangent, retain_graph=True) for y in (ours, expected)]
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-11, rtol=1e-11)


def test_float32_grouped_product_equals_the_float64_loop() -> None:
    layer = make(TopKRouter(2, capacity_factor=0.5), torch.float32).train()
    x = torch.randn(B, N, D)
    noise = layer.router.sample_noise(x)
    single = layer(x, noise)[0]
    double = layer.double()(x.double(), noise.double())[0]
    torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=1e-5)


def test_a_token_dropped_everywhere_gets_zero_and_finite_gradients() -> None:
    layer = make(TopKRouter(1, capacity_factor=0.1, capacity_multiple_of=1), torch.float32).train()
    x = torch.randn(B, N, D, requires_grad=True)
    outputs, _, _ = layer(x, None)
    plan, _ = layer.router(x, None)
    lost = ~plan.kept.any(-1)
    assert lost.sum() >= B * (N - E)
    assert outputs[lost].abs().max() == 0.0
    outputs.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, *layer.parameters()])


def test_a_low_capacity_computes_fewer_rows() -> None:
    layer = make(TopKRouter(2, capacity_factor=0.5, capacity_multiple_of=1), torch.float32).train()
    x = torch.randn(B, N, D)
    plan, _ = layer.router(x, None)
    assert plan.dispatch(x.flatten(0, 1))[0].shape[0] == B * E * math.ceil(N * 2 * 0.5 / E) < B * N * 2


def test_evaluation_is_deterministic_and_ignores_batch_mates() -> None:
    layer = make(TopKRouter(2, group_size=15, capacity_factor=0.5)).eval()
    x = torch.randn(B, N, D, dtype=torch.float64)
    together = layer(x)[0]
    assert layer.router.sample_noise(x) is None
    for image in range(B):
        torch.testing.assert_close(layer(x[image : image + 1])[0], together[image : image + 1], atol=1e-14, rtol=0)


def test_capacity_for_every_token_is_dropless() -> None:
    """V-MoE-S/32's evaluation, factor E/K: no group can overflow, so none is formed and any batch size will do."""
    published = make(TopKRouter(2, group_size=20, eval_capacity_factor=E / 2, capacity_multiple_of=1)).eval()
    dropless = make(TopKRouter(2)).eval()
    dropless.load_state_dict(published.state_dict())
    x = torch.randn(B, N, D, dtype=torch.float64)
    assert torch.equal(published(x)[0], dropless(x)[0])
    published.router.eval_capacity_factor = E / 2 - 0.1
    with pytest.raises(ValueError, match="router.group_size=20 does not divide"):
        published(x)


def test_bfloat16_autocast_runs_experts_in_bfloat16_and_routing_in_float32() -> None:
    layer = make(TopKRouter(2), torch.float32).eval()
    x = torch.randn(B, N, D)
    exact = layer(x)[0]
    with torch.autocast("cpu", torch.bfloat16):
        plan, _ = layer.router(x, None)
        rounded = layer(x)[0]
    assert plan.gates.dtype == torch.float32 == rounded.dtype
    assert torch.equal(plan.expert, layer.router(x, None)[0].expert)
    assert 0 < (exact - rounded).abs().max() < 0.05 * exact.abs().max()


CHANGES = {
    "top_k": 1, "noise_std": 3.0, "renormalize": True, "capacity_factor": 0.3, "eval_capacity_factor": 0.3,
    "capacity_multiple_of": 1, "capacity_rounding": "round", "batch_priority": True, "group_size": N * B,
    "importance_loss_weight": 0.5, "load_loss_weight": 0.5, "gshard_loss_weight": 0.5,
    "capacity": 2, "bfloat16_dispatch": True, "gate_bias": True,
}  # fmt: skip


def observe(changed: dict) -> list[Tensor]:
    """Outputs and losses in both modes, from the same weights, tokens and noise draw."""
    # 13 tokens, K 2, factor 0.7: 4.55 slots, which ceil and round see differently once multiples are off
    base = {"capacity_factor": 0.7, "capacity_multiple_of": 3}
    if "capacity_rounding" in changed:
        base |= {"capacity_factor": 0.65, "capacity_multiple_of": 1}
    seen = []
    for training in (True, False):
        torch.manual_seed(1)
        layer = make(TopKRouter(**{**base, **changed})).train(training)
        if layer.router.gate_bias:  # zero where it begins
            layer.router.bias.data.copy_(torch.arange(layer.router.bias.shape[0]))
        x = torch.randn(B, 13 if "group_size" not in changed else N, D, dtype=torch.float64)
        seen += layer(x, layer.router.sample_noise(x))[:2]
    return seen


def test_every_router_setting_has_a_change_to_try() -> None:
    assert set(CHANGES) == set(inspect.signature(TopKRouter).parameters)


@pytest.mark.parametrize("name", CHANGES)
def test_every_router_setting_changes_something(name: str) -> None:
    neutral = {"capacity_rounding": "ceil", "group_size": "image"}
    base = observe({name: neutral[name]} if name in neutral else {})
    changed = observe({name: CHANGES[name]})
    assert any(not torch.equal(a, b) for a, b in zip(base, changed, strict=True))


def test_expert_dropout_changes_training_only() -> None:
    torch.manual_seed(1)
    plain = make(TopKRouter(2, noise_std=0.0))
    torch.manual_seed(1)
    dropping = make(TopKRouter(2, noise_std=0.0), drop=0.5)
    x = torch.randn(B, N, D, dtype=torch.float64)
    assert not torch.equal(plain.train()(x)[0], dropping.train()(x)[0])
    assert torch.equal(plain.eval()(x)[0], dropping.eval()(x)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 0}, "router.top_k=0"),
        ({"top_k": 5}, "router.top_k=5 is more than num_experts=4"),
        ({"capacity_factor": 0.0}, "router.capacity_factor=0.0"),
        ({"capacity_factor": "none"}, "router.capacity_factor='none'"),
        ({"eval_capacity_factor": float("inf")}, "router.eval_capacity_factor=inf"),
        ({"group_size": 0}, "router.group_size=0"),
        ({"group_size": "batch"}, "router.group_size='batch'"),
        ({"capacity_rounding": "floor"}, "router.capacity_rounding=floor"),
        ({"capacity_multiple_of": 0}, "router.capacity_multiple_of=0"),
        ({"noise_std": -1.0}, "router.noise_std=-1.0"),
    ],
)
def test_impossible_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(TopKRouter(**settings))


def test_a_group_that_does_not_divide_the_batch_is_named() -> None:
    layer = make(TopKRouter(2, group_size=7)).train()
    with pytest.raises(ValueError, match="router.group_size=7 does not divide the batch's 30 tokens"):
        layer(torch.randn(B, N, D, dtype=torch.float64))


FILLS = [fill for fill in get_args(Fill) if fill != "packed"]


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("priority", [False, True])
@pytest.mark.parametrize("factor", [0.25, 0.5, 1.05, 1.6, "dropless"])
def test_every_fill_is_one_function(factor: float | str, priority: bool, fill: Fill, monkeypatch) -> None:
    """Outputs, gradients and what the plan tells."""
    monkeypatch.setattr("vmoe_momentum.moe.dispatch.wasteful", lambda *_: False)
    router = TopKRouter(2, capacity_factor=factor, capacity_multiple_of=1, batch_priority=priority, noise_std=0.0)
    check_fill(make(router).train(), fill, packed=factor == "dropless" and fill == "slots")


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("router", [GShardRouter(capacity_factor=0.5), GShardRouter("dropless"), M6TRouter(2, 0.5)])
def test_every_fill_with_other_routers(router: Router, fill: Fill, monkeypatch) -> None:
    monkeypatch.setattr("vmoe_momentum.moe.dispatch.wasteful", lambda *_: False)
    check_fill(make(router).train(), fill, packed=router.capacity_factor == "dropless" and fill == "slots")


def test_the_fullest_expert_does_not_set_the_pace_alone() -> None:
    """All tokens to one expert: E times the rows would be filled, so they are packed."""
    layer = make(TopKRouter(1, capacity_factor="dropless", noise_std=0.0)).train()
    layer.router.weight.data[0] = layer.router.weight.data[1:].abs().amax() * 1e3
    layer.router.weight.data[1:] = -layer.router.weight.data[0]
    check_fill(layer, "fullest", packed=True, x=torch.rand(B, N, D, dtype=torch.float64))


def check_fill(layer: SparseMlp, fill: Fill, packed: bool, x: Tensor | None = None) -> None:
    x = (torch.randn(B, N, D, dtype=torch.float64) if x is None else x).requires_grad_()
    noise = layer.router.sample_noise(x)
    results = []
    for way in ("packed", fill):
        plan, _ = layer.router.route(layer.router.logits(x), noise, layer.router.slots(N, E), way)
        rows, ends = plan.dispatch(x.flatten(0, 1))
        assert (ends is not None) == (way == "packed" or packed)
        assert len(rows) % E == 0 if ends is None else int(ends[-1]) == len(rows)
        outputs = plan.combine(layer.experts(rows, ends))
        gradients = torch.autograd.grad(outputs.sin().sum(), [x, *layer.parameters()])
        results.append((outputs, plan.assigned(), plan.load(), plan.dropped(), *gradients))
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("path", "fill"), [("bias_by_product", "packed"), ("sum_by_product", "packed"), ("weight_first", "fullest")]
)
@pytest.mark.parametrize("top_k", [1, 2])
def test_every_path_is_one_function(path: str, fill: Fill, top_k: int, monkeypatch) -> None:
    from vmoe_momentum.moe import dispatch, experts, token_choice

    monkeypatch.setattr(token_choice, "fill", lambda *_: fill)
    monkeypatch.setattr(dispatch, "wasteful", lambda *_: False)

    layer = make(TopKRouter(top_k, capacity_factor=0.5, noise_std=0.0)).train()
    x = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    results = []
    for answer in (False, True):
        monkeypatch.setattr(dispatch if path.startswith("sum") else experts, path, lambda *_, answer=answer: answer)
        outputs, auxiliary, _ = layer(x)
        results.append((outputs, *torch.autograd.grad(outputs.sin().sum() + auxiliary, [x, *layer.parameters()])))
    torch.testing.assert_close(results[1], results[0], atol=1e-12, rtol=0)
