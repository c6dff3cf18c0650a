"""The authors' own vision networks (github.com/rachtsy/vmoe), to the digit: tests/oracles/released_momentum.npz.

m is their momentum, y what their experts say. Their sparse blocks subtract y, ours add that of negated experts:
HeavyBall has p = -m / gamma (gamma is 1 here), Robust p = m.
"""

from functools import partial
from pathlib import Path

import naive_vmoe
import numpy as np
import pytest
import test_flax_import
import timm
import torch
from flax_files import random_params, truncated, write_official
from oracle_files import Oracle, assert_gradient
from test_flax_import import nchw, router_of
from torch import nn
from torch.nn import functional as F  # noqa: N812

from vmoe_momentum import (
    ExpertChoiceRouter,
    HeavyBall,
    Nesterov,
    Residual,
    Robust,
    TopKRouter,
    UpcycledViT,
    cli,
    create_model,
    from_flax,
)
from vmoe_momentum.models import MomentumBlock, MomentumVisionTransformer
from vmoe_momentum.models.blocks import norm_like
from vmoe_momentum.models.directory import save
from vmoe_momentum.models.flax_import import describe_import, read_shape
from vmoe_momentum.models.flax_layout import layout
from vmoe_momentum.momentum import MomentumRule
from vmoe_momentum.specs import to_spec

RELEASED = Oracle("released_momentum.npz")
CASES = list(RELEASED.meta["cases"])
SPREAD = {"atol": 5e-5, "rtol": 0}  # block outputs, momentum, inputs and outputs of layers


def facts_of(case: str) -> dict:
    return RELEASED.meta["cases"][case]


def params_of(case: str) -> dict[str, np.ndarray]:
    return test_flax_import.params_of(RELEASED, facts_of(case)["params_of"])


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


# ---- where there are no vectors: norm places x rules x look-ahead x routers x heads, against float64 loops

