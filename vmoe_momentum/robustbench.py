"""Our models for RobustBench: `robustbench.benchmark(open_model(SOURCE), ...)`."""

from pathlib import Path
from typing import NamedTuple

from PIL import Image
from torch import Tensor, nn

from .classifiers import open_models
from .pictures import as_rgb
from .robustness import View
from .robustness.pictures import as_tensor, show


class Preprocessing(NamedTuple):
    """A picture as the network is evaluated on it: PIL -> float32 [3, size, size] in [0, 1]."""

    view: View

    def __call__(self, picture: Image.Image) -> Tensor:
        rgb = as_rgb(picture, Path(getattr(picture, "filename", "") or "picture"), self.view.upright)
        return as_tensor(show(rgb, self.view)).float() / 255


class PixelClassifier(nn.Module):
    """Pixels [B, 3, size, size] in [0, 1] -> logits [B, K], classes in the alphabetical order of their folders.

    That is RobustBench's order, for all of its data sets. preprocessing: what its `benchmark` takes by this name.
    """

    def __init__(self, module: nn.Module, view: View, class_ids: list[str] | None = None) -> None:
        super().__init__()
        self.module, self.preprocessing = module, Preprocessing(view)
        ids = class_ids or []
        self.order = [ids.index(name) for name in sorted(ids)]  # empty: the network says no folders, so it stays

    def forward(self, images: Tensor) -> Tensor:
        logits = self.module(images)
        return logits[:, self.order] if self.order else logits


def open_model(source: str) -> PixelClassifier:
    """source: what `robustness --model` takes: a .ckpt of fit, local-dir:PATH, a timm name, module:callable.

    In eval mode, on the CPU. Raises ValueError, FileNotFoundError: none of these.
    """
    (model,) = open_models([source])
    return PixelClassifier(model.module, model.view, model.class_ids).eval()
