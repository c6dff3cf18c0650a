"""How far logits and expert choices move when the input is disturbed by Gaussian noise.

B images, N tokens, E experts, K classes.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.pixels import Wrapped
from .output import Files, grid, show
from .subjects import Subject, latest
from .trace import walk


class SensitivityRow(NamedTuple):
    """One number at one size of noise; means over images (logits, class) or tokens (routing)."""

    model: str
    epoch: int | None
    noise: float  # standard deviation in pixel units, of 255
    metric: str  # logits_change: |difference| / |clean|; class_change; routing_change: 1 - IoU of expert sets
    block: int | None  # of routing_change
    value: float


class Answer(NamedTuple):
    logits: Tensor  # [B, K]
    routes: dict[int, Tensor]  # block -> [T, E] bool: does this token reach this expert?


def sensitivity(
    subjects: list[Subject], batches: list[Tensor], files: Files, noise: list[float], device: str = "cpu"
) -> list[SensitivityRow]:
    """Measures, writes and draws. noise: standard deviations in pixel units (of 255); every network sees the same.

    Disturbed images are clipped to [0, 1]. Routing is compared only where experts are chosen (not under SoftRouter).
    """
    rows = []
    for subject in subjects:
        model = subject.build(device)
        clean = list(_answers(model, batches, 0.0, f"{subject.name}, clean"))
        for size in noise:
            disturbed = _answers(model, batches, size, f"{subject.name}, noise {size:g}")
            sums: dict[tuple[str, int | None], list[Tensor]] = {}
            for before, after in zip(clean, disturbed, strict=True):
                for key, value in _changes(before, after).items():
                    sums.setdefault(key, []).append(value)
            for (metric, block), values in sums.items():
                mean = float(torch.cat(values).double().mean())
                rows.append(SensitivityRow(subject.label, subject.epoch, size, metric, block, mean))
    files.write(rows)
    _draw(files, latest(subjects), rows)
    keys = list(dict.fromkeys((row.model, row.epoch, row.noise) for row in rows))
    columns = ("logits_change", "class_change", "routing_change")
    at = {key: [row for row in rows if row[:3] == key] for key in keys}
    cells = [(*key, *(_mean([row for row in at[key] if row.metric == name]) for name in columns)) for key in keys]
    show("Change under input noise (of 255)", ("model", "epoch", "noise", *columns), cells)
    return rows


def expert_set_change(before: Tensor, after: Tensor) -> Tensor:
    """1 - |A and B| / |A or B| of the experts that each token reaches; 0 where neither reaches any. [T, E] -> [T]."""
    both, either = (before & after).sum(dim=-1), (before | after).sum(dim=-1)
    return 1.0 - torch.where(either > 0, both / either.clamp_min(1), 1.0)


def _answers(model: Wrapped, batches: list[Tensor], size: float, what: str) -> Iterator[Answer]:
    generator = torch.Generator().manual_seed(0)
    disturbed = []
    for images in batches:
        pixels = images.float() / 255 if images.dtype == torch.uint8 else images
        noise = torch.randn(pixels.shape, generator=generator) * (size / 255)
        disturbed.append((pixels + noise).clamp(0.0, 1.0))
    for logits, visits in walk(model, disturbed, what):
        routes = {visit.block: visit.plan.assigned().flatten(0, 1) for visit in visits}
        chosen = {block: reached for block, reached in routes.items() if not bool(reached.all())}
        yield Answer(logits, chosen)


def _changes(before: Answer, after: Answer) -> dict[tuple[str, int | None], Tensor]:
    moved = (after.logits - before.logits).norm(dim=-1) / before.logits.norm(dim=-1).clamp_min(1e-12)
    other = (after.logits.argmax(dim=-1) != before.logits.argmax(dim=-1)).float()
    found: dict[tuple[str, int | None], Tensor] = {("logits_change", None): moved, ("class_change", None): other}
    for block in before.routes.keys() & after.routes.keys():
        found["routing_change", block] = expert_set_change(before.routes[block], after.routes[block])
    return found


def _mean(rows: list[SensitivityRow]) -> float | str:
    return sum(row.value for row in rows) / len(rows) if rows else ""


def _draw(files: Files, last: list[Subject], rows: list[SensitivityRow]) -> None:
    """Routing: mean over blocks, band from the steadiest block to the least steady."""
    figure, axes = grid(1, 3, 4.4, 3.6)
    titles = {"logits_change": "Logits: |difference| / |clean|", "class_change": "Images whose class changes"}
    titles["routing_change"] = "Expert sets: 1 - IoU"
    for axis, (metric, title) in zip(axes[0], titles.items(), strict=True):
        for number, subject in enumerate(last):
            color = f"C{number % 10}"
            own = [r for r in rows if (r.model, r.epoch, r.metric) == (subject.label, subject.epoch, metric)]
            sizes = sorted({row.noise for row in own})
            values = [[row.value for row in own if row.noise == size] for size in sizes]
            style = {"color": color, "marker": "o", "markersize": 3, "label": subject.label}
            axis.plot(sizes, [sum(v) / len(v) for v in values], **style)
            if metric == "routing_change":
                band = [min(v) for v in values], [max(v) for v in values]
                axis.fill_between(sizes, *band, color=color, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="noise, standard deviation in pixel units (of 255)")
        axis.set_ylim(bottom=0)
    axes[0][0].legend(fontsize=8)
    files.save(figure)
