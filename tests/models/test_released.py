"""The authors' own vision networks (github.com/rachtsy/vmoe), to the digit: tests/oracles/released_momentum.npz.

m is their momentum, y what their experts say. Their sparse blocks subtract y, ours add that of negated experts: HeavyBall
has p = -m / gamma (gamma is 1 here), Robust p = m.
"""

import numpy as np
import pytest
import torch
from oracle_files import Oracle, assert_gradient
from test_flax_import import nchw, router_of
from torch.nn import functional as F  # noqa: N812

from vmoe_momentum import HeavyBall, Residual, Robust, TopKRouter, from_flax
from vmoe_momentum.models import MomentumBlock, MomentumVisionTransformer
from vmoe_momentum.models.flax_import import read_shape
from vmoe_momentum.models.flax_layout import layout
from vmoe_momentum.models.settings import to_spec
from vmoe_momentum.momentum import MomentumRule

RELEASED = Oracle("released_momentum.npz")
CASES = list(RELEASED.meta["cases"])
SPREAD = {"atol": 5e-5, "rtol": 0}  # block outputs, momentum, inputs and outputs of layers


def facts_of(case: str) -> dict:
    return RELEASED.meta["cases"][case]


def params_of(case: str) -> dict[str, np.ndarray]:
    prefix = f"{facts_of(case)['params_of']}/params/"
    names = [name for name in RELEASED.arrays.files if name.startswith(prefix)]
    return {name.removeprefix(prefix): RELEASED.arrays[name] for name in names}


def rule_of(case: str) -> MomentumRule:
    """gamma of the fork's robust rule is k = L / m, its mu the rate r, and its L is 1."""
    told = facts_of(case)["model"]["encoder"]
    return {
        "none": lambda: Residual(),
        "heavy_ball": lambda: HeavyBall(mu=told["mu"], gamma=told["gamma"]),
        "robust": lambda: Robust(L=1.0, m=1.0 / told["gamma"], r=told["mu"], look_ahead="after_norm"),
    }[facts_of(case)["rule"]]()


def sign_of(case: str) -> str | None:
    return None if facts_of(case)["rule"] == "none" else "subtracted"


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture
def net(case: str) -> MomentumVisionTransformer:
    """In training mode without noise: there groups are the reference's also where nothing is dropped."""
    settings = to_spec(router_of(facts_of(case)["model"]))["init_args"]
    router = TopKRouter(**{**settings, "capacity_factor": settings["eval_capacity_factor"], "noise_std": 0.0})
    return from_flax(params_of(case), router, rule_of(case), expert_output=sign_of(case)).train()


def images_of(case: str) -> torch.Tensor:
    return nchw(RELEASED[f"{facts_of(case)['params_of']}/images"])


def test_logits_losses_and_every_gradient(case: str, net: MomentumVisionTransformer) -> None:
    labels = RELEASED[f"{facts_of(case)['params_of']}/labels"].long()
    logits, aux_loss = net.forward_with_aux(images_of(case))
    torch.testing.assert_close(net.eval()(images_of(case)), RELEASED[f"{case}/logits"], atol=2e-5, rtol=0)
    torch.testing.assert_close(logits, RELEASED[f"{case}/logits"], atol=2e-5, rtol=0)
    torch.testing.assert_close(aux_loss, RELEASED[f"{case}/metrics/auxiliary_loss"].mean(), atol=1e-5, rtol=0)
    targets = F.one_hot(labels, logits.shape[1]).to(logits.dtype)
    main = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1).mean()
    torch.testing.assert_close(main, RELEASED[f"{case}/main_loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(main + aux_loss, RELEASED[f"{case}/train_loss"], atol=1e-5, rtol=0)
    (main + aux_loss).backward()
    params = params_of(case)
    shape = read_shape(params, None)._replace(subtracted=sign_of(case) is not None)
    ours, checked = dict(net.named_parameters()), 0
    for key, source in layout(shape).items():
        expected = source.build(*(RELEASED.arrays[f"{case}/grad_train_loss/{name}"] for name in source.arrays))
        assert_gradient(ours[key].grad, torch.from_numpy(np.ascontiguousarray(expected)))
        checked += len(source.arrays)
    assert checked == len(params) and len(ours) == len(layout(shape))


def test_blocks_momentum_and_routing(case: str, net: MomentumVisionTransformer) -> None:
    sign = {"none": 0.0, "heavy_ball": -1.0, "robust": 1.0}[facts_of(case)["rule"]]
    seen: dict[tuple[str, int], object] = {}
    for index, block in enumerate(net.blocks):
        block.register_forward_hook(lambda m, i, o, k=index: seen.__setitem__(("block", k), o))
        block.mlp.register_forward_hook(lambda m, i, o, k=index: seen.__setitem__(("mlp", k), (i[0], o)))
        if isinstance(block, MomentumBlock):
            block.mlp.router.register_forward_hook(lambda m, i, o, k=index: seen.__setitem__(("router", k), o))
    features, checked = net.forward_features(images_of(case)), 0
    torch.testing.assert_close(features, RELEASED[f"{case}/intermediates/encoder_norm"], **SPREAD)
    for index in range(len(net.blocks)):
        at = f"{case}/intermediates/encoderblock_{index}"
        x, carry = seen["block", index]
        torch.testing.assert_close(x, RELEASED[f"{at}/output"], **SPREAD)
        given, output = seen["mlp", index]
        if f"{at}/momentum" in RELEASED.arrays:
            torch.testing.assert_close(sign * carry.momentum[0], RELEASED[f"{at}/momentum"], **SPREAD)
            checked += 1
        if f"{at}/mlp_input" in RELEASED.arrays:
            torch.testing.assert_close(given, RELEASED[f"{at}/mlp_input"], **SPREAD)
            checked += 1
        if index not in net.moe_layers:
            continue
        expected = RELEASED[f"{at}/moe_output"] * (1 if sign_of(case) is None else -1)
        torch.testing.assert_close(output[0], expected, **SPREAD)
        plan, losses = seen["router", index]
        shape = RELEASED[f"{at}/gates_softmax"].shape
        torch.testing.assert_close(plan.gates.reshape(shape), RELEASED[f"{at}/gates_softmax"], atol=1e-5, rtol=0)
        weights = RELEASED[f"{at}/combine_weights"]
        assert torch.equal(plan.assigned().reshape(shape), (weights > 0).any(-1))
        assert int((~plan.kept).sum()) == facts_of(case)["num_dropped_per_moe_layer"][str(index)]
        for name, value in {"auxiliary": losses.auxiliary, **losses.parts}.items():
            expected = RELEASED[f"{case}/metrics/encoderblock_{index}/{name}_loss"]
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)
    momenta = 0 if sign_of(case) is None else len(net.blocks)
    assert checked == momenta * (2 if facts_of(case)["rule"] == "robust" else 1)


def test_every_case_is_there() -> None:
    assert len(CASES) == 8 and {facts_of(case)["rule"] for case in CASES} == {"none", "heavy_ball", "robust"}
    assert {from_flax(params_of(c), router_of(facts_of(c)["model"]), rule_of(c), expert_output=sign_of(c)).post_norm
            for c in CASES} == {"none", "all"}  # fmt: skip
