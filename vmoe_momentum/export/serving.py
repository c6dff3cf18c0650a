"""Exported folders opened again, whatever their format: pictures in, classes out."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..files.checksums import verify_folder
from ..models import PixelModel
from ..pictures import read_picture
from ..robustness.pictures import as_tensor, show
from .base import Answer, Metadata
from .exporting import MARK, wanted_view
from .formats import FORMATS


class Served(NamedTuple):
    """Something that classifies."""

    answer: Answer
    metadata: Metadata
    folder: Path
    device: str = "cpu"

    def pixels(self, path: Path) -> Tensor:
        """uint8 [3, S, S], cut as evaluation cuts it. Raises ValueError: no picture."""
        view = wanted_view(self.metadata)
        return as_tensor(show(read_picture(path, view.upright), view))

    def probabilities(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> [B, K]."""
        found = self.answer(pixels if self.metadata["input"] == "uint8" else pixels.float() / 255)
        return found if self.metadata["output"] == "probabilities" else found.float().softmax(dim=-1)

    def network(self) -> PixelModel:
        """For pictures of experts. Raises ValueError: the format keeps no network."""
        kind = self.metadata["format"]
        opened = FORMATS[kind].open_network
        if opened is None:
            raise ValueError(
                f"--plot: {kind} files keep no experts to look at; export with --to hf or state-dict for this picture"
            )
        return opened(self.folder, self.metadata).to(self.device)


def open_served(folder: str, trust_program: bool = False, device: str = "cpu") -> Served:
    """trust_program: open formats that are programs. device: what computes, if the format can.

    Raises FileNotFoundError, ValueError: no such folder, not ours, damaged, a program.
    """
    place = Path(folder)
    if "://" in folder or not place.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give one that vmoe-momentum export wrote")
    try:
        metadata = json.loads((place / MARK).read_text())
        form = FORMATS[metadata["format"]]
        text = metadata.get("kind") == "language"
        if not text:
            wanted_view(metadata)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no {MARK} of vmoe-momentum export in it ({error}); export it again") from error
    if text:
        raise ValueError(f"{folder}: a language model, and this is for pictures; its {MARK} says how to run it")
    if form.is_program and not trust_program:
        raise ValueError(
            f"{folder}: a {metadata['format']} file is a program, and opening it runs what its author put into it; add "
            "--trust_program if that was you, or take an export to onnx, hf or state-dict"
        )
    verify_folder(place)
    return Served(form.open(place, metadata, device), metadata, place, device)


def classify(served: Served, paths: list[Path], top_k: int) -> list[list[tuple[str, float]]]:
    """For each picture the likeliest classes, by name where there are names, with their probabilities."""
    pixels = torch.stack([served.pixels(path) for path in paths])
    names = served.metadata["class_names"] or _imagenet(served.metadata["network"]["num_classes"])
    found = []
    for row in served.probabilities(pixels):
        best = row.topk(min(top_k, len(row)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found.append([(names[k] if names else str(k), value) for k, value in pairs])
    return found


def _imagenet(num_classes: int) -> list[str] | None:
    if num_classes != 1000:
        return None
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(k) for k in range(1000)]
