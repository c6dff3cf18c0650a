"""Fixed position embeddings, and the type in which tokens enter the blocks."""

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from ..moe.routing import autocast_dtype


@register_notrace_module
class SinCos2d(nn.Module):
    """Adds sines and cosines of its place to each patch; without state, so any grid will do."""

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """x: [B, N, D] of a grid rows x columns, or [B, h, w, D], which says its own."""
        if x.ndim == 4:
            rows, columns = x.shape[1:3]
        return x + sincos2d(rows, columns, x.shape[-1], x.device, x.dtype).reshape(*x.shape[1:])


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


@register_notrace_module
class AutocastStream(nn.Module):
    """Tokens [B, N, D] in float32 under autocast, as learned positions and class tokens make them.

    Without either, patches would enter the blocks as halves, and so would the residual stream and the carry be.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x if autocast_dtype(x.device) is None else x.to(torch.promote_types(x.dtype, torch.float32))
