"""Training pictures that grow during a run."""

from __future__ import annotations

from dataclasses import dataclass

from ..ranges import COUNT, COUNT_OR_NONE, SIDE, in_range
from .checks import require


@in_range("data.progressive.", start_size=SIDE, start_epoch=COUNT_OR_NONE, end_epoch=COUNT, multiple=SIDE)
@dataclass(frozen=True)
class ProgressiveResize:
    """Small pictures first: faster epochs, and a milder version of training small and testing large.

    A pure function of the epoch, so it resumes by itself. Source: `get_resolution` of ffcv-imagenet.

    Args:
        start_size: Side up to `start_epoch`, 1 to 16384 px.
        start_epoch: Until this epoch, 0 to 1e9, pictures stay at start_size.
        end_epoch: From this epoch on, 1 to 1e9, they have data.image_size; in between the side grows linearly.
        multiple: Sides are rounded to it, 1 to 16384 px; a multiple of the network's patch.
    """

    start_size: int
    start_epoch: int
    end_epoch: int
    multiple: int = 32

    def check(self, final: int) -> None:
        """Raises ValueError: it cannot lead to `final` pixels."""
        name = "progressive"
        fits = self.start_size <= final and self.start_size % self.multiple == 0
        way_out = f"use a multiple of {self.multiple} up to data.image_size={final}"
        require(fits, f"{name}.start_size", self.start_size, way_out)
        require(final % self.multiple == 0, "image_size", final, f"use a multiple of {name}.multiple={self.multiple}")
        way_out = f"use less than {name}.end_epoch={self.end_epoch}"
        require(self.start_epoch < self.end_epoch, f"{name}.start_epoch", self.start_epoch, way_out)

    def size(self, epoch: int, final: int) -> int:
        """Side of the training pictures of `epoch` (from 0), px."""
        if epoch <= self.start_epoch:
            return self.start_size
        if epoch >= self.end_epoch:
            return final
        done = (epoch - self.start_epoch) / (self.end_epoch - self.start_epoch)
        return round((self.start_size + done * (final - self.start_size)) / self.multiple) * self.multiple