STEPS = {
    "residual": (Residual(gamma=0.7), naive_vmoe.Step(gamma=0.7)),
    "heavy ball": (HeavyBall(mu=0.9, gamma=0.5), naive_vmoe.Step(0.9, 0.5)),
    **{
        f"{name}, {place}": (build(look_ahead=place), step._replace(after_norm=place == "after_norm"))
        for place in ("before_norm", "after_norm")
        for name, build, step in (
            ("nesterov", partial(Nesterov, mu=0.8, gamma=0.6), naive_vmoe.Step(0.8, 0.6, 0.48)),
            ("robust", partial(Robust, gamma=0.9, mu=0.5, alpha=0.4), naive_vmoe.Step(0.5, 0.9, 0.36)),
        )
    },
}
PLACES = {"none": (), "dense": (0, 2, 4), "sparse": (1, 3), "all": (0, 1, 2, 3, 4)}
ROUTES = {
    "token": ({}, TopKRouter(2), naive_vmoe.top_k(2, None), {}),
    "map head, capacity": (
        {"classifier": "map", "seed": 1},
        TopKRouter(2, eval_capacity_factor=0.6, capacity_multiple_of=1, group_size=9),
        naive_vmoe.top_k(2, 3),
        {"group_size": 9},
    ),
    "gap, expert choice": (
        {"classifier": "gap", "seed": 2, "representation": 7},
        ExpertChoiceRouter(2.0, capacity_multiple_of=1, capacity_rounding="round"),
        naive_vmoe.expert_choice(4),
        {},
    ),
    "soft": ({"slots": 2, "classifier": "gap", "seed": 3}, None, naive_vmoe.soft, {}),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("step", STEPS)
def test_variations_against_float64_loops(step: str, place: str, route: str) -> None:
    (rule, naive), (shape, router, naive_route, options) = STEPS[step], ROUTES[route]
    params = random_params(depth=5, moe=(1, 3), normed=PLACES[place], **shape)
    images = np.random.default_rng(7).uniform(-1, 1, (2, 12, 12, 3))
    sign = "subtracted" if place in ("sparse", "all") else None
    net = from_flax(params, router, rule, expert_output=sign).double().eval()
    assert net.post_norm == place
    for name in list(params):
        if sign and "/Moe/Mlp/Dense_1/" in name:
            params[name] = -params[name]
    expected = naive_vmoe.forward(params, images, naive_route, step=naive, **options)
    torch.testing.assert_close(net(nchw(images)), torch.from_numpy(expected), atol=1e-11, rtol=0)


@pytest.mark.parametrize("schedule", ["constant", "time_varying"])
def test_dense_blocks_look_ahead_by_the_momentum_of_the_block_to_come(schedule: str) -> None:
    """Three sparse blocks, then a dense one: t is 1, 2, 3 there and 4 behind them."""
    rule = Nesterov(mu=0.8, schedule=schedule, look_ahead="after_norm")
    net = timm.create_model(
        "vmoe_custom", img_size=12, patch_size=4, embed_dim=16, depth=7, num_heads=2, moe_layers=[1, 3, 5],
        num_experts=2, num_classes=3, rule=to_spec(rule), share_expert_init=False,
    ).eval()  # fmt: skip
    assert [block.step for block in net.blocks] == [1, 1, 2, 2, 3, 3, 4]
    given = {}
    for index, block in enumerate(net.blocks):
        block.norm2.register_forward_hook(lambda m, i, o, k=index: given.__setitem__(("norm", k), o))
        block.mlp.register_forward_hook(lambda m, i, o, k=index: given.__setitem__(("mlp", k), i[0]))
        block.register_forward_hook(lambda m, i, o, k=index: given.__setitem__(("p", k), i[1].momentum[0]))
    net(torch.randn(2, 3, 12, 12))
    for index, block in enumerate(net.blocks):
        mu = 0.8 if schedule == "constant" else (block.step - 1) / (block.step + 2)
        torch.testing.assert_close(given["mlp", index] - given["norm", index], mu * given["p", index])
    assert given["p", 6].abs().max() > 0.1


@pytest.mark.parametrize("rule", [Nesterov, Robust])
def test_a_place_to_look_ahead_that_is_not_there(rule) -> None:
    with pytest.raises(ValueError, match=f"{rule.__name__}.look_ahead=sideways: use before_norm or after_norm"):
        rule(look_ahead="sideways")


def test_the_released_constants_are_the_end_of_the_range() -> None:
    """mu is 1 - 1 / gamma, and 1 - 1 / 1.25 rounds below 0.2."""
    assert 1 - 1 / 1.25 < 0.2
    found = Robust(L=1.0, m=1 / 1.25, r=0.2)
    assert found.coefficients() == pytest.approx({"gamma": 0.96, "mu": 0.04, "alpha": 0.041666666666666664})
    assert found.distance(1, found.coefficients()) == pytest.approx(0.04)


# ---- the fork's checkpoints


@pytest.mark.parametrize("half", [False, True])
def test_a_checkpoint_of_the_fork_imports_to_the_bit(half: bool, tmp_path: Path, capsys) -> None:
    """Cut into random pieces and shards, through the command line and a directory."""
    params = test_flax_import.params_of(RELEASED, "heavy_ball")
    write_official(tmp_path / "ckpt", params, shards=3, seed=3, bfloat16=half)
    told = ["--router=TopKRouter", "--rule=HeavyBall", "--rule.mu=0.9", "--expert_output=subtracted"]
    cli.run(["import", "flax", f"--source={tmp_path}/ckpt", f"--out={tmp_path}/w", *told])
    told = capsys.readouterr()
    assert "behind the MLP's residual of all blocks" in told.out and "warning" not in told.err
    net = timm.create_model(f"local-dir:{tmp_path}/w", pretrained=True)
    assert net.rule.mu == 0.9 and net.post_norm == "all"
    shape = read_shape(params, None)._replace(subtracted=True)
    ours, params = net.state_dict(), truncated(params) if half else params
    for key, source in layout(shape).items():
        expected = torch.from_numpy(np.ascontiguousarray(source.build(*(params[n] for n in source.arrays))))
        assert torch.equal(ours[key], expected), key


HEAVY = {"rule": HeavyBall(mu=0.9), "expert_output": "subtracted"}


@pytest.mark.parametrize(
    ("normed", "settings", "words"),
    [
        ((0, 1, 2), {}, ["expert_output: sparse blocks have LayerNorm_2", "--expert_output subtracted"]),
        ((0, 1, 2), {"expert_output": "subtracted"}, ["rule: sparse blocks have LayerNorm_2", "--rule HeavyBall"]),
        ((0, 1, 2), {"rule": HeavyBall()}, ["expert_output: sparse blocks have LayerNorm_2"]),
        ((), HEAVY, ["expert_output=subtracted", "no LayerNorm_2", "leave expert_output out"]),
        ((0, 2), HEAVY, ["expert_output=subtracted", "LayerNorm_2 stands in dense blocks"]),
        ((0,), {}, ["LayerNorm_2 stands in blocks [0] of 3, whose sparse ones are [1]"]),
        ((0, 1), HEAVY, ["LayerNorm_2 stands in blocks [0, 1] of 3"]),
    ],
)
def test_what_the_norms_contradict_is_named(normed: tuple, settings: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match="LayerNorm_2") as caught:
        from_flax(random_params(normed=normed), TopKRouter(2), **settings)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("moe", "normed", "place"),
    [
        ((), (), "none"),
        ((0, 1, 2), (), "none"),
        ((0, 1, 2), (0, 1, 2), "all"),
        ((), (0, 1, 2), "all"),
        ((1,), (), "none"),
    ],
)
def test_norms_of_files_with_blocks_of_one_kind(moe: tuple, normed: tuple, place: str) -> None:
    settings = HEAVY if moe and normed else {}
    net = from_flax(random_params(moe=moe, normed=normed), TopKRouter(2) if moe else None, **settings)
    assert net.post_norm == place and describe_import(net)["norm3"].startswith("none" if place == "none" else "behind")


