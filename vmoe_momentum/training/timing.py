"""How long a batch takes, before a run."""

import time
from typing import Any

import torch

from ..models.groups import images_together


def seconds_per_batch(module: Any, images: int) -> float:
    """Forward and backward on about 32 black images, scaled to `images`; gradients and generators are put back.

    With the attack of adversarial training; without data loading and the optimizer's step.
    """
    model, was_training = module.model, module.model.training
    together = images_together(model.train().net, module.image_size)
    few = min(images, max(together, 32 - 32 % together))
    few += together * (few % 2 and images > few)  # mixing pairs them
    pixels = torch.zeros(few, 3, module.image_size, module.image_size, dtype=torch.uint8, device=module.device)
    devices = [module.device] if module.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), module.trainer.precision_plugin.forward_context():
        fastest = float("inf")
        for _ in range(4):  # the first warms up; the fastest is the least disturbed
            start = time.perf_counter()
            if module.pairing is None:
                logits, aux_loss = model.forward_with_aux(pixels)
                loss = logits.float().sum() + aux_loss
            else:
                loss = module.training_losses((pixels, torch.zeros(few, dtype=torch.int64, device=module.device)))[0][0]
            torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
            if devices:
                torch.cuda.synchronize(module.device)
            fastest = min(fastest, time.perf_counter() - start)
    model.train(was_training)
    return fastest * images / few
