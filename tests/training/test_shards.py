"""Sharded networks within one process: what they compute is what whole ones do, and how they come to their weights."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from registered import registered
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

import vmoe_momentum
from vmoe_momentum.models import PixelModel, directory
from vmoe_momentum.moe import Router
from vmoe_momentum.momentum import Complex, HeavyBall, MomentumRule
from vmoe_momentum.training.materializing import build_on_meta, materialize
from vmoe_momentum.training.sharding import shard

RULES, ROUTERS = registered(MomentumRule), {n: c for n, c in registered(Router).items() if not c.__abstractmethods__}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def mesh(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[DeviceMesh]:
    """One device, by gloo or NCCL."""
    backend = {"cpu": "gloo", "cuda": "nccl"}[request.param]
    dist.init_process_group(backend, store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield init_device_mesh(request.param, (1,))
    dist.destroy_process_group()


def tiny(rule: str | MomentumRule = "HeavyBall", router: str = "TopKRouter", **more: object) -> nn.Module:
    return timm.create_model("vmoe_tiny_patch4_16", rule=rule, router=router, num_classes=5, **more)


def seeded(make, *args: object) -> nn.Module:
    torch.manual_seed(3)
    return make(*args)


def spread(net: nn.Module, mesh: DeviceMesh, **settings: object) -> PixelModel:
    model = PixelModel(net)
    shard(model, mesh, **settings)
    materialize(net, torch.device(mesh.device_type))
    return model.train().to(mesh.device_type)


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {n: (p.full_tensor() if isinstance(p, DTensor) else p).cpu() for n, p in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [n for n in one if not torch.equal(one[n].flatten(), other[n].flatten())] == []


def passed(model: PixelModel, matrices: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
    """Logits and gradients, of the same pictures and draws."""
    torch.manual_seed(5)
    device = model.mean.device
    pixels = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=matrices is not None):
        logits, aux = model.forward_normalized(model.normalize(pixels))
    (logits.float().square().sum() + aux).backward()
    grads = [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
    return logits.detach(), [g.flatten() for g in grads]


CASES = [(rule, "TopKRouter") for rule in RULES if not RULES[rule].__abstractmethods__]
CASES += [("HeavyBall", router) for router in ROUTERS]


@pytest.mark.parametrize("matrices", [None, torch.bfloat16])
@pytest.mark.parametrize(("rule", "router"), [*CASES, (HeavyBall(learn=True), "SoftRouter"), (Complex(), "TopKRouter")])
def test_shards_compute_what_the_whole_does(rule, router, matrices, mesh) -> None:
    """Under autocast, too: what is gathered in bfloat16 is what autocast would round."""
    net = seeded(partial(tiny, rule, router, post_norm="all", init_values=0.5))
    sharded = spread(seeded(partial(tiny, rule, router, post_norm="all", init_values=0.5)), mesh, matrices=matrices)
    logits, grads = passed(PixelModel(net).train().to(mesh.device_type), matrices)
    ours, own = passed(sharded, matrices)
    sums = 0.0
    if mesh.device_type != "cpu":  # a GPU adds in any order
        sums = 1e-5 if matrices is None else 2**-7
    if rule == "SAM" and matrices is not None:  # evaluates a layer twice: its gradients are added in bfloat16
        sums = 2**-7
    torch.testing.assert_close(ours, logits, rtol=0, atol=0)
    for (name, _), gradient, mine in zip(net.named_parameters(), grads, own, strict=True):
        assert float((gradient - mine).abs().max()) <= sums * float(gradient.abs().max()), name
        assert mine.dtype == torch.float32


def test_routers_norms_and_coefficients_are_gathered_in_float32(mesh) -> None:
    net, seen = tiny(HeavyBall(learn=True), post_norm="all"), {}
    model = spread(net, mesh, matrices=torch.bfloat16)

    def note(name: str, layer: nn.Module, *_: object) -> None:
        seen.update({f"{name}.{own}": p.dtype for own, p in layer.named_parameters(recurse=False)})

    for name, layer in net.blocks[1].named_modules():
        layer.register_forward_hook(partial(note, name))
    net.blocks[1].register_forward_hook(
        lambda _, inputs, __: seen.update(x=inputs[0].dtype, m=inputs[1].momentum[0].dtype)
    )
    passed(model, torch.bfloat16)
    halves = {name for name, dtype in seen.items() if dtype == torch.bfloat16}
    assert halves == {
        f"{layer}.{p}"
        for layer in ("attn.qkv", "attn.proj", "mlp.experts.fc1", "mlp.experts.fc2")
        for p in ("weight", "bias")
    }
    assert {"x", "m", "mlp.router.weight", "norm3.weight", "momentum.raw_mu"} <= seen.keys()


@pytest.mark.parametrize(
    "more",
    [{}, {"router": "SoftRouter"}, {"rule": HeavyBall(learn=True)}, {"post_norm": "all", "init_values": 0.5},
     {"global_pool": "map", "class_token": False}, {"representation_size": 8, "share_expert_init": False}],
)  # fmt: skip
def test_drawn_layer_by_layer_is_drawn_at_once(more: dict, mesh) -> None:
    make = partial(tiny, **more)
    empty = seeded(build_on_meta, make)
    assert {p.device.type for p in empty.parameters() if p.ndim} == {"meta"}
    assert_same(whole(spread(empty, mesh).net), seeded(make).state_dict())


@pytest.mark.parametrize("num_classes", [5, 3])
def test_weights_of_a_directory_go_into_shards(num_classes: int, mesh, tmp_path) -> None:
    """Mapped, never read as a whole; a head of other classes and scalars that the file has not are drawn."""
    directory.save(tiny("Residual"), tmp_path / "net", overwrite=False)
    settings = {
        "name": f"local-dir:{tmp_path / 'net'}",
        "num_classes": num_classes,
        "image_size": 24,
        "rule": HeavyBall(learn=True),
    }
    mapped = build_on_meta(vmoe_momentum.create_model, **settings)
    assert mapped.blocks[1].mlp.experts.fc1.weight.device.type == "cpu"
    assert_same(whole(spread(mapped, mesh).net), vmoe_momentum.create_model(**settings).state_dict())


def test_networks_of_other_makers_come_as_they_are() -> None:
    net = seeded(build_on_meta, partial(timm.create_model, "vit_tiny_patch16_224", img_size=32, depth=1))
    assert {p.device.type for p in net.parameters()} == {"cpu"}


LARGE = """
import resource, sys, torch, torch.distributed as dist, timm, vmoe_momentum
from torch.testing._internal.distributed.fake_pg import FakeStore
from vmoe_momentum.models import PixelModel
from vmoe_momentum.training.materializing import build_on_meta, materialize
from vmoe_momentum.training.sharding import shard
name, ranks, extra = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
mesh = dist.device_mesh.init_device_mesh("cpu", (ranks,))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
net = build_on_meta(timm.create_model, model_name=name, **extra)
total = sum(p.numel() for p in net.parameters()) * 4
largest = max(p.numel() for p in net.parameters()) * 4
shard(PixelModel(net), mesh)
materialize(net, torch.device("cpu"))
own = sum(p.to_local().numel() for p in net.parameters()) * 4
assert all(p.to_local().isfinite().all() for p in net.parameters())
grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(total, largest, own, grown)
"""


@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_network() -> None:
    """Rank 0 of 16, the others being imagined: a share, and the largest tensor while it is drawn."""
    arguments = [
        sys.executable,
        "-c",
        LARGE,
        "vmoe_base_patch16_224",
        "16",
        "{'num_experts': 16, 'moe_layers': 'every2'}",
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=280, check=True)
    total, largest, own, grown = map(int, done.stdout.split())
    assert own < total / 15
    assert grown < own + 3 * largest + 2**27 < total