def test_fresh_norms_are_fresh() -> None:
    """Not copies of a backbone's trained ones."""
    net = UpcycledViT("test_vit", post_norm="all")
    for block in net.blocks:
        nn.init.constant_(block.norm2.weight, 3.0)
    again = [norm_like(block.norm2) for block in net.blocks]
    for norm in (*again, *(block.norm3 for block in net.blocks)):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight)) and not norm.bias.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_networks_look_ahead_in_their_own_type(dtype: torch.dtype) -> None:
    rule = Robust(gamma=0.9, mu=0.5, alpha=0.4, look_ahead="after_norm")
    params = random_params(depth=5, moe=(1, 3), normed=(0, 1, 2, 3, 4))
    net = from_flax(params, TopKRouter(2), rule, expert_output="added").eval()
    x, kinds = torch.randn(2, 3, 12, 12), set()
    wide = net(x)
    for block in net.blocks:
        block.mlp.register_forward_pre_hook(lambda m, i: kinds.add(i[0].dtype))
    narrow = net.to(dtype)(x.to(dtype))
    assert kinds == {dtype} and narrow.dtype == dtype
    torch.testing.assert_close(narrow.float(), wide, atol=0.1, rtol=0.1)


def test_half_a_norm_is_named() -> None:
    params = random_params(normed=(0, 1, 2))
    del params["Encoder/encoderblock_1/LayerNorm_2/bias"]
    with pytest.raises(ValueError, match="1 missing: Encoder/encoderblock_1/LayerNorm_2/bias"):
        from_flax(params, TopKRouter(2), **HEAVY)


@pytest.mark.parametrize(("normed", "asked"), [((), "all"), ((0, 1, 2), "none"), ((0, 1, 2), "dense")])
def test_weights_of_other_norms_are_refused(normed: tuple, asked: str, tmp_path: Path) -> None:
    settings = HEAVY if normed else {}
    save(from_flax(random_params(normed=normed), TopKRouter(2), **settings), tmp_path / "w")
    with pytest.raises(ValueError, match=f"post_norm={asked}: the weights in local-dir:.* leave post_norm out"):
        create_model(f"local-dir:{tmp_path}/w", post_norm=asked)


def test_a_sign_that_no_known_code_writes_is_doubted(tmp_path: Path, capsys) -> None:
    write_official(tmp_path / "ckpt", random_params(normed=(0, 1, 2)), shards=1)
    words = ["import", "flax", f"--source={tmp_path}/ckpt", "--router=TopKRouter", "--rule=HeavyBall"]
    cli.run([*words, f"--out={tmp_path}/a", "--expert_output=added"])
    assert "warning: expert_output=added: LayerNorm_2 in sparse blocks" in capsys.readouterr().err
    cli.run([*words, f"--out={tmp_path}/b", "--expert_output=subtracted"])
    assert "warning" not in capsys.readouterr().err


def test_momentum_on_plain_weights_says_what_the_fork_did(tmp_path: Path, capsys) -> None:
    """They are added, without a norm: with momentum off it is the plain network."""
    write_official(tmp_path / "ckpt", random_params(), shards=1)
    words = ["import", "flax", f"--source={tmp_path}/ckpt", "--router=TopKRouter"]
    cli.run([*words, f"--out={tmp_path}/a", "--rule=HeavyBall", "--rule.mu=0"])
    told = capsys.readouterr()
    assert "warning: rule=HeavyBall: these weights were trained without momentum" in told.err
    assert "subtracts it and puts a fresh norm behind every block" in told.err
    cli.run([*words, f"--out={tmp_path}/b"])
    assert "warning" not in capsys.readouterr().err
    x = torch.randn(2, 3, 12, 12)
    a, b = (timm.create_model(f"local-dir:{tmp_path}/{name}", pretrained=True).eval() for name in "ab")
    assert torch.equal(a(x), b(x)) and a.post_norm == "none"
