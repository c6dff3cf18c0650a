"""Keeping experts chosen alike: pairs of pictures that look alike, and how much their routing has to agree.

B images. Pixels in [0, 1]. The loss itself: moe/consistency.py.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..ranges import NOT_NEGATIVE, POSITIVE, SHARE, in_range


@in_range(
    "model.consistency.", weight=POSITIVE.because("0.005 is the published one"), noise=NOT_NEGATIVE, contrast=SHARE,
)  # fmt: skip
@dataclass(frozen=True)
class ConsistencySettings:
    """A loss that keeps routing alike between each picture and another view of it, summed over sparse blocks.

    Pairwise router consistency (Kada et al., IEEE OJSP 6, 2025, published for V-MoE). Geometry stays, so that patches
    pair one to one; the paper also crops, and matches the patches.

    Args:
        weight: Of the loss, in (0, 1e6]; 0.005 in the paper's ImageNet recipe.
        view: What each picture is paired with: itself under other light and noise (augmentation), both trained on; or
            what model.adversarial makes of it (attack).
        noise: Of augmentation: standard deviation of Gaussian noise in pixels of [0, 1], in [0, 1e6].
        contrast: Of augmentation: brightness and contrast each change by a factor of 1 - contrast to 1 + contrast, in
            [0, 1], one for each picture.
    """

    weight: float = 0.005
    view: Literal["augmentation", "attack"] = "augmentation"
    noise: float = 0.05
    contrast: float = 0.4

    def __post_init__(self) -> None:
        if self.view == "augmentation" and not self.noise and not self.contrast:
            raise ValueError(
                "model.consistency: noise=0 and contrast=0 pair each picture with itself; set one of them, or leave "
                "model.consistency out"
            )

    def augmented(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> the same under other light and noise, in [0, 1]."""
        draws = torch.rand(2, len(pixels), 1, 1, 1, device=pixels.device, dtype=pixels.dtype) * 2 - 1
        light, contrast = 1 + self.contrast * draws
        mean = pixels.mean(dim=(1, 2, 3), keepdim=True)
        return (light * mean + contrast * (pixels - mean) + self.noise * torch.randn_like(pixels)).clamp(0, 1)
