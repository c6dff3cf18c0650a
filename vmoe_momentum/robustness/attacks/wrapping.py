"""The classifier as attacks see it, the ball around images, and what is put back after an attack."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .budget import Budget


class Classifier(nn.Module):
    """A model as attacks see it: logits of float32 at least, since they write losses into float32 buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        return logits if logits.dtype == torch.float64 else logits.float()


def project(images: Tensor, found: Tensor, budget: Budget) -> Tensor:
    """`found` moved into the ball around `images` and into the box. NaN counts as no change."""
    change = torch.nan_to_num(found - images, nan=0.0)
    if budget.norm == "Linf":
        change = change.clamp(-budget.eps, budget.eps)
    else:
        norm = change.flatten(1).norm(dim=1).clamp_min(1e-30)
        change = change * (budget.eps / norm).clamp_max(1.0).view(-1, 1, 1, 1)
    # clamping to the box moves towards the images, so it cannot leave the ball
    return (images + change).clamp(0.0, 1.0)


@contextmanager
def frozen(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode everywhere, gradients of inputs only, its own random numbers; all as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.eval().requires_grad_(False)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
