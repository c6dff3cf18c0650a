"""Experts spread over gloo ranks compute what one process does: outputs, and gradients of everything."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from vmoe_momentum.moe import (
    ExpertChoiceRouter,
    GShardRouter,
    M6TRouter,
    Router,
    SoftRouter,
    SparseMlp,
    TopKRouter,
    exchange,
    token_choice,
)
from vmoe_momentum.moe.exchange import check_divides, spread
from vmoe_momentum.moe.token_choice import TokenChoice

N, D, F, E = 10, 8, 12, 4
ROUTERS = {
    TopKRouter: [
        {"top_k": 1, "capacity_factor": "dropless"},
        {"top_k": 2, "capacity_factor": 0.5, "capacity_multiple_of": 1},
        {"top_k": 2, "capacity_factor": 0.5, "capacity_multiple_of": 1, "batch_priority": True, "group_size": 5},
        {"top_k": 4, "bfloat16_dispatch": True},
    ],
    GShardRouter: [{"capacity_factor": "dropless"}, {"capacity_factor": 0.4, "capacity_multiple_of": 1}],
    M6TRouter: [{"capacity_factor": "dropless"}, {"capacity_factor": 0.4, "capacity_multiple_of": 1}],
    ExpertChoiceRouter: [{}, {"group_size": 5}],
    SoftRouter: [{}, {"slots_per_expert": 3}],
}
# how the rows of token choice lie; slots is what ranks agree on without a word
FILLS = ("fullest", "packed", "slots")


def layer_of(router: Router, dtype: torch.dtype) -> SparseMlp:
    layer = SparseMlp(D, F, E, router, nn.GELU).to(dtype)
    nn.init.normal_(layer.experts.fc1.bias)
    nn.init.normal_(layer.experts.fc2.bias)
    return layer


def compare(router: Router, shares: list[int], dtype: torch.dtype, even: bool, skew: bool, training: bool) -> None:
    """One layer on all images, and spread, each rank with its share of them.

    skew: the first rank's images all go to the first expert, so that others have none of its rows.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(1)
    whole = layer_of(router, dtype).train(training)
    x = torch.randn(sum(shares), N, D, dtype=dtype)
    if skew:
        x[: shares[0]] = 1.0
        with torch.no_grad():
            whole.router.weight[0] = 1.0
    x.requires_grad_()
    noise = whole.router.sample_noise(x)
    cotangent = torch.randn_like(x)
    own = slice(sum(shares[:rank]), sum(shares[: rank + 1]))
    part = copy.deepcopy(whole)
    part.router.even = even
    spread(part.experts, init_device_mesh("cpu", (ranks,)))
    ours = x.detach()[own].clone().requires_grad_()

    expected = whole(x, noise)[0]
    (expected * cotangent).sum().backward()
    outputs = part(ours, None if noise is None else noise[own])[0]
    (outputs * cotangent[own]).sum().backward()

    close = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {"atol": 2e-5, "rtol": 1e-5}
    torch.testing.assert_close(outputs, expected[own], **close)
    torch.testing.assert_close(ours.grad, x.grad[own], **close)
    for (name, p), q in zip(part.named_parameters(), whole.parameters(), strict=True):
        if isinstance(p, DTensor):
            held = slice(rank * E // ranks, (rank + 1) * E // ranks)
            assert p.to_local().shape[0] == E // ranks and p.grad is not None, name
            torch.testing.assert_close(p.grad.to_local(), q.grad[held], **close)
        else:
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(gradient)
            torch.testing.assert_close(gradient, q.grad, **close)


def every_router(shares: list[int]) -> None:
    assert set(ROUTERS) == set(concrete(Router)), "a router was added: say here what it is to be tried with"
    for kind, cases in ROUTERS.items():
        for settings in cases:
            for fill in FILLS if issubclass(kind, TokenChoice) else ("slots",):
                token_choice.fill = lambda x, even, fill=fill: fill
                for dtype in (torch.float64, torch.float32):
                    told = (kind.__name__, settings, fill, dtype)
                    try:
                        compare(kind(**settings), shares, dtype, fill == "slots" and len(set(shares)) == 1, False, True)
                        compare(kind(**settings), shares, dtype, fill == "slots", False, False)
                    except AssertionError as error:
                        raise AssertionError(f"{told}: {error}") from error


def idle_experts(shares: list[int]) -> None:
    """Experts without rows, ranks without images, ranks that lay their rows in different ways, no rows at all."""
    for shown in (shares, [4, *[0] * (len(shares) - 1)], [0] * len(shares)):
        for settings in ({"top_k": 1, "capacity_factor": "dropless"}, {"top_k": 2, "capacity_factor": 0.5}):
            for fill in FILLS:
                token_choice.fill = lambda x, even, fill=fill: fill
                for dtype in (torch.float64, torch.float32):
                    compare(TopKRouter(noise_std=0.0, **settings), shown, dtype, False, sum(shown) > 0, True)


def concrete(kind: type) -> list[type]:
    below = [found for child in kind.__subclasses__() for found in concrete(child)]
    known = kind.__module__.startswith("vmoe_momentum.") and not getattr(kind, "__abstractmethods__", None)
    return [kind, *below] if known else below


def words_exchanged() -> None:
    """Where shapes say all, no numbers are exchanged: four exchanges of rows, there and back and for the gradient."""
    torch.manual_seed(1)
    layer = layer_of(TopKRouter(2), torch.float32).train()
    spread(layer.experts, init_device_mesh("cpu", (dist.get_world_size(),)))
    for even, passes in ((True, 4), (False, 5)):
        layer.router.even = even
        trips: list[Tensor] = []
        real = torch.ops._c10d_functional.all_to_all_single

        def counted(rows: Tensor, *args: object, trips=trips, real=real) -> Tensor:
            trips.append(rows)
            return real(rows, *args)

        torch.ops._c10d_functional.all_to_all_single = counted
        try:
            layer(torch.randn(2, N, D, requires_grad=True), None)[0].sum().backward()
        finally:
            torch.ops._c10d_functional.all_to_all_single = real
        assert len(trips) == passes


def everything(rank: int, ranks: int) -> None:
    every_router([2] * ranks)
    uneven = [3, 1, 2, 4][:ranks]
    every_router(uneven)
    idle_experts(uneven)
    words_exchanged()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_spread_experts_compute_what_one_process_does(ranks: int, tmp_path: Path) -> None:
    on_ranks(ranks, everything, tmp_path, ranks)


def test_without_a_mesh_nothing_is_exchanged(monkeypatch) -> None:
    monkeypatch.setattr(exchange, "_all_to_all", None)
    layer = layer_of(TopKRouter(2), torch.float32)
    assert layer(torch.randn(2, N, D))[0].isfinite().all()


def test_experts_that_do_not_divide_are_refused() -> None:
    check_divides(8, 4)
    with pytest.raises(ValueError, match="expert_parallel=4: it does not divide a layer's num_experts=6; use one of 2"):
        check_divides(6, 4)
