"""The networks an instrument looks at: `[LABEL=]PATH`, a checkpoint of fit, a folder of them, or local-dir:PATH."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from ..models.pixels import Wrapped
from ..models.saved import Saved, open_saved, read_checkpoint


class Subject(NamedTuple):
    label: str
    saved: Saved

    @property
    def epoch(self) -> int | None:
        return self.saved.epoch

    @property
    def step(self) -> int | None:
        return self.saved.step

    @property
    def name(self) -> str:
        """For pictures that show several epochs of one label."""
        return self.label if self.epoch is None else f"{self.label}, epoch {self.epoch}"

    def build(self, device: str = "cpu") -> Wrapped:
        return self.saved.build().to(device)


def open_subjects(
    models: list[str], check: Callable[[Saved], None], opened: Callable[[str], Saved] = open_saved
) -> list[Subject]:
    """Everything that `models` names, checked before anything is computed; by label, then epoch.

    check: raises ValueError where the network is not one for the data. opened: what reads a file.

    A label may be given several times, for the epochs of one run; other networks need labels of their own. Left out, it
    is the name of the rule. Raises FileNotFoundError and ValueError: nothing there, no MoE layers, weights that do not
    fit, a label that means two networks.
    """
    if not models:
        raise ValueError("--model: none given; use --model runs/.../last.ckpt, or --model LABEL=PATH several times")
    subjects: list[Subject] = []
    known: dict[tuple[str, int | None], str] = {}
    for text in models:
        label, source = split_label(text)
        for saved in _open(source, opened):
            check(saved)
            subject = Subject(label or _rule(saved), saved)
            other = known.setdefault((subject.label, subject.epoch), saved.source)
            if len(subjects) and (other != saved.source or any(s.saved.source == saved.source for s in subjects)):
                raise ValueError(
                    f"--model: {other} and {saved.source} are both {subject.name}; give each network a label of "
                    f"its own, as --model first={saved.source}"
                )
            subjects.append(subject)
    order = list(dict.fromkeys(subject.label for subject in subjects))
    for label in order:
        settings = {json.dumps(s.saved.facts["settings"], sort_keys=True): s for s in subjects if s.label == label}
        if len(settings) > 1:
            first, second = (subject.saved.source for subject in list(settings.values())[:2])
            raise ValueError(
                f"--model: {first} and {second} are different networks, both called {label}; give two labels"
            )
    _check_weights(subjects)
    return sorted(subjects, key=lambda subject: (order.index(subject.label), subject.epoch or 0))


def _check_weights(subjects: list[Subject]) -> None:
    """Each kind of network is built once, and every checkpoint's tensors held against it."""
    shapes: dict[str, dict[str, torch.Size]] = {}
    for subject in subjects:
        if subject.epoch is None:
            continue
        kind = json.dumps(subject.saved.facts, sort_keys=True)
        if kind not in shapes:
            shapes[kind] = {f"model.{name}": value.shape for name, value in subject.saved.build().state_dict().items()}
        tensors = read_checkpoint(Path(subject.saved.source))["state_dict"]
        if {name: value.shape for name, value in tensors.items()} != shapes[kind]:
            raise ValueError(f"--model={subject.saved.source}: its tensors do not fit the network it describes")


def latest(subjects: list[Subject]) -> list[Subject]:
    """One subject a label, the one trained longest."""
    return list({subject.label: subject for subject in subjects}.values())


def split_label(text: str) -> tuple[str, str]:
    """`LABEL=PATH` or `PATH`; the label is empty where none is given. Raises ValueError: one that cannot be drawn."""
    label, equals, path = text.partition("=")
    if not equals or text.startswith("local-dir:") or Path(text).exists():
        return "", text
    if not re.fullmatch(r"(?!_)[\w.+#(), -]+", label):
        raise ValueError(f"{text}: in LABEL=PATH a label is of letters, digits, spaces and any of . + - # ( ) , _")
    return label, path


def labelled(texts: list[str], setting: str) -> list[tuple[str, str]]:
    """(label, folder) of `[LABEL=]FOLDER` each; without a label the end of the folder's name that tells it apart.

    Raises ValueError: a folder given twice.
    """
    pairs = [split_label(text) for text in texts]
    places = [str(Path(folder).resolve()) for _, folder in pairs]
    if len(set(places)) < len(places):
        twice = next(folder for (_, folder), place in zip(pairs, places, strict=True) if places.count(place) > 1)
        raise ValueError(f"{setting}={twice}: given twice; it would count as two runs")
    found = []
    for label, folder in pairs:
        parts = Path(folder).resolve().parts
        others = [Path(other).resolve().parts for given, other in pairs if not given and other != folder]
        length = next(
            (n for n in range(2, len(parts)) if all(parts[-n:] != other[-n:] for other in others)), len(parts)
        )
        found.append((label or "/".join(parts[-length:]).replace("$", ""), folder))
    return found


def _open(source: str, opened: Callable[[str], Saved]) -> list[Saved]:
    path = Path(source)
    if not path.is_dir():
        return [opened(source)]
    found = sorted(path.glob("*.ckpt"))
    if not found:
        raise FileNotFoundError(f"--model={source}: no .ckpt in this folder")
    by_step = {saved.step: saved for saved in map(opened, map(str, found))}  # best and last repeat one
    kinds = {json.dumps(saved.facts["settings"], sort_keys=True) for saved in map(opened, map(str, found))}
    if len(kinds) > 1:
        raise ValueError(f"--model={source}: checkpoints of different networks in one folder; name them one by one")
    return list(by_step.values())


def check_classifier(saved: Saved, image_size: int, num_classes: int | None = None) -> None:
    """Raises ValueError: no MoE layers, pictures of another size or number of classes than the data's."""
    if not saved.facts["settings"].get("moe_layers"):
        raise ValueError(f"--model={saved.source}: this network has no MoE layers, so there is nothing to look at")
    if saved.facts["image_size"] != image_size:
        raise ValueError(
            f"--data.image_size={image_size}: {saved.source} takes {saved.facts['image_size']} pixels; use that"
        )
    classes = saved.facts["num_classes"]
    if num_classes is not None and saved.epoch is not None and classes != num_classes:
        raise ValueError(f"--data: {num_classes} classes, but {saved.source} was trained on {classes}")


def _rule(saved: Saved) -> str:
    return saved.facts["settings"]["rule"]["class_path"]
