"""Networks as directories that `timm.create_model("local-dir:PATH", pretrained=True)` loads."""

from pathlib import Path

import timm
from torch import nn

from ..staging import refuse_existing, staged

MARK = "config.json"


def check_target(out: Path, overwrite: bool) -> None:
    """Raises ValueError, before any work, where `save` would refuse to write."""
    refuse_existing(out, overwrite, MARK)


def save(net: nn.Module, out: Path, overwrite: bool = False) -> None:
    """Writes config.json and model.safetensors; `out` appears when both are complete.

    Raises ValueError: `out` exists, and overwrite is False or it is not such a directory.
    """
    with staged(out, overwrite, MARK) as work:
        timm.models.save_for_hf(net, str(work), safe_serialization=True)
