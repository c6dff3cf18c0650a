"""Routers and the sparse layer against Google's V-MoE (tests/oracles)."""

import pytest
import torch
from oracle_files import Oracle, assert_gradient
from torch import Tensor, nn

from vmoe_momentum.moe import (
    ExpertChoiceRouter,
    Router,
    SoftRouter,
    SparseMlp,
    TopKPlan,
    TopKRouter,
    buffer_index,
    capacity,
)
from vmoe_momentum.moe.losses import gshard_loss, importance_loss, load_loss

ROUTING, LOAD, LAYER = (Oracle(f"{name}.npz") for name in ("routing_top_experts", "load_loss", "moe_layer"))
CHOICE, SOFT = Oracle("experts_choice.npz"), Oracle("soft_moe.npz")
CASES = [name.removesuffix("/kept") for name in ROUTING.arrays if name.endswith("/kept")]
ATOL = 3e-6


def combine_array(plan: TopKPlan, places: Tensor, slots: int) -> Tensor:
    """[G, S, E, C] with the combine weight at (token, expert, slot): the form the reference stores."""
    num_groups, group_size, num_experts = plan.gates.shape
    array = torch.zeros(num_groups, group_size, num_experts, slots)
    group, token, choice = plan.kept.nonzero(as_tuple=True)
    index = (group, token, plan.expert[group, token, choice], places[group, token, choice])
    array[index] = plan.weight[group, token, choice]
    return array


def check_dispatch(oracle: Oracle, case: str, gates: Tensor, batch_priority: bool) -> None:
    """Chosen experts, slots, kept flags, capacity exactly; combine weights to ATOL."""
    expected_expert = oracle[f"{case}/expert_index"].long()
    slots, top_k = int(oracle[f"{case}/capacity"]), expected_expert.shape[-1]
    weight, expert = gates.sort(dim=-1, descending=True, stable=True)
    plan = TopKPlan.build(gates, expert[..., :top_k], weight[..., :top_k], slots, batch_priority)
    places = buffer_index(plan.expert, gates.shape[-1], gates.amax(-1) if batch_priority else None)
    assert torch.equal(plan.expert, expected_expert)
    assert torch.equal(places, oracle[f"{case}/buffer_index"].long())
    assert torch.equal(plan.kept, oracle[f"{case}/kept"])
    expected = oracle[f"{case}/combine_weights"]
    torch.testing.assert_close(combine_array(plan, places, slots), expected, atol=ATOL, rtol=0)


def settings_of(dispatcher: dict) -> dict:
    """The reference's dispatcher arguments as ours; its default multiple is 4, None means 1."""
    return {
        "eval_capacity_factor": dispatcher["capacity_factor"],
        "capacity_multiple_of": dispatcher.get("capacity_multiple_of", 4) or 1,
        "batch_priority": dispatcher["batch_priority"],
    }


def test_all_36_cases_are_here() -> None:
    assert len(CASES) == 36


@pytest.mark.parametrize("case", CASES)
def test_routing(case: str) -> None:
    facts = ROUTING.meta["cases"][case]
    data = case.partition("/case")[0]
    if data.startswith("ties"):
        check_dispatch(ROUTING, case, ROUTING[f"{data}/gates"], facts["dispatcher"]["batch_priority"])
        return
    inputs, kernel = ROUTING[f"{data}/inputs"], ROUTING[f"{data}/gate_kernel"]
    router = TopKRouter(ROUTING[f"{case}/kept"].shape[-1], **settings_of(facts["dispatcher"]))
    router = router.for_layer(inputs.shape[-1], kernel.shape[-1]).eval()
    router.weight.data = kernel.T.contiguous()
    plan, _ = router(inputs, None)
    assert router.slots(*plan.gates.shape[1:]) == int(ROUTING[f"{case}/capacity"])
    torch.testing.assert_close(plan.gates, ROUTING[f"{data}/gates_softmax"], atol=ATOL, rtol=0)
    check_dispatch(ROUTING, case, plan.gates, router.batch_priority)


