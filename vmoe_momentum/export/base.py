"""What the formats share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models import PixelModel
from ..models.networks import as_classifier
from .asked import Request

Metadata = dict[str, Any]
Answer = Callable[[Tensor], Tensor]  # pixels [B, 3, S, S] in the format's own dtype -> [B, K], both on the CPU


class Format(NamedTuple):
    """write: into an existing folder, giving what only this format knows (file, opset). open: what it wrote, computing
    on a device."""

    write: Callable[[PixelModel, Path, Request, Metadata], Metadata]
    open: Callable[[Path, Metadata, str], Answer]
    open_network: Callable[[Path, Metadata], PixelModel] | None = None  # where the network itself is kept
    is_program: bool = False  # opening one runs what its author put into it
    precisions: tuple[str, ...] = ("fp32",)
    computes_on: Callable[[str], str] = str  # the device that is taken where this one is asked for


class Servable(nn.Module):
    """What programs hold: pixels -> logits or probabilities, normalisation inside."""

    def __init__(self, model: PixelModel, request: Request) -> None:
        super().__init__()
        self.model, self.request = model, request

    def forward(self, images: Tensor) -> Tensor:
        """images: [B, 3, S, S] of the requested dtype -> [B, K] float32."""
        # .to leaves a check of the dtype in an exported program, also where it does nothing
        pixels = images.to(torch.uint8 if self.request.input == "uint8" else torch.float32)
        logits = self.model(pixels).float()
        return logits.softmax(dim=-1) if self.request.output == "probabilities" else logits

    def example(self, batch_size: int = 3) -> Tensor:
        side = image_size(self.model)
        pixels = torch.rand(batch_size, 3, side, side, generator=torch.Generator().manual_seed(0))
        return (pixels * 255).to(torch.uint8) if self.request.input == "uint8" else pixels


def image_size(model: PixelModel) -> int:
    """S of a network as it is built."""
    patches = getattr(model.net, "patch_embed", None)
    size = getattr(patches, "img_size", None)
    return int(size[0] if size else as_classifier(model.net).pretrained_cfg["input_size"][-1])


def as_answer(servable: nn.Module, device: str = "cpu") -> Answer:
    """Moves `servable` to the device."""
    servable.to(device)

    def answer(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return servable(images.to(device)).cpu()

    return answer
