"""How far two runs of one process part that begin a rounding error apart: what sharded ones can be held to."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 20


def losses(rule: str, moved: float) -> Tensor:
    """Of AdamW on images of noise, clipped, in float32; weights times 1 + N(0, moved^2) at the start."""
    torch.manual_seed(0)
    router = {"class_path": "TopKRouter", "init_args": {"noise_std": 0.0}}
    net = timm.create_model("vmoe_tiny_patch4_16", rule=rule, router=router, num_classes=10).train()
    draws = torch.Generator().manual_seed(1)
    images = torch.rand(8, 32, 3, 16, 16, generator=draws)
    labels = torch.randint(0, 10, (8, 32), generator=draws)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1 + moved * torch.randn(parameter.shape, generator=draws))
    optimizer, found = torch.optim.AdamW(net.parameters(), lr=1e-3), []
    for step in range(STEPS):
        logits, aux_loss = net.forward_with_aux(images[step % 8])
        loss = F.cross_entropy(logits, labels[step % 8]) + aux_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


@pytest.mark.long
def test_rounding_stays_rounding_but_under_the_adam_rule() -> None:
    """It divides by the root of a second moment, so what is near zero turns its sign. 1e-5 over 20 steps, the bar of
    sharded runs, is no measure of this rule."""
    apart = {rule: (losses(rule, 0.0) - losses(rule, 1e-7)).abs().max() for rule in ("Residual", "HeavyBall", "Adam")}
    assert apart["Residual"] < 1e-5 and apart["HeavyBall"] < 1e-5
    assert apart["Adam"] > 1e-4
