"""Images that are routed together, where a group of tokens reaches over several. B images, N tokens, D width."""

from typing import cast

import torch
from torch import Tensor, nn

from .loading import pixels_per_patch
from .networks import Grouped


def images_together(net: nn.Module, side: int) -> int:
    """The fewest images of `side` pixels that make whole routing groups, in the mode that `net` is in; 1 for most."""
    if not hasattr(net, "images_together"):
        return 1
    height, width = pixels_per_patch(net)
    grouped = cast(Grouped, net)
    return grouped.images_together((side // height) * (side // width) + grouped.num_prefix_tokens)


def fill_group(x: Tensor, together: int) -> Tensor:
    """[B, N, D] -> B rounded up to whole groups, in evaluation: the batch's images again, from the first.

    They take part in the routing like any batch mate, as the black images do with which the reference fills its last
    batch (google-research/vmoe, input pipeline). Training batches are refused instead, by the router.
    """
    images = x.shape[0]
    missing = -images % together
    return x[torch.arange(images + missing, device=x.device) % images] if missing and images else x
