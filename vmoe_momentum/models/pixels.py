"""From pixels to logits: the one place where images are normalised."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from .networks import Gated


class Wrapped(nn.Module):
    """A network as `net`, behind what makes its inputs of pixels or words."""

    net: nn.Module


class PixelModel(Wrapped):
    """uint8 [0, 255] or float [0, 1] images [B, 3, H, W] -> normalise -> network -> logits [B, K].

    mean and std, in units of [0, 1], come from the network's timm `pretrained_cfg`. They are buffers outside the state
    dict, so wrapping changes no checkpoint key but the prefix `net.`. Casting the module rounds the buffers;
    `constants` are what they were rounded from, and what is written down.
    """

    mean: Tensor  # [1, 3, 1, 1]
    std: Tensor

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        config = getattr(net, "pretrained_cfg", None) or {}
        half = (0.5, 0.5, 0.5)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.set_constants(config.get("mean") or half, config.get("std") or half)

    def set_constants(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Of each channel, in units of [0, 1]."""
        self.constants = {}
        for name, values in (("mean", mean), ("std", std)):
            self.constants[name] = torch.tensor(values, dtype=torch.float32).tolist()  # whatever the default type is
            setattr(self, name, torch.tensor(values).view(1, -1, 1, 1))

    def normalize(self, images: Tensor) -> Tensor:
        """Pixels as the network wants them, in its buffers' floating dtype."""
        if images.dtype == torch.uint8:
            images = images.to(self.mean.dtype) / 255
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        return self.net(self.normalize(images))

    def forward_with_aux(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, K] and the auxiliary loss [], zero for networks without one."""
        return self.forward_normalized(self.normalize(images))

    def forward_normalized(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward_with_aux` does after `normalize`: for augmentation that works on normalised images."""
        with_aux = getattr(self.net, "forward_with_aux", None)
        if with_aux is not None:
            return with_aux(images)
        logits = self.net(images)
        return logits, logits.new_zeros(())

    def forward_normalized_with_gates(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The same, and the gates of each sparse block [B, N, E]; of networks that have a `forward_with_gates`."""
        return cast(Gated, self.net).forward_with_gates(images)
