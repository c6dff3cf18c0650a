"""Networks as directories that `timm.create_model("local-dir:PATH", pretrained=True)` loads."""

import json
from pathlib import Path
from typing import Any

import timm
from torch import nn

from ..files.checksums import seal_folder
from ..files.staging import refuse_existing, staged
from ..specs import to_spec
from .vit import MomentumVisionTransformer

MARK = "config.json"


def check_target(out: Path, overwrite: bool) -> None:
    """Raises ValueError, before any work, where `save` would refuse to write."""
    refuse_existing(out, overwrite, MARK)


def save(net: nn.Module, out: Path, overwrite: bool = False) -> None:
    """Writes config.json, model.safetensors and checksums.json; `out` appears when all are complete.

    Raises ValueError: `out` exists, and overwrite is False or it is not such a directory.
    """
    with staged(out, overwrite, MARK) as work:
        timm.models.save_for_hf(net, str(work), model_args=as_json(net), safe_serialization=True)
        seal_folder(work)


def read_facts(folder: Path, num_classes: int) -> dict[str, Any]:
    """class_names, class_ids (names of folders) and upright (see ../pictures.py) of a directory that export wrote.

    None for names where it does not say.
    """
    config = json.loads((folder / MARK).read_text())
    told = {
        "class_names": (config.get("pretrained_cfg") or {}).get("label_names") or config.get("label_names"),
        "class_ids": config.get("class_ids"),
    }
    found = {key: list(v) if isinstance(v, list) and len(v) == num_classes else None for key, v in told.items()}
    return {**found, "upright": bool(config.get("upright", False))}


def as_json(net: nn.Module) -> dict[str, Any]:
    """The settings objects among timm's record of the arguments, which may be objects."""
    if not isinstance(net, MomentumVisionTransformer):
        return {}
    return {"rule": to_spec(net.rule), "router": net.router_spec}
