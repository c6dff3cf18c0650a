"""What one image costs: parameters, active parameters, floating-point operations."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..models import PixelModel
from ..models.groups import images_together
from ..models.vit import MomentumVisionTransformer
from ..moe import SparseMlp


class Cost(NamedTuple):
    parameters: int  # in all
    active: int  # those that one token touches, on average: K of E experts
    gflops: float  # per image, multiply and add counted as two


def _grouped_mm_flops(rows: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """R rows, each through one [in, out] matrix. rows, weight: shapes [R, in], [E, in, out]."""
    return 2 * rows[0] * weight[-2] * weight[-1]


GROUPED_MM_FLOPS = {torch.ops.aten._grouped_mm: _grouped_mm_flops}


def measure_cost(model: PixelModel, image_size: int) -> Cost:
    """Runs a black image, or as many as are routed together, in evaluation mode.

    Our networks run without memory and numbers (the meta device), others on their own device.
    """
    total = sum(p.numel() for p in model.parameters())
    idle = 0
    for layer in model.modules():
        if isinstance(layer, SparseMlp):
            experts = sum(p.numel() for p in layer.experts.parameters())
            num_experts = layer.experts.fc1.weight.shape[0]
            net: Any = model.net  # ours, or another maker's with the same names
            tokens = net.patch_embed.num_patches + net.num_prefix_tokens
            idle += round(experts * (1 - layer.router.experts_per_token(num_experts, tokens) / num_experts))
    was_training = model.training
    model.eval()
    count = images_together(model.net, image_size)
    counter = FlopCounterMode(display=False, custom_mapping=GROUPED_MM_FLOPS)
    with torch.no_grad(), counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        _pass(model, count, image_size)
    model.train(was_training)
    return Cost(total, total - idle, counter.get_total_flops() / 1e9 / count)


def saved_bytes(model: PixelModel, image_size: int) -> int | None:
    """What one image of a training batch keeps for the backward pass, in float32; None for networks not ours."""
    if not isinstance(model.net, MomentumVisionTransformer):
        return None
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    was_training = model.training
    model.train()
    count = images_together(model.net, image_size)
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weights = {p.untyped_storage()._cdata for p in _pass(model, count, image_size).values()}
    model.train(was_training)
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights) // count


def _pass(model: PixelModel, count: int, image_size: int) -> dict[str, Tensor]:
    """Runs so many black images; what stood for the weights."""
    device = next(model.parameters()).device
    tensors = {name: tensor for found in (model.named_parameters(), model.named_buffers()) for name, tensor in found}
    if isinstance(model.net, MomentumVisionTransformer):
        device = torch.device("meta")
        tensors = {
            name: torch.empty_like(tensor, device=device).requires_grad_(tensor.requires_grad)
            for name, tensor in tensors.items()
        }
    images = torch.zeros(count, 3, image_size, image_size, dtype=torch.uint8, device=device)
    with torch.compiler.set_stance("force_eager"):  # inductor cannot write code for the meta device
        torch.func.functional_call(model, tensors, (images,))
    return tensors
