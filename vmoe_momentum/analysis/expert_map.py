"""Which expert each patch of a picture went to, block by block: a picture."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.patches import Patch
from timm.layers import PatchEmbed
from torch import Tensor

from ..models import MomentumBlock, PixelModel
from .output import grid
from .trace import record


@torch.no_grad()
def expert_maps(model: PixelModel, pixels: Tensor) -> dict[int, Tensor]:
    """Block -> [B, h, w], the expert with the largest share in each patch, of those that took it; -1 where none did.

    pixels: uint8 [B, 3, S, S]. Class tokens are left out. Raises ValueError: no MoE blocks, patches not on a grid.
    """
    net = model.net
    found: dict[int, Tensor] = {}
    if not _sparse_blocks(model):
        raise ValueError("--plot: this network has no MoE blocks, so no experts to show")
    rows, columns = cast(PatchEmbed, net.patch_embed).grid_size
    with record(net) as visits:
        model(pixels.to(next(net.parameters()).device))
        for visit in visits:
            size = visit.tokens.shape[:2]
            gates = visit.plan.gates.reshape(*size, -1)
            reached = visit.plan.assigned().reshape(*size, -1)
            best = torch.where(reached, gates, -1.0).argmax(dim=-1)
            best = torch.where(reached.any(dim=-1), best, -1)
            found[visit.block] = best[:, -rows * columns :].reshape(-1, rows, columns).cpu()
    return found


def draw_experts(model: PixelModel, pixels: list[Tensor], names: list[str], path: Path) -> None:
    """A line a picture, a column a block: its patches in the colour of their expert. Writes a PNG.

    Raises ValueError: `path` cannot be written.
    """
    stacked = torch.stack(pixels)
    maps = expert_maps(model, stacked)
    experts = max(block.mlp.experts.fc1.weight.shape[0] for block in _sparse_blocks(model))
    colors = (colormaps["tab10"] if experts <= 10 else colormaps["gist_ncar"].resampled(experts + 1))(range(experts))
    figure, axes = grid(len(pixels), 1 + len(maps), 2.2, 2.3)
    for line, picture in enumerate(stacked):
        image = picture.permute(1, 2, 0).numpy()
        axes[line, 0].imshow(image)
        axes[line, 0].set_title(names[line], fontsize=8)
        for place, (block, found) in enumerate(maps.items(), 1):
            axis = axes[line, place]
            axis.imshow(image.mean(axis=-1), cmap="gray", extent=(0, 1, 1, 0))
            tint = np.concatenate([colors[found[line].clamp_min(0), :3], (found[line] >= 0)[..., None] * 0.6], axis=-1)
            axis.imshow(tint, extent=(0, 1, 1, 0), interpolation="nearest")
            axis.set_title(f"block {block}", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    keys = [Patch(color=colors[expert], label=f"expert {expert}") for expert in range(experts)]
    figure.legend(handles=keys, loc="outside lower center", ncols=min(experts, 8), fontsize=8, frameon=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise ValueError(f"--plot={path}: cannot be written ({error.strerror}); choose another place") from error


def _sparse_blocks(model: PixelModel) -> list[MomentumBlock]:
    """Its sparse blocks."""
    return [block for block in getattr(model.net, "blocks", []) if isinstance(block, MomentumBlock)]
