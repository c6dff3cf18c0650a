"""Weights and networks brought together where they differ: timm calls `fit_weights` before it loads any."""

import math
from typing import Any

from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .networks import as_classifier

LEARNED = ".momentum.raw_"  # a rule's own scalars


def fit_weights(tensors: dict[str, Tensor], net: VisionTransformer) -> dict[str, Tensor]:
    """Learned positions resampled to the network's grid; scalars of its momentum rule at their start, if it learns any.

    Another rule than the saved one is the caller's choice: what only the saved one had learned is left out.
    """
    own = net.state_dict()
    tensors = {name: value for name, value in tensors.items() if LEARNED not in name or name in own}
    tensors = {**{name: value for name, value in own.items() if LEARNED in name}, **tensors}
    return _fit_positions(tensors, net)


def fit_to_data(net: nn.Module, num_classes: int, image_size: int) -> None:
    """A fresh head and resampled positions where the numbers differ. Raises ValueError: it cannot be resized."""
    if getattr(net, "num_classes", num_classes) != num_classes:
        as_classifier(net).reset_classifier(num_classes)
    size = getattr(getattr(net, "patch_embed", None), "img_size", None)
    if size is not None and tuple(size) != (image_size, image_size):
        resize = getattr(net, "set_input_size", None)
        if resize is None:
            raise ValueError(
                f"data.image_size={image_size}: {type(net).__name__} takes {size[0]} pixels and cannot be resized"
            )
        resize(img_size=(image_size, image_size))


def pixels_per_patch(net: nn.Module) -> tuple[int, int]:
    """Height and width in pixels of what becomes one token of a ViT, also behind a convolutional stem."""
    embed: Any = net.patch_embed
    ratio = embed.feat_ratio() if hasattr(embed, "feat_ratio") else embed.patch_size
    return (ratio, ratio) if isinstance(ratio, int) else tuple(ratio)


def _fit_positions(tensors: dict[str, Tensor], net: VisionTransformer) -> dict[str, Tensor]:
    table = tensors.get("pos_embed")
    if table is None or net.pos_embed is None:
        return tensors
    prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    patches = table.shape[1] - prefix
    saved, side = getattr(net, "pretrained_model_args", {}).get("img_size"), math.isqrt(patches)
    grid = (side, side)
    if isinstance(saved, list | tuple):  # the size these weights were saved at
        known = tuple(pixels // patch for pixels, patch in zip(saved, pixels_per_patch(net), strict=True))
        grid = known if math.prod(known) == patches else grid
    if grid == tuple(net.patch_embed.grid_size):
        return tensors
    fitted = resample_abs_pos_embed(table, net.patch_embed.grid_size, grid, num_prefix_tokens=prefix)
    return {**tensors, "pos_embed": fitted}
