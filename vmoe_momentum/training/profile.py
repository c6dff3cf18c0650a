"""What one image costs: parameters, active parameters, floating-point operations."""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models import PixelModel
from ..models.groups import images_together
from ..moe import SparseMlp


class Cost(NamedTuple):
    parameters: int  # in all
    active: int  # those that one token touches, on average: K of E experts
    gflops: float  # per image, multiply and add counted as two


def _grouped_mm_flops(rows: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """R rows, each through one [in, out] matrix. rows, weight: shapes [R, in], [E, in, out]."""
    return 2 * rows[0] * weight[-2] * weight[-1]


def measure_cost(model: PixelModel, image_size: int) -> Cost:
    """Runs a black image, or as many as are routed together, in evaluation mode, on the network's own device."""
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in model.modules():
        if isinstance(layer, SparseMlp):
            experts = sum(p.numel() for p in layer.experts.parameters())
            num_experts = layer.experts.fc1.weight.shape[0]
            tokens = model.net.patch_embed.num_patches + model.net.num_prefix_tokens
            idle += round(experts * (1 - layer.router.experts_per_token(num_experts, tokens) / num_experts))
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    count = images_together(model.net, image_size)
    images = torch.zeros(count, 3, image_size, image_size, dtype=torch.uint8, device=device)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_mm_flops})
    with torch.no_grad(), counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        model(images)
    model.train(was_training)
    return Cost(total, total - idle, counter.get_total_flops() / 1e9 / count)
