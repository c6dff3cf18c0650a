"""Networks as they lie in checkpoints of `fit`: read without running code, rebuilt without the config."""

import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import get_model_args, is_model
from torch import nn

from ..files.checksums import verify_archive, verify_folder
from ..moe import Router
from ..momentum import MomentumRule
from ..specs import completed
from .directory import as_json, read_facts
from .factory import create_model
from .loading import fit_to_data
from .networks import as_classifier
from .pixels import PixelModel, Wrapped
from .sharded import is_checkpoint, is_sharded, read_rest, read_sharded

KEY = "vmoe_momentum"
RAW = "current_model_state"  # where Lightning's weight averaging keeps what it averages over


class Saved(NamedTuple):
    """What a checkpoint says of its network; `build` of a subclass makes it."""

    source: str
    facts: dict[str, Any]  # as a module's `facts` wrote them
    epoch: int | None  # finished epochs; None for directories, which do not say
    step: int | None
    averaged: bool = False  # the weights are a running average (EMAWeightAveraging), kept beside the raw ones
    trust_pickle: bool = False

    def build(self, raw: bool = False) -> Wrapped:
        """The network with its weights, in eval mode, on the CPU. raw: not the averaged ones, where there are both.

        Raises ValueError: it cannot be rebuilt, or its tensors do not fit.
        """
        raise NotImplementedError

    def load_into(self, model: nn.Module, raw: bool) -> None:
        """The checkpoint's weights of what `fit` called `model`. Raises ValueError: its tensors do not fit."""
        checkpoint = read_checkpoint(Path(self.source), trust_pickle=self.trust_pickle)
        tensors = checkpoint[RAW if RAW in checkpoint and (raw or not self.averaged) else "state_dict"]
        try:  # a compiled network of another program may have put its prefix in
            model.load_state_dict(
                {name.removeprefix("model.").replace("_orig_mod.", ""): value for name, value in tensors.items()}
            )
        except RuntimeError as error:
            raise ValueError(f"{self.source}: its tensors do not fit the network it describes ({error})") from error


class SavedNetwork(Saved):
    """Of an image classifier."""

    def build(self, raw: bool = False) -> PixelModel:
        if self.epoch is None:
            return PixelModel(create_model(self.source)).eval()
        model = rebuild(self.source, self.facts)
        self.load_into(model, raw)
        return model.eval()


def open_saved(source: str, trust_pickle: bool = False) -> SavedNetwork:
    """A `.ckpt` that fit wrote, or "local-dir:PATH". trust_pickle: let a checkpoint run code.

    Raises FileNotFoundError: no such file; ValueError: not readable, or not ours.
    """
    if source.startswith("local-dir:"):
        net = create_model(source)
        settings: dict[str, Any] = getattr(net, "function_settings", dict)()
        patches = getattr(net, "patch_embed", None)
        config, num_classes = as_classifier(net).pretrained_cfg, as_classifier(net).num_classes
        size = config["input_size"][-1] if patches is None else patches.img_size[0]
        facts = {
            "architecture": (config or {}).get("architecture") or type(net).__name__, "settings": settings,
            "model_args": build_arguments(net), "num_classes": num_classes, "image_size": size,
            **read_facts(Path(source.partition(":")[2]), num_classes),
        }  # fmt: skip
        return SavedNetwork(source, facts, None, None)
    path = Path(source)
    if not is_checkpoint(path):
        raise FileNotFoundError(f"{source}: no such file; give a .ckpt that fit wrote, or local-dir:PATH")
    checkpoint = read_checkpoint(path, trust_pickle=trust_pickle)
    told = (checkpoint["epoch"] + 1, checkpoint["global_step"], _is_averaged(checkpoint), trust_pickle)
    facts = {**checkpoint[KEY], "settings": completed_settings(checkpoint[KEY]["settings"])}
    if "vocab_size" in facts:
        raise ValueError(f"{source}: holds a language model, and this is for image classifiers; give one of these")
    return SavedNetwork(source, facts, *told)


