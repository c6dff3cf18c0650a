"""Which weights are exported: of which checkpoint, averaged or as the optimizer left them."""

from pathlib import Path
from typing import Any, NamedTuple

from ..models import PixelModel
from ..models.saved import open_saved
from .asked import Pick, Weights


class Chosen(NamedTuple):
    """A network with its weights, in eval mode, and where they come from."""

    model: PixelModel
    facts: dict[str, Any]  # as a module's `facts` wrote them
    told: dict[str, Any]  # file, epoch, step, weights
    file: Path  # where the weights lie
    folder: Path  # of the run's log


def choose(ckpt_path: str, weights: Weights = "auto", pick: Pick | None = None, trust_pickle: bool = False) -> Chosen:
    """ckpt_path: a .ckpt of fit, the folder of a run (pick says which of its checkpoints), or local-dir:PATH.

    weights: averaged are those of EMAWeightAveraging and its like, raw those it averages over; auto takes the averaged
    ones where there are any. trust_pickle: read a checkpoint that holds more than tensors and plain data; what it holds
    may then run any code. Raises ValueError, FileNotFoundError: no such file or weights, not ours, damaged.
    """
    if "://" in ckpt_path:
        raise ValueError(f"--ckpt_path={ckpt_path}: local files only; download it first")
    source = str(_pick(Path(ckpt_path), pick)) if Path(ckpt_path).is_dir() else ckpt_path
    if pick is not None and source == ckpt_path:
        raise ValueError(f"--pick={pick}: says which checkpoint of a folder; --ckpt_path={ckpt_path} names one already")
    saved = open_saved(source, trust_pickle)
    if weights == "averaged" and not saved.averaged:
        raise ValueError(f"--weights=averaged: {source} has none; leave it out, or train with EMAWeightAveraging")
    raw = weights == "raw" and saved.averaged
    model = saved.build(raw)
    kind = "raw" if raw else ("averaged" if saved.averaged else "as trained, not averaged")
    place = Path(source.removeprefix("local-dir:"))
    told: dict[str, Any] = {"file": place.name, "weights": kind}
    file = place / "model.safetensors"
    if saved.epoch is not None:
        told, file = {**told, "epoch": saved.epoch, "step": saved.step}, place
    folder = place.parent.parent if place.parent.name == "checkpoints" else place.parent
    facts = {**saved.facts, "eval_image_size": None}  # programs have one size: the one trained at
    return Chosen(model, facts, told, file, folder)


def _pick(folder: Path, pick: Pick | None) -> Path:
    """`best.ckpt` or `last.ckpt` of a run, as the configs name them."""
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    found = sorted(path.name for path in inside.glob("*.ckpt"))
    if not found:
        raise FileNotFoundError(f"--ckpt_path={folder}: no checkpoints in it; name a .ckpt, or local-dir:{folder}")
    name = f"{pick or 'best'}.ckpt"
    if name not in found:
        raise FileNotFoundError(f"--ckpt_path={folder}: no {name} in it; name one: {', '.join(found[:10])}")
    return inside / name
