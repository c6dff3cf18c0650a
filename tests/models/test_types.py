"""Every rule in every floating type, under autocast, recomputed in either way, and on no images."""

import copy
from collections.abc import Iterator

import pytest
import timm.layers
import torch
from registered import registered
from torch import Tensor, nn

from vmoe_momentum.models import MomentumVisionTransformer
from vmoe_momentum.moe import Router
from vmoe_momentum.momentum import MomentumRule

RULES = sorted(registered(MomentumRule))
ROUTERS = sorted(registered(Router))


def small(rule: str = "HeavyBall", **settings) -> MomentumVisionTransformer:
    """Four blocks, two of them sparse, without router noise."""
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    router = {"class_path": "TopKRouter", "init_args": {"noise_std": 0.0}}
    net = MomentumVisionTransformer(
        **shape,
        **{"rule": rule, "router": router, "moe_layers": "every2", "num_experts": 4, **settings},
        share_expert_init=False,
    )
    nn.init.normal_(net.head.weight)
    return net


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def watched(net: nn.Module) -> list[tuple[torch.dtype, set[torch.dtype]]]:
    """Filled while it runs: types of the stream and of the buffers after each block."""
    seen: list = []
    for block in net.blocks:
        block.register_forward_hook(lambda m, i, o: seen.append((o[0].dtype, {b.dtype for b in o[1].momentum})))
    return seen


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("positions", ["learn", "sincos2d", "none"])
@pytest.mark.parametrize("rule", RULES)
def test_the_stream_under_autocast_is_float32(rule: str, positions: str, pool: str) -> None:
    """Also where neither a class token nor learned positions, both float32, make it so."""
    net = small(rule, pos_embed=positions, global_pool=pool, class_token=pool == "token").eval()
    seen = watched(net)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype), torch.no_grad():
            assert net(images()).isfinite().all()
    buffers = {torch.float32} if net.rule.init(torch.zeros(1, 1, 1)) else set()
    assert seen == [(torch.float32, buffers)] * 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_whole_half_networks_keep_their_buffers_in_float32(rule: str, dtype: torch.dtype) -> None:
    net = small(rule).eval()
    half = copy.deepcopy(net).to(dtype)
    seen = watched(half)
    with torch.no_grad():
        logits, expected = half(images().to(dtype)).float(), net(images())
    buffers = {torch.float32} if net.rule.init(torch.zeros(1, 1, 1)) else set()
    assert seen == [(dtype, buffers)] * 4
    error = float((logits - expected).abs().max() / expected.std())
    # Adam divides by small numbers; a token whose expert is another one moves its logits by a few per cent
    assert error < {"Adam": 0.6}.get(rule, 0.3), error


@pytest.fixture
def reentrant() -> Iterator[None]:
    was = timm.layers.config.use_reentrant_ckpt()
    timm.layers.set_reentrant_ckpt(True)
    yield
    timm.layers.set_reentrant_ckpt(was)


@pytest.mark.parametrize("rule", RULES)
def test_recomputing_sees_the_carry_whatever_timm_is_set_to(rule: str, reentrant: None) -> None:
    net, gradients = small(rule).train(), []
    for recomputed in (False, True):
        net.set_grad_checkpointing(recomputed)
        logits, aux_loss = net.forward_with_aux(images())
        gradients.append(torch.autograd.grad(logits.square().sum() + aux_loss, list(net.parameters())))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "rule_and_router", [*((rule, "TopKRouter") for rule in RULES), *(("Adam", r) for r in ROUTERS)]
)
def test_no_images_are_no_logits_and_no_loss(rule_and_router: tuple[str, str], training: bool) -> None:
    rule, router = rule_and_router
    net = small(rule, router=router).train(training)
    logits, aux_loss = net.forward_with_aux(images(0))
    assert logits.shape == (0, 5) and float(aux_loss) == 0.0
    (logits.sum() + aux_loss).backward()
