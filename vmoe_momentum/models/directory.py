"""Networks as directories that `timm.create_model("local-dir:PATH", pretrained=True)` loads."""

from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..staging import refuse_existing, staged
from .settings import to_spec
from .vit import MomentumVisionTransformer

MARK = "config.json"


def check_target(out: Path, overwrite: bool) -> None:
    """Raises ValueError, before any work, where `save` would refuse to write."""
    refuse_existing(out, overwrite, MARK)


def save(net: nn.Module, out: Path, overwrite: bool = False) -> None:
    """Writes config.json and model.safetensors; `out` appears when both are complete.

    Raises ValueError: `out` exists, and overwrite is False or it is not such a directory.
    """
    with staged(out, overwrite, MARK) as work:
        timm.models.save_for_hf(net, str(work), model_args=as_json(net), safe_serialization=True)


def as_json(net: nn.Module) -> dict[str, Any]:
    """The settings objects among timm's record of the arguments, which may be objects."""
    if not isinstance(net, MomentumVisionTransformer):
        return {}
    return {"rule": to_spec(net.rule), "router": net.router_spec}
