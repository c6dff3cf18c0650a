"""From a checkpoint to a folder that can be served: write, read back, compare, and only then take the name."""

import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from ..analysis.logs import read_log
from ..classifiers import view_of
from ..files.checksums import FILES, listed, sha256
from ..files.staging import refuse_existing, staged
from ..models.networks import as_classifier
from ..progress import track
from ..ranges import COUNT, in_range
from ..robustness import View, list_pictures
from ..robustness.pictures import Pictures, batches
from ..robustness.versions import versions
from .asked import Pick, Request, Weights
from .base import Metadata
from .formats import FORMATS
from .round_trip import check, round_trip
from .weights import Chosen, choose

MARK = "metadata.json"


@in_range("--", limit=COUNT)
def export(
    ckpt_path: str,
    to: str,
    out: str,
    data: str,
    request: Request | None = None,
    weights: Weights = "auto",
    pick: Pick | None = None,
    scores: str | None = None,
    limit: int = 1000,
    overwrite: bool = False,
    trust_pickle: bool = False,
    device: str = "cpu",
) -> Metadata:
    """Writes the folder `out` and gives its metadata.

    data: labelled pictures, ROOT/val/CLASS/* or ROOT/CLASS/*; at most `limit` of them, 1 to 1e9, are compared on.
    scores: log folder of a `test` run, for the card and the metadata. device: what computes the comparison; files are
    the same, and run anywhere. The other arguments: weights.choose.
    Raises ValueError, FileNotFoundError: a setting that means nothing, damaged files, an export unlike its network.
    """
    if to not in FORMATS:
        raise ValueError(f"--to={to}: use one of {', '.join(FORMATS)}")
    form, place, request = FORMATS[to], Path(out), request or Request()
    if request.precision not in form.precisions:
        raise ValueError(f"--precision={request.precision}: {to} knows {', '.join(form.precisions)}; use --to onnx")
    refuse_existing(place, overwrite, MARK)
    measured = {} if scores is None else _scores(scores)
    chosen = choose(ckpt_path, weights, pick, trust_pickle)
    metadata = describe(chosen, to, request, measured)
    pixels, labels = load_pictures(data, chosen, limit)
    try:
        with staged(place, overwrite, MARK) as work:
            metadata |= form.write(chosen.model, work, request, metadata)
            written = listed(work, metadata)
            (work / MARK).write_text(json.dumps(written, indent=1) + "\n")  # opened as anybody would, checksums and all
            answer = form.open(work, metadata, device)
            found = round_trip(chosen.model, answer, pixels, labels, request, work, device)
            check(found, request.precision, to)
            metadata = listed(work, {**metadata, "round_trip": found._asdict()}, written[FILES])
            (work / MARK).write_text(json.dumps(metadata, indent=1) + "\n")
    except (OSError, SafetensorError) as error:
        told = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"--out={out}: cannot be written ({told}); nothing is left of it") from error
    return metadata


def describe(chosen: Chosen, to: str, request: Request, scores: dict[str, float]) -> Metadata:
    """What a reader of the folder needs: how to prepare pictures, what comes out, where it comes from."""
    model, view = chosen.model, view_of(chosen.model.net, chosen.facts)
    network = {name: chosen.facts.get(name) for name in ("architecture", "model_args", "settings")}
    network |= {"num_classes": model.net.num_classes, "image_size": view.size}
    network |= model.constants
    return {
        "vmoe_momentum_export": 1, "format": to, **request._asdict(), "image_size": view.size,
        "crop_pct": view.crop_pct, "interpolation": view.interpolation, "upright": view.upright,
        "mean": network["mean"], "std": network["std"],
        "normalisation": "inside" if to in ("pt2", "onnx") else "to be done by the caller, with mean and std",
        "class_names": chosen.facts.get("class_names"), "class_ids": chosen.facts.get("class_ids"),
        "network": network, "scores": scores,
        "source": {**chosen.told, "sha256": sha256(chosen.file)},
        "parameters": sum(parameter.numel() for parameter in model.net.parameters()),
        "recipe": _recipe(chosen.folder), "data": _data(chosen.folder), "versions": versions(),
        "exported": time.strftime("%Y-%m-%d"),
    }  # fmt: skip


def load_pictures(data: str, chosen: Chosen, limit: int) -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, S, S] and labels [N], spread over the set."""
    names, ids = (chosen.facts.get(key) for key in ("class_names", "class_ids"))
    num_classes = as_classifier(chosen.model.net).num_classes
    listing = list_pictures(Path(data), names, num_classes, "--data", ids)
    count = min(limit, len(listing.paths))
    order = [i * len(listing.paths) // count for i in range(count)]
    view = view_of(chosen.model.net, chosen.facts)
    found = list(
        track(batches(Pictures("data", listing.paths, listing.labels), [view], 64, 0, None, order), "reading pictures")
    )
    return torch.cat([batch.views[view] for batch in found]), torch.cat([batch.labels for batch in found])


def wanted_view(metadata: Metadata) -> View:
    """How an export wants its pictures."""
    return View(
        metadata["image_size"], metadata["crop_pct"], metadata["interpolation"], bool(metadata.get("upright", False))
    )


def _scores(folder: str) -> dict[str, float]:
    log = read_log(folder)
    found = {name: values[-1] for name, values in log.items() if name in ("test/top1", "test/top5", "test/loss")}
    if not found:
        raise ValueError(f"--scores={folder}: no test/top1 in its log; give the log folder of a `test` run")
    return found


def _config(folder: Path) -> dict[str, Any]:
    """config.yaml that fit left beside its checkpoints; empty where there is none."""
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def _recipe(folder: Path) -> dict[str, Any]:
    """What is worth telling of a training, without the places of files."""
    config = _config(folder)
    model, trainer = config.get("model") or {}, config.get("trainer") or {}
    wanted = ("loss", "label_smoothing", "mixup", "cutmix", "aux_loss_weight", "optimizer", "schedule")
    found = {name: model[name] for name in wanted if name in model}
    return found | {name: trainer[name] for name in ("max_epochs", "precision") if trainer.get(name) is not None}


def _data(folder: Path) -> str | None:
    """Name of the folder of the training data."""
    root = ((_config(folder).get("data") or {}).get("init_args") or {}).get("root")
    return Path(root).name if root else None
