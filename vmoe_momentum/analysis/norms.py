"""How large the residual stream, the updates and the momentum are over depth, and over training.

B images, N tokens, D width.
"""

import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .logs import read_log
from .output import Files, grid, show, whole_numbers
from .subjects import Subject, labelled, latest
from .trace import walk

METRICS = {
    "token_norm": "|x|, residual stream after the step",
    "update_norm": "|u|, update",
    "momentum_norm": "|p|, momentum",
    "cosine": "cosine of u and the next u",
}


class NormRow(NamedTuple):
    """One number of one MoE block; mean and standard deviation over tokens."""

    model: str
    epoch: int | None
    block: int
    metric: str  # token_norm, update_norm, momentum_norm; cosine: between u here and at the next MoE block
    mean: float
    std: float


def norms(
    subjects: list[Subject], batches: list[Tensor], files: Files, logs: list[str] | None = None, device: str = "cpu"
) -> list[NormRow]:
    """Measures, writes and draws.

    logs: `[LABEL=]FOLDER` with a metrics.csv of fit, for a second picture of the same norms over training.
    """
    training = {label: read_log(folder) for label, folder in labelled(logs or [], "--logs")}
    if len(training) < len(logs or []):
        raise ValueError(f"--logs={logs}: a label is there twice; one log is one row of pictures")
    for label, columns in training.items():
        if not _curves(columns, "update_norm"):
            raise ValueError(f"--logs={label}: no update_norm of any block was logged there; is it a fit of a V-MoE?")
    rows = []
    for subject in subjects:
        values: dict[tuple[int, str], list[Tensor]] = {}
        for _, visits in walk(subject.build(device), batches, subject.name):
            for visit, following in zip(visits, [*visits[1:], None], strict=True):
                vectors = {"token_norm": visit.x, "update_norm": visit.update, "momentum_norm": visit.momentum}
                found = {name: value.norm(dim=-1) for name, value in vectors.items() if value is not None}
                if following is not None:
                    found["cosine"] = F.cosine_similarity(visit.update, following.update, dim=-1)
                for name, value in found.items():
                    values.setdefault((visit.block, name), []).append(value.flatten().double())
        for (block, name), parts in values.items():
            every = torch.cat(parts)
            rows.append(
                NormRow(subject.label, subject.epoch, block, name, float(every.mean()), float(every.std(correction=0)))
            )
    files.write(rows)
    _draw(files, latest(subjects), rows)
    if training:
        _draw_training(files, training)
    keys = list(dict.fromkeys((row.model, row.epoch, row.block) for row in rows))
    by_key = {(row.model, row.epoch, row.block, row.metric): row.mean for row in rows}
    shown = ("model", "epoch", "block", *METRICS)
    show("Norms", shown, [(*key, *(by_key.get((*key, name), "") for name in METRICS)) for key in keys])
    return rows


def _draw(files: Files, last: list[Subject], rows: list[NormRow]) -> None:
    """Over depth: mean over tokens, band one standard deviation."""
    figure, axes = grid(1, len(METRICS), 3.8, 3.4)
    for axis, (metric, title) in zip(axes[0], METRICS.items(), strict=True):
        for number, subject in enumerate(last):
            color = f"C{number % 10}"  # the same in every panel, though not all have every number
            own = [r for r in rows if (r.model, r.epoch, r.metric) == (subject.label, subject.epoch, metric)]
            if own:
                blocks, mean = [r.block for r in own], torch.tensor([r.mean for r in own])
                std = torch.tensor([r.std for r in own])
                axis.plot(blocks, mean, marker="o", markersize=3, color=color, label=subject.label)
                axis.fill_between(blocks, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="block")
    axes[0][0].legend(fontsize=8)
    axes[0][-1].axhline(0, color="grey", linewidth=0.5)
    figure.suptitle("Mean over tokens, band: one standard deviation", fontsize=9)
    files.save(figure)


def _curves(columns: dict[str, list[float]], metric: str) -> dict[int, list[float]]:
    """Block -> value per validation pass."""
    matches = {name: re.fullmatch(rf"val/block(\d+)/{metric}", name) for name in columns}
    return {int(match[1]): columns[name] for name, match in matches.items() if match}


def _draw_training(files: Files, training: dict[str, dict[str, list[float]]]) -> None:
    metrics = [name for name in METRICS if name != "cosine"]
    figure, axes = grid(len(training), len(metrics), 4.2, 3.2)
    for line, (label, columns) in zip(axes, training.items(), strict=True):
        for axis, metric in zip(line, metrics, strict=True):
            for block, values in sorted(_curves(columns, metric).items()):  # none: no momentum
                axis.plot(range(1, len(values) + 1), values, label=f"block {block}")
            axis.set_title(f"{label}: {METRICS[metric]}", fontsize=9)
            axis.set_xlabel("validation pass")
            whole_numbers(axis)
        line[0].legend(fontsize=7)
    files.save(figure, "training")
