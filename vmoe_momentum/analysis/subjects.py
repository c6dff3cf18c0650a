"""The networks an instrument looks at: `[LABEL=]PATH`, a checkpoint of fit, a folder of them, or local-dir:PATH."""

from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

from ..models import PixelModel
from ..models.saved import SavedNetwork, open_saved


class Subject(NamedTuple):
    label: str
    saved: SavedNetwork

    @property
    def epoch(self) -> int | None:
        return self.saved.epoch

    @property
    def name(self) -> str:
        """For pictures that show several epochs of one label."""
        return self.label if self.epoch is None else f"{self.label}, epoch {self.epoch}"

    def build(self, device: str = "cpu") -> PixelModel:
        return self.saved.build().to(device)


def open_subjects(models: list[str], image_size: int) -> list[Subject]:
    """Everything that `models` names, checked before anything is computed; by label, then epoch.

    A label may be given many times, for the epochs of a run or the seeds of a rule. Left out, it is the name of the
    rule. Raises FileNotFoundError and ValueError: nothing there, no MoE layers, another image size than the data's.
    """
    if not models:
        raise ValueError("--model: none given; use --model runs/.../last.ckpt, or --model LABEL=PATH several times")
    subjects, unlabelled = [], defaultdict(list)
    for text in models:
        label, source = split_label(text)
        for saved in _open(source):
            _check(saved, image_size)
            if not label:
                unlabelled[_rule(saved)].append(text)
            subjects.append(Subject(label or _rule(saved), saved))
    for label, texts in unlabelled.items():
        if len(set(texts)) > 1:
            raise ValueError(
                f"--model: {' and '.join(texts)} are both {label}; give labels, as --model first={texts[0]}"
            )
    order = list(dict.fromkeys(subject.label for subject in subjects))
    return sorted(subjects, key=lambda subject: (order.index(subject.label), subject.epoch or 0))


def latest(subjects: list[Subject]) -> list[Subject]:
    """One subject a label, the one trained longest."""
    return list({subject.label: subject for subject in subjects}.values())


def split_label(text: str) -> tuple[str, str]:
    """`LABEL=PATH` or `PATH`; the label is empty where none is given."""
    label, equals, path = text.partition("=")
    return (label, path) if equals and "/" not in label else ("", text)


def labelled(texts: list[str]) -> list[tuple[str, str]]:
    """(label, folder) of `[LABEL=]FOLDER` each; without a label the last two names of the folder."""
    pairs = [split_label(text) for text in texts]
    return [(label or "/".join(Path(folder).parts[-2:]), folder) for label, folder in pairs]


def check_device(device: str) -> None:
    """Raises ValueError: this machine has no such device."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={device}: not on this machine; use cpu") from error


def _open(source: str) -> list[SavedNetwork]:
    path = Path(source)
    if not path.is_dir():
        return [open_saved(source)]
    found = sorted(path.glob("*.ckpt"))
    if not found:
        raise FileNotFoundError(f"--model={source}: no .ckpt in this folder")
    by_epoch = {saved.epoch: saved for saved in map(open_saved, map(str, found))}  # last.ckpt repeats an epoch
    return list(by_epoch.values())


def _check(saved: SavedNetwork, image_size: int) -> None:
    if not saved.facts["settings"].get("moe_layers"):
        raise ValueError(f"--model={saved.source}: this network has no MoE layers, so there is nothing to look at")
    if saved.facts["image_size"] != image_size:
        raise ValueError(
            f"--data.image_size={image_size}: {saved.source} takes {saved.facts['image_size']} pixels; use that"
        )


def _rule(saved: SavedNetwork) -> str:
    return saved.facts["settings"]["rule"]["class_path"]
