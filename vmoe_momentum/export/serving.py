"""Exported folders opened again, whatever their format: pictures in, classes out."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..models import PixelModel
from ..models.saved import open_saved
from ..robustness import View
from ..robustness.pictures import as_tensor, crop, decode, fit
from .base import Answer, Metadata
from .exporting import MARK, wanted_view
from .formats import FORMATS

SMALL = 64  # pictures below are shown whole, as evaluation does


class Served(NamedTuple):
    """Something that classifies."""

    answer: Answer
    metadata: Metadata
    folder: Path

    def pixels(self, path: Path) -> Tensor:
        """uint8 [3, S, S], cut as evaluation cuts it. Raises ValueError: no picture."""
        picture, wanted = decode(path), wanted_view(self.metadata)
        return as_tensor(fit(picture, wanted) if min(picture.size) < SMALL else crop(picture, wanted))

    def probabilities(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, S, S] -> [B, K]."""
        found = self.answer(pixels if self.metadata["input"] == "uint8" else pixels.float() / 255)
        return found if self.metadata["output"] == "probabilities" else found.float().softmax(dim=-1)

    def network(self) -> PixelModel:
        """For pictures of experts. Raises ValueError: the format keeps no network."""
        kind = self.metadata["format"]
        if not FORMATS[kind].keeps_network:
            raise ValueError(
                f"--plot: {kind} files keep no experts to look at; export with --to hf or state-dict for this picture"
            )
        return open_saved(f"local-dir:{self.folder}").build() if kind == "hf" else _network(self)


def _network(served: Served) -> PixelModel:
    from .state_dict import open_network

    return open_network(served.folder, served.metadata)


def open_served(folder: str) -> Served:
    """Raises FileNotFoundError, ValueError: no such folder, not ours, damaged."""
    place = Path(folder)
    if "://" in folder or not place.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; give one that vmoe-momentum export wrote")
    try:
        metadata = json.loads((place / MARK).read_text())
        form, _ = (
            FORMATS[metadata["format"]],
            View(metadata["image_size"], metadata["crop_pct"], metadata["interpolation"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: no {MARK} of vmoe-momentum export in it ({error}); export it again") from error
    return Served(form.open(place, metadata), metadata, place)


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