def read_checkpoint(path: Path, setting: str = "", trust_pickle: bool = False, tensors: bool = True) -> dict[str, Any]:
    """Raises ValueError unless `path` is a whole, undamaged checkpoint of ours; runs no code, unless trust_pickle.

    setting: the name to blame, as "ckpt_path=". Tensors are mapped, not copied; those that devices wrote together are
    read, or with `tensors` False only verified.
    """
    sharded = is_sharded(path)
    if sharded:
        verify_folder(path, setting)
    else:
        verify_archive(path, setting)
    try:
        if sharded:
            checkpoint = read_sharded(path) if tensors else read_rest(path)
        else:
            mapped = zipfile.is_zipfile(path)
            checkpoint = torch.load(path, weights_only=not trust_pickle, map_location="cpu", mmap=mapped)
    except Exception as error:  # whatever the bytes of another file make of the reader
        raise ValueError(
            f"{setting}{path}: not a checkpoint that can be read safely ({str(error).split('.')[0]}); it is cut off, "
            "of another program, or holds code, which is never run; give a .ckpt that fit wrote"
        ) from error
    if not isinstance(checkpoint, dict) or not _is_whole(checkpoint):
        raise ValueError(
            f"{setting}{path}: not written by vmoe-momentum fit (no model settings in it); give a .ckpt that fit wrote"
        )
    return checkpoint


def completed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What function_settings wrote, with the defaults of settings that have come since."""
    bases = {"rule": MomentumRule, "router": Router}
    later = {"post_norm": "none"} if "moe_layers" in settings else {}
    return {**later, **{name: completed(v, bases[name]) if name in bases else v for name, v in settings.items()}}


def _is_whole(checkpoint: dict[str, Any]) -> bool:
    facts = checkpoint.get(KEY)
    kinds: dict[str, type] = {"architecture": str, "settings": dict}
    if isinstance(facts, dict) and "vocab_size" in facts:
        kinds |= {"vocab_size": int, "model_args": dict}
    else:
        kinds |= {"num_classes": int, "image_size": int, "mean": list, "std": list}
    parts = {"state_dict": dict, "epoch": int, "global_step": int}
    return isinstance(facts, dict) and all(
        isinstance(place.get(name), kind) for place, wanted in ((facts, kinds), (checkpoint, parts))
        for name, kind in wanted.items()
    )  # fmt: skip


def _is_averaged(checkpoint: dict[str, Any]) -> bool:
    """False also where averaging had not begun yet."""
    return RAW in checkpoint and int(checkpoint.get("averaging_state", {}).get("n_averaged", 1)) > 0


def build_arguments(net: nn.Module) -> dict[str, Any] | None:
    """What timm's factory was told, as JSON; None where that cannot be said, as for networks of other makers."""
    config = getattr(net, "pretrained_cfg", None) or {}
    if not is_model(config.get("architecture") or ""):
        return None
    arguments = get_model_args(net, as_json(net))
    try:
        return json.loads(json.dumps(arguments))
    except (TypeError, ValueError):
        return None


def rebuild(source: str, facts: dict[str, Any]) -> PixelModel:
    """The network that `facts` describe, freshly initialised. Raises ValueError: it cannot be built."""
    if "model_args" not in facts:
        raise ValueError(
            f"{source}: written by a version that did not yet store how to build the network; load it with `test`, or "
            "train again"
        )
    arguments, architecture = facts["model_args"], facts["architecture"]
    if arguments is None:
        raise ValueError(
            f"{source}: its network ({architecture}) was not made by timm's factory, so it cannot be rebuilt "
            "from the checkpoint alone; use vmoe_momentum.create_model in the config it is trained with"
        )
    try:
        net = timm.create_model(architecture, pretrained=False, **{**arguments, "num_classes": facts["num_classes"]})
        fit_to_data(net, facts["num_classes"], facts["image_size"])
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"{source}: timm cannot build its network, {architecture} ({error})") from error
    model = PixelModel(net)
    model.set_constants(facts["mean"], facts["std"])
    return model
