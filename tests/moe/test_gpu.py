"""On a GPU: the paths taken there, and that nothing waits for the host. Without one the first test runs on the CPU, so
that these tests do not fall behind the code unseen."""

import pytest
import torch
from torch import Tensor, nn

from vmoe_momentum.moe import ExpertChoiceRouter, M6TRouter, Router, SoftRouter, SparseMlp, TopKRouter
from vmoe_momentum.moe.paths import fill

ROUTERS: dict[str, Router] = {
    "dropless": TopKRouter(capacity_factor="dropless"),
    "capacity": TopKRouter(capacity_factor=0.6),
    "batch priority": TopKRouter(capacity_factor=0.6, batch_priority=True, group_size=64),
    "M6-T": M6TRouter(),
    "expert choice": ExpertChoiceRouter(),
    "soft": SoftRouter(2),
}


def layer(name: str, dtype: torch.dtype = torch.float32) -> tuple[SparseMlp, Tensor, Tensor | None]:
    torch.manual_seed(0)
    made = SparseMlp(64, 128, 4, ROUTERS[name], nn.GELU).train()
    x = torch.randn(8, 16, 64)
    noise = made.router.sample_noise(x)
    return made.to(dtype), x.to(dtype), noise


def both_ways(made: SparseMlp, x: Tensor, noise: Tensor | None) -> list[Tensor]:
    """Outputs, loss and gradients, on the device of x."""
    outputs, loss, _ = made(x, noise)
    return [outputs, loss, *torch.autograd.grad(outputs.float().sin().sum() + loss, [x, *made.parameters()])]


@pytest.mark.parametrize("there", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", ROUTERS)
def test_as_on_a_cpu(name: str, there: str) -> None:
    results = []
    for device in ("cpu", there):
        made, x, noise = layer(name)
        made, x = made.to(device), x.to(device).requires_grad_()
        found = both_ways(made, x, None if noise is None else noise.to(device))
        results.append([each.detach().cpu() for each in found])
    torch.testing.assert_close(results[1], results[0], atol=2e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ROUTERS)
def test_nothing_waits_for_the_gpu(name: str, dtype: torch.dtype) -> None:
    """But dropless routing where torch's grouped product is a loop on the host."""
    made, x, _ = layer(name, dtype)
    made, x = made.cuda(), x.cuda().requires_grad_()
    if name == "dropless" and fill(x) == "slots":
        pytest.skip("a loop over the experts, on this card and in this type")
    noise = made.router.sample_noise(x)
    both_ways(made, x, noise)  # libraries set themselves up
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_ways(made, x, made.router.sample_noise(x))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dropless", "capacity", "expert choice"])
def test_compiled_as_eager(name: str, dtype: torch.dtype) -> None:
    made, x, _ = layer(name, dtype)
    made, x = made.cuda().eval(), x.cuda().requires_grad_()
    results = []
    for run in (made, torch.compile(made)):
        outputs, *_ = run(x)
        results.append((outputs, *torch.autograd.grad(outputs.float().sin().sum(), [x, made.experts.fc1.weight])))
    near = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.05, "rtol": 0.05}
    torch.testing.assert_close(results[1], results[0], **near)


@pytest.mark.gpu
def test_the_fused_optimizer_moves_weights_as_on_a_cpu() -> None:
    from vmoe_momentum import create_model
    from vmoe_momentum.training import OptimizerSettings

    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = create_model("vmoe_tiny_patch4_16", num_classes=10, router=TopKRouter(noise_std=0.0)).to(device)
        optimizer = OptimizerSettings(lr=1e-3).build(net)
        images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(device)
        for _ in range(3):
            logits, loss = net.forward_with_aux(images)
            (logits.square().mean() + loss).backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([parameter.detach().cpu() for parameter in net.parameters()])
    torch.testing.assert_close(results[1], results[0], atol=2e-3, rtol=0)
