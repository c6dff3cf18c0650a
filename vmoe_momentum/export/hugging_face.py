"""timm's directory: config.json, model.safetensors, a model card; for `timm.create_model("local-dir:...")`, the hub."""

from pathlib import Path

import timm

from ..models import PixelModel, create_model
from ..models.directory import as_json
from .asked import Request
from .base import Answer, Format, Metadata, Servable, as_answer, image_size
from .card import write_card

FILE = "model.safetensors"


def write(model: PixelModel, folder: Path, request: Request, metadata: Metadata) -> Metadata:
    net, side = model.net, image_size(model)
    names = metadata["class_names"]
    # timm drops names that belong to another number of classes than it knows of
    config = {} if names is None else {"label_names": names, "num_classes": net.num_classes}
    shown = {
        "input_size": (3, side, side), "mean": metadata["mean"], "std": metadata["std"],
        "crop_pct": metadata["crop_pct"], "interpolation": metadata["interpolation"],
    }  # fmt: skip
    told = {"pretrained_cfg": config, "upright": metadata["upright"]}
    if metadata["class_ids"] is not None:
        told["class_ids"] = metadata["class_ids"]  # timm has no place for names of folders beside names for people
    timm.models.save_for_hf(net, str(folder), told, as_json(net), safe_serialization=True, data_config=shown)
    write_card(folder, metadata)
    return {"file": FILE}


def open_network(folder: Path, metadata: Metadata) -> PixelModel:
    try:
        return PixelModel(create_model(f"local-dir:{folder}")).eval()
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: damaged, or of another network ({error}); export it again") from error


def open_answer(folder: Path, metadata: Metadata, device: str = "cpu") -> Answer:
    asked = Request(metadata["input"], metadata["output"])
    return as_answer(Servable(open_network(folder, metadata), asked), device)


FORMAT = Format(write, open_answer, open_network)