@pytest.mark.parametrize(("data", "weights"), [("s16e4k1", (0.0, 1.0, 1.0)), ("s48e8k2", (0.01, 0.02, 0.03))])
def test_deterministic_losses_and_their_gradients(data: str, weights: tuple[float, float, float]) -> None:
    gshard, importance, load = weights
    top_k = ROUTING[f"{data}/case00/kept"].shape[-1]
    router = TopKRouter(top_k, gshard_loss_weight=gshard, importance_loss_weight=importance, load_loss_weight=load)
    inputs, kernel = ROUTING[f"{data}/inputs"].requires_grad_(), ROUTING[f"{data}/gate_kernel"]
    router = router.for_layer(inputs.shape[-1], kernel.shape[-1]).eval()
    router.weight.data = kernel.T.contiguous()
    plan, losses = router(inputs, None)
    assert set(losses.parts) == (
        {"importance", "gshard"} if gshard else {"importance"}
    )  # what is not wanted is not made
    values = {"auxiliary": losses.auxiliary, **losses.parts, "gshard": gshard_loss(plan.gates, plan.expert)}
    for name, value in values.items():
        torch.testing.assert_close(value, ROUTING[f"{data}/{name}_loss"], atol=ATOL, rtol=0)
    losses.auxiliary.mean().backward()
    assert_gradient(inputs.grad, ROUTING[f"{data}/grad_mean_auxiliary_loss_inputs"])
    assert_gradient(router.weight.grad.T, ROUTING[f"{data}/grad_mean_auxiliary_loss_gate_kernel"])


@pytest.mark.parametrize("case", LOAD.meta["cases"])
def test_noisy_losses_and_their_gradients(case: str) -> None:
    facts = LOAD.meta["cases"][case]
    dispatcher = facts["dispatcher"]
    router = TopKRouter(
        facts["K"],
        noise_std=facts["noise_std"],
        capacity_factor=dispatcher["capacity_factor"],
        capacity_multiple_of=dispatcher["capacity_multiple_of"] or 1,
        batch_priority=dispatcher["batch_priority"],
        **facts["loss_weights"],
    )
    logits, noise = LOAD[f"{case}/gate_logits"].requires_grad_(), LOAD[f"{case}/noise"]
    plan, losses = router.route(logits, noise, router.slots(*logits.shape[1:]))
    for name, value in {"auxiliary": losses.auxiliary, **losses.parts}.items():
        torch.testing.assert_close(value, LOAD[f"{case}/{name}_loss"], atol=ATOL, rtol=0)
    for name, value in losses.parts.items():
        (gradient,) = torch.autograd.grad(value.mean(), logits, retain_graph=True)
        assert_gradient(gradient, LOAD[f"{case}/grad_mean_{name}_loss_logits"])
    assert router.slots(facts["S"], facts["E"]) == facts["capacity"] == int(LOAD[f"{case}/dispatch/capacity"])
    assert int((~plan.kept).sum()) == facts["num_dropped"]
    check_dispatch(LOAD, f"{case}/dispatch", plan.gates.detach(), router.batch_priority)


@pytest.mark.parametrize("case", LOAD.meta["cases"])
def test_load_loss_gradient_has_two_paths(case: str) -> None:
    clean = LOAD[f"{case}/gate_logits"].requires_grad_()
    noisy = LOAD[f"{case}/gate_logits_noisy"].requires_grad_()
    top_index = LOAD[f"{case}/dispatch/expert_index"].long()
    loss = load_loss(clean, noisy, top_index, float(LOAD[f"{case}/effective_noise_std"]))
    for which, gradient in zip(("clean", "noisy"), torch.autograd.grad(loss.mean(), (clean, noisy)), strict=True):
        assert_gradient(gradient, LOAD[f"{case}/partial_mean_load_loss_wrt_{which}_logits"])


def test_capacity_table() -> None:
    rows = ROUTING.meta["capacity_table"]
    assert len(rows) == 20
    for row in rows:
        ours = capacity(
            row["num_tokens"], row["num_experts"], row["capacity_factor"], row["ceil_or_round"], row["multiple_of"] or 1
        )
        assert ours == row["capacity"], row


