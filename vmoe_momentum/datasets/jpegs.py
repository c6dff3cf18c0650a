"""JPEG files decoded by torchvision: faster than by Pillow, which has to look at them in every other case."""

from __future__ import annotations

from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import torch
import torchvision.io  # noqa: F401 (registers torch.ops.image)
from PIL import Image

from ..pictures import is_turned, read_picture

Decoder = Literal["pillow", "torchvision"]
_AS_STORED = 0  # channels


def read_fast(path: Path, upright: bool = False) -> torch.Tensor | Image.Image:
    """uint8 [3, H, W] of a JPEG of three channels; of all else, and of one to be turned, what `read_picture` gives.

    It also is who says what is wrong with a file. Raises UnreadablePicture.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\xff\xd8") and not (upright and is_turned(content)):
            pixels = _decode(content)
            if pixels.shape[0] == 3:  # not grey, not CMYK
                return pixels
    except Exception:  # Pillow's reason is one line
        return read_picture(path, upright)
    return read_picture(path, upright, content)


@cache
def require_torchvision_decoder() -> None:
    """Raises ValueError: this torchvision decodes no JPEGs."""
    written = BytesIO()
    Image.new("RGB", (8, 8)).save(written, "JPEG")
    try:
        _decode(written.getvalue())
    except (AttributeError, RuntimeError) as error:
        raise ValueError(
            "data.decoder=torchvision: this torchvision was built without libjpeg; use pillow, or another torchvision"
        ) from error


def _decode(content: bytes) -> torch.Tensor:
    # torchvision.io.decode_jpeg without its warning, which every worker would give
    return torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), _AS_STORED, False)
