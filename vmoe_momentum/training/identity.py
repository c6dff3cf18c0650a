"""What a checkpoint says of its network beyond the tensors, and the refusal to load it into another one.

State dicts of different momentum rules are identical: without this, testing a HeavyBall checkpoint under a Residual
config would silently give a wrong number.
"""

from typing import Any

import torch
from torch import nn

from ..models.saved import KEY, build_arguments, completed_settings
from ..specs import describe


def describe_network(net: nn.Module) -> dict[str, Any]:
    """What it is, and how it is built again where that is known."""
    config = getattr(net, "pretrained_cfg", None) or {}
    return {
        "architecture": config.get("architecture") or type(net).__name__,
        "model_args": build_arguments(net),
        "settings": getattr(net, "function_settings", dict)(),
    }


def check_checkpoint(module: nn.Module, checkpoint: dict[str, Any], ours: dict[str, Any], override: bool) -> None:
    """ours: the module's facts. Raises ValueError naming every setting that differs, or the tensors that do not fit."""
    saved = checkpoint.get(KEY)
    if saved is None:
        raise ValueError("ckpt_path: not written by vmoe-momentum fit (no model settings in it)")
    saved = {**saved, "settings": completed_settings(saved.get("settings") or {})}
    differences = [*_differences("", saved, ours), *_other_order(saved.get("class_ids"), ours.get("class_ids"))]
    sizes = [line for line in differences if line.startswith(_SIZES)]
    if sizes or (differences and not override):
        way_out = "use the config it was trained with" + ("" if sizes else ", or --override-model to load it anyway")
        raise ValueError(f"ckpt_path: the checkpoint does not match this config: {'; '.join(differences)}; {way_out}")
    _check_tensors(module, checkpoint["state_dict"])


def _other_order(saved: list[str] | None, ours: list[str] | None) -> list[str]:
    """A folder that is one class in the checkpoint and another one in the data; both may have folders of their own."""
    known = {name: place for place, name in enumerate(saved or [])}
    moved = [(name, k) for k, name in enumerate(ours or []) if known.get(name, k) != k]
    return [f"class_ids: folder {name} is class {known[name]}, in the data {k}" for name, k in moved[:1]]


def _check_tensors(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    ours = module.state_dict()
    wrong = [f"{name} missing" for name in ours.keys() - tensors.keys()]
    wrong += [f"{name} unknown" for name in tensors.keys() - ours.keys()]
    wrong += [
        f"{name} {list(tensors[name].shape)} for {list(ours[name].shape)}"
        for name in ours.keys() & tensors.keys()
        if tensors[name].shape != ours[name].shape
    ]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(
            f"ckpt_path: {len(wrong)} tensors do not fit the network: {', '.join(sorted(wrong)[:5])}{more}; "
            "use the config it was trained with"
        )


_SIZES = ("architecture", "num_classes", "image_size", "vocab_size", "vocabulary")
_MAY_DIFFER = ("class_ids", "class_names", "class_path", "crop_pct", "eval_image_size", "model_args", "upright")


def _differences(prefix: str, saved: Any, ours: Any) -> Any:
    """Lines `setting: checkpoint X, config Y`. Class names and folders, crop and build arguments may differ."""
    is_spec = isinstance(saved, dict) and isinstance(ours, dict) and "class_path" in saved and "class_path" in ours
    if is_spec and saved["class_path"] != ours["class_path"]:
        yield f"{prefix}: checkpoint {describe(saved)}, config {describe(ours)}"
    elif isinstance(saved, dict) and isinstance(ours, dict):
        for key in {**saved, **ours}:
            if key in _MAY_DIFFER:
                continue
            name = prefix if key in ("settings", "init_args") else f"{prefix}.{key}".lstrip(".")
            yield from _differences(name, saved.get(key), ours.get(key))
    elif saved != ours:
        yield f"{prefix}: checkpoint {saved}, config {ours}"