def load_layer(oracle: Oracle, case: str, router: Router) -> tuple[SparseMlp, dict]:
    """The layer with the oracle's weights; flax name -> (parameter, its flax view)."""
    facts = oracle.meta["cases"][case]
    layer = SparseMlp(facts["D"], facts["mlp_dim"], facts["E"], router, lambda: nn.GELU(approximate="tanh")).eval()
    views = {
        "Mlp/Dense_0/kernel": (layer.experts.fc1.weight, lambda x: x.mT),
        "Mlp/Dense_0/bias": (layer.experts.fc1.bias, lambda x: x),
        "Mlp/Dense_1/kernel": (layer.experts.fc2.weight, lambda x: x.mT),
        "Mlp/Dense_1/bias": (layer.experts.fc2.bias, lambda x: x),
    }
    if isinstance(router, SoftRouter):
        views["Router/mu"] = (layer.router.mu, lambda x: x.permute(2, 0, 1))
        views["Router/scale"] = (layer.router.scale, lambda x: x)
    else:
        views["Router/dense/kernel"] = (layer.router.weight, lambda x: x.mT)
    with torch.no_grad():
        for name, (parameter, view) in views.items():
            view(parameter).copy_(oracle[f"{case}/params/{name}"])
    return layer, views


def check_layer(oracle: Oracle, case: str, layer: SparseMlp, views: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs, and the gradients of their summed squares -> inputs, outputs, auxiliary loss."""
    inputs = oracle[f"{case}/inputs"].requires_grad_()
    outputs, auxiliary, _ = layer(inputs)
    torch.testing.assert_close(outputs, oracle[f"{case}/outputs"], atol=1e-5, rtol=0)
    outputs.square().sum().backward(retain_graph=True)
    for name, (parameter, view) in views.items():
        assert_gradient(view(parameter.grad), oracle[f"{case}/grad_sum_sq/params/{name}"])
    assert_gradient(inputs.grad, oracle[f"{case}/grad_sum_sq/inputs"])
    return inputs, outputs, auxiliary


@pytest.mark.parametrize("case", LAYER.meta["cases"])
def test_layer_outputs_and_gradients(case: str) -> None:
    facts = LAYER.meta["cases"][case]
    arguments = dict(facts["router"])
    settings = settings_of(arguments.pop("dispatcher"))
    top_k = arguments.pop("num_selected_experts")
    router = TopKRouter(top_k, group_size=facts["group_size"], **settings, **arguments)
    layer, views = load_layer(LAYER, case, router)
    inputs, _, auxiliary = check_layer(LAYER, case, layer, views)
    torch.testing.assert_close(auxiliary, LAYER[f"{case}/auxiliary_loss"].mean(), atol=ATOL, rtol=0)
    plan, _ = layer.router(inputs, None)
    torch.testing.assert_close(plan.gates, LAYER[f"{case}/gates_softmax"], atol=ATOL, rtol=0)
    assert int((~plan.kept).sum()) == facts["num_dropped"] > 0
    gradients = torch.autograd.grad(auxiliary, (inputs, layer.router.weight))
    assert_gradient(gradients[0], LAYER[f"{case}/grad_mean_aux/inputs"])
    assert_gradient(gradients[1].T, LAYER[f"{case}/grad_mean_aux/params/Router/dense/kernel"])


@pytest.mark.parametrize("case", LAYER.meta["cases"])
def test_bfloat16_dispatch(case: str) -> None:
    """Rounding to bfloat16 can turn a difference of 1e-7 into one of its steps, so: close, and closer than without."""
    facts = LAYER.meta["cases"][case]
    settings = settings_of(facts["router"]["dispatcher"])
    router = TopKRouter(2, group_size=facts["group_size"], bfloat16_dispatch=True, **settings)
    layer, _ = load_layer(LAYER, case, router)
    outputs, expected = layer(LAYER[f"{case}/inputs"])[0], LAYER[f"{case}/outputs_bfloat16_dispatcher"]
    exact = LAYER[f"{case}/outputs"]
    assert (outputs - expected).abs().mean() < 0.01 * (exact - expected).abs().mean()
    assert ((outputs - expected).abs() <= 1e-5).float().mean() > 0.99


@pytest.mark.parametrize("case", CHOICE.meta["cases"])
def test_expert_choice(case: str) -> None:
    facts = CHOICE.meta["cases"][case]
    dispatcher = facts["router"]["dispatcher"]
    router = ExpertChoiceRouter(
        dispatcher["capacity_factor"],
        capacity_multiple_of=dispatcher.get("capacity_multiple_of", 4),
        capacity_rounding=dispatcher.get("capacity_ceil_or_round", "ceil"),
        group_size=facts["group_size"],
    )
    layer, views = load_layer(CHOICE, case, router)
    inputs, _, auxiliary = check_layer(CHOICE, case, layer, views)
    assert auxiliary == CHOICE[f"{case}/metrics/auxiliary_loss"] == 0
    plan, _ = layer.router(inputs, None)
    torch.testing.assert_close(plan.gates, CHOICE[f"{case}/gates_softmax"], atol=ATOL, rtol=0)
    assert torch.equal(plan.token, CHOICE[f"{case}/item_index"].long())
    expected = CHOICE[f"{case}/combine_weights"]  # [G, S, E, C]
    ours = torch.zeros_like(expected).scatter(1, plan.token.unsqueeze(1), plan.weight.unsqueeze(1))
    torch.testing.assert_close(ours, expected, atol=ATOL, rtol=0)
    assert torch.equal(plan.assigned(), (expected > 0).any(-1))
    processed = CHOICE[f"{case}/metrics/ratio_processed_items_by_at_least_1_experts"].mean()
    torch.testing.assert_close(1 - plan.dropped(), processed)


@pytest.mark.parametrize("case", SOFT.meta["cases"])
def test_soft_moe(case: str) -> None:
    facts = SOFT.meta["cases"][case]
    router = SoftRouter(facts["num_slots_per_expert"], group_size=facts["group_size"])
    layer, views = load_layer(SOFT, case, router)
    inputs, _, auxiliary = check_layer(SOFT, case, layer, views)
    assert auxiliary == SOFT[f"{case}/metrics/auxiliary_loss"] == 0
    plan, _ = layer.router(inputs, None)
    for name in ("dispatch_weights", "combine_weights"):
        torch.testing.assert_close(getattr(plan, name), SOFT[f"{case}/{name}"], atol=ATOL, rtol=0)
    rows, ends = plan.dispatch(inputs.flatten(0, 1))
    expected = SOFT[f"{case}/slots"]  # [E, G*P, D]
    torch.testing.assert_close(rows.reshape(expected.shape), expected, atol=1e-5, rtol=0)
    assert ends is None and len(rows) == expected.shape[0] * expected.shape[1]
    layer.router.bfloat16_dispatch = True  # the reference as it is
    outputs, reference = layer(inputs)[0], SOFT[f"{case}/outputs_reference_bfloat16_dispatcher"]
    exact = SOFT[f"{case}/outputs"]
    assert (outputs - reference).abs().mean() < 0.02 * (exact - reference).abs().mean()


def test_losses_by_hand() -> None:
    """Two tokens, two experts, worked out on paper."""
    gates = torch.tensor([[[0.75, 0.25], [0.25, 0.75]]])
    torch.testing.assert_close(importance_loss(gates), torch.zeros(1))
    index = gates.argsort(-1, descending=True)
    torch.testing.assert_close(gshard_loss(gates, index), torch.ones(1))  # 2 * (.5 * .5 + .5 * .5)
    gates = torch.tensor([[[0.75, 0.25], [0.75, 0.25]]])  # sums 1.5 and 0.5: var 0.25, mean 1
    torch.testing.assert_close(importance_loss(gates), torch.tensor([0.25]))
    torch.testing.assert_close(gshard_loss(gates, torch.tensor([[[0], [0]]])), torch.tensor([1.5]))  # 2 * 1 * .75
