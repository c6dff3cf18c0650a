"""The classifier as attacks see it, the ball around images, and what is put back after an attack."""

from collections.abc import Iterator
from contextlib import contextmanager
from zlib import crc32

import torch
from torch import Tensor, nn

from .budget import Budget


class Classifier(nn.Module):
    """A model as attacks see it: logits of float32 at least, since they write losses into float32 buffers.

    passes: whose logits are averaged, for attacks that cannot average gradients themselves.
    """

    def __init__(self, model: nn.Module, passes: int = 1) -> None:
        super().__init__()
        self.model, self.passes = model, passes

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        for _ in range(self.passes - 1):
            logits = logits + self.model(images)
        return logits / self.passes


def starting_point(images: Tensor, budget: Budget) -> Tensor:
    """The images, or, with a random start, a point of each one's ball, uniform, inside the box.

    Drawn from the seed and the image's own pixels, on the CPU: the same in any batch and on any device.
    """
    if not budget.random_start:
        return images
    drawn = []
    for image in images.cpu():
        seed = crc32(image.contiguous().numpy().tobytes(), budget.seed)  # 32 bits are all that generators take
        generator = torch.Generator().manual_seed(seed)
        if budget.norm == "Linf":
            change = torch.rand(image.shape, generator=generator) * 2 - 1
        else:
            change = torch.randn(image.shape, generator=generator)
            change *= torch.rand(1, generator=generator) ** (1 / image.numel()) / change.norm()
        drawn.append(budget.eps * change)
    return project(images, images + torch.stack(drawn).to(images), budget)


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
def evaluated(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode everywhere and random numbers of its own; all as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.eval()
        with torch.random.fork_rng(devices=devices):
            # torch.manual_seed tells every kind of device, which takes milliseconds
            for generator in (torch.default_generator, *(torch.cuda.default_generators[n] for n in devices)):
                generator.manual_seed(seed)
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def frozen(model: nn.Module, seed: int) -> Iterator[None]:
    """Also gradients of inputs only: packages may ask for others."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        with evaluated(model, seed):
            yield
    finally:
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)
