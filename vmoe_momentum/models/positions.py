"""Fixed position embeddings, and learned ones brought to another grid."""

import math

import torch
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor


def sincos2d(rows: int, columns: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[rows * columns, width]: sin x, cos x, sin y, cos y at width/4 frequencies from 1 to 1/10000.

    Source: google-research/vmoe, vmoe/nn/vit_moe.py, add_position_emb at 942a78b (MoCo v3's; timm's of that name spaces
    the frequencies otherwise). Raises ValueError: width is no multiple of 4 or below 8.
    """
    if width % 4 or width < 8:
        raise ValueError(f"pos_embed=sincos2d needs a width that is a multiple of 4 and at least 8, not {width}")
    quarter = width // 4
    frequency = 10_000.0 ** -(torch.arange(quarter, device=device, dtype=torch.float32) / (quarter - 1))
    y = torch.arange(rows, device=device, dtype=torch.float32).repeat_interleave(columns).unsqueeze(1) * frequency
    x = torch.arange(columns, device=device, dtype=torch.float32).repeat(rows).unsqueeze(1) * frequency
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1).to(dtype)


def fit_positions(tensors: dict[str, Tensor], net: VisionTransformer) -> dict[str, Tensor]:
    """A state dict whose learned positions fit the network's grid: timm calls this before it loads weights."""
    table = tensors.get("pos_embed")
    if table is None or net.pos_embed is None:
        return tensors
    prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    side = math.isqrt(table.shape[1] - prefix)
    saved, grid = getattr(net, "pretrained_model_args", {}).get("img_size"), (side, side)
    if isinstance(saved, list | tuple):  # the size these weights were saved at
        grid = tuple(pixels // patch for pixels, patch in zip(saved, net.patch_embed.patch_size, strict=True))
    if grid == net.patch_embed.grid_size:
        return tensors
    fitted = resample_abs_pos_embed(table, net.patch_embed.grid_size, grid, num_prefix_tokens=prefix)
    return {**tensors, "pos_embed": fitted}
