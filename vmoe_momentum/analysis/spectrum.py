"""Eigenvalues of -du/dx on real tokens, over the stability regions of Residual and of the trained rule.

x is the residual stream, LayerNorm included, at the point where the rule evaluates u. Computed in float64. A norm
behind the step is part of the map (see eigenvalues.py); the regions are those of the rule alone.
    T tokens, S eigenvalues of each.
"""

from typing import NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from ..models.pixels import Wrapped
from ..momentum import ThreadsCarry
from ..progress import track
from .eigenvalues import Eigenvalues, Points, has_post_norm, image_spectrum, token_spectrum, update_of
from .output import Files, grid, group_by, show, whole_numbers
from .stability import residual_radius, spectral_radius, step_size
from .subjects import Subject, latest
from .trace import sparse_blocks, sparse_mlp, walk

CHUNK = 16  # tokens a step of the progress bar
DEFECTIVE = 1e4  # condition number of an eigenvalue from which it counts as near-defective


class SpectrumRow(NamedTuple):
    """One MoE block of one network."""

    model: str
    epoch: int | None
    block: int
    t: int
    rule: str
    part: str  # all D eigenvalues of each token, or those largest in modulus of whole images
    tokens: int
    eigenvalues: int  # counted below; without layer_norm_zeros
    layer_norm_zeros: int
    gamma: float  # step size: s = gamma sigma
    share_residual: float  # with |1 - s| < 1
    share_rule: float | None  # inside the rule's own region; None where its step is not linear
    largest: float  # |s|
    near_defective: float  # share with a condition number above 1e4
    post_norm: int  # 1: a norm stands behind the step; share_rule leaves out that it acts on the momentum, too


class EigenvalueRow(NamedTuple):
    """One eigenvalue sigma of -du/dx."""

    model: str
    epoch: int | None
    block: int
    token: int  # number of the token among those sampled; of the image, where tokens are coupled
    real: float
    imag: float
    condition: float
    layer_norm_zero: int
    radius_residual: float
    radius_rule: float | None


def spectrum(
    subjects: list[Subject],
    batches: list[Tensor],
    files: Files,
    tokens: int = 128,
    images: int = 2,
    count: int = 24,
    device: str = "cpu",
) -> list[SpectrumRow]:
    """Measures, writes and draws.

    tokens: sampled among all tokens of `batches`, the same ones everywhere. images, count: where tokens are coupled,
    this many whole images and eigenvalues of each.
    """
    for subject in subjects:
        _check_groups(subject)
    rows, details, last, after_norm = [], [], latest(subjects), False
    for subject in subjects:
        model = subject.build(device)
        after_norm |= getattr(model.net.rule, "look_ahead", "") == "after_norm"
        blocks = sparse_blocks(model.net)
        for index, points in _points(model, batches, subject.name).items():
            block, what = blocks[index], f"{subject.name}, block {index}"
            part, found = _measure(block, points, tokens, images, count, what)
            row, detail = _rows(subject, block, index, part, found)
            rows.append(row)
            details += detail if subject in last else []
    files.write(rows)
    files.write(details, "eigenvalues")
    _draw(files, last, rows, details)
    _draw_epochs(files, rows)
    show(
        "Share of eigenvalues inside the stability region",
        ("model", "epoch", "block", "Residual", "rule", "largest |s|", "near-defective"),
        [(r.model, r.epoch, r.block, r.share_residual, r.share_rule, r.largest, r.near_defective) for r in rows],
    )
    if any(row.post_norm and row.rule != "Residual" for row in rows):
        print("post_norm: eigenvalues are of the map with the norm; the rule's region leaves out its way with momentum")
    if after_norm:
        print("look_ahead=after_norm: the rule's region takes it for one in the stream; the norm's scale is left out")
    return rows


def _check_groups(subject: Subject) -> None:
    model = subject.build()
    for block in sparse_blocks(model.net).values():
        router = sparse_mlp(block).router
        if router.group_size != "image" and not _alone(block, 1):
            raise ValueError(
                f"--model={subject.saved.source}: router.group_size={router.group_size} mixes tokens of several "
                "images, so there is no spectrum of one; load the weights into a network with group_size=image"
            )


def _alone(block: ThreadsCarry, num_tokens: int) -> bool:
    mlp = sparse_mlp(block)
    return mlp.router.takes_tokens_alone(num_tokens, mlp.experts.fc1.weight.shape[0])


def _points(model: Wrapped, batches: list[Tensor], what: str) -> dict[int, Points]:
    """Block -> [B, N, D] where it evaluates u."""
    blocks = sparse_blocks(model.net)
    found: dict[int, list[Points]] = {}
    for _, visits in walk(model, batches, what):
        for visit in visits:
            x, update = visit.point.double(), visit.update.double()
            rest = visit.moved.double() - x - _gamma(blocks[visit.block]) * update
            found.setdefault(visit.block, []).append(Points(x, visit.shift.double(), rest))
    return {block: Points(*map(torch.cat, zip(*points, strict=True))) for block, points in found.items()}


def _measure(
    block: ThreadsCarry, points: Points, tokens: int, images: int, count: int, what: str
) -> tuple[str, Eigenvalues]:
    u, gamma = update_of(block, _gamma(block)), _gamma(block)
    if _alone(block, points.x.shape[1]):
        flat = Points(*(part.flatten(0, 1) for part in points))
        chosen = torch.randperm(len(flat.x), generator=torch.Generator().manual_seed(0))[:tokens].to(flat.x.device)
        pieces = Points(*(part[chosen] for part in flat)).split(CHUNK)
        part = "all"

        def measure(piece: Points) -> Eigenvalues:
            shift, rest = piece.shift[:, None], piece.rest[:, None]
            return token_spectrum(lambda x: u(x, shift, rest), piece.x, gamma if has_post_norm(block) else None)

    else:
        pieces, part = [Points(*(each[i] for each in points)) for i in range(min(images, len(points.x)))], "largest"

        def measure(piece: Points) -> Eigenvalues:
            return image_spectrum(lambda x: u(x, piece.shift[None], piece.rest[None]), piece.x, count)

    found = [measure(piece) for piece in track(pieces, what)]
    fewest = min(piece.sigma.shape[1] for piece in found)
    return part, Eigenvalues(*(torch.cat([value[:, :fewest] for value in parts]) for parts in zip(*found, strict=True)))


def _rows(
    subject: Subject, block: ThreadsCarry, index: int, part: str, found: Eigenvalues
) -> tuple[SpectrumRow, list[EigenvalueRow]]:
    t, coefficients = _step(block)
    gamma = step_size(block.rule, t, coefficients)
    flat, counted = found.sigma.flatten(), ~found.zero.flatten()
    residual = residual_radius(gamma, flat)
    own = spectral_radius(block.rule, t, coefficients, flat)
    rule, condition = type(block.rule).__name__, found.condition.flatten()[counted]
    row = SpectrumRow(
        subject.label, subject.epoch, index, t, rule, part, len(found.sigma), int(counted.sum()), int((~counted).sum()),
        gamma, _share(residual[counted] < 1), None if own is None else _share(own[counted] < 1),
        float(gamma * flat.abs().max()), _share(condition[~condition.isnan()] > DEFECTIVE), int(has_post_norm(block)),
    )  # fmt: skip
    token = torch.arange(len(found.sigma)).unsqueeze(1).expand_as(found.sigma).flatten()
    columns = (token, flat.real, flat.imag, found.condition.flatten(), (~counted).int(), residual)
    radii = [None] * len(flat) if own is None else own.tolist()
    cells = zip(*(column.tolist() for column in columns), radii, strict=True)
    return row, [EigenvalueRow(subject.label, subject.epoch, index, *cell) for cell in cells]


def _step(block: ThreadsCarry) -> tuple[int, dict[str, float]]:
    """t and the coefficients of the block's rule."""
    return max(1, block.step), {name: float(value) for name, value in block.momentum().items()}


def _gamma(block: ThreadsCarry) -> float:
    return step_size(block.rule, *_step(block))


def _share(inside: Tensor) -> float:
    return float(inside.double().mean())


def _draw(files: Files, last: list[Subject], rows: list[SpectrumRow], details: list[EigenvalueRow]) -> None:
    """One row of panels a network: s = gamma sigma of each MoE block over the two regions."""
    blocks = sorted({row.block for row in rows})
    figure, axes = grid(len(last), len(blocks), 3.8, 3.1)
    for line, subject in zip(axes, last, strict=True):
        own_blocks = sparse_blocks(subject.build().net)
        for axis, index in zip(line, blocks, strict=True):
            row = next((r for r in rows if (r.model, r.epoch, r.block) == (subject.label, subject.epoch, index)), None)
            if row is None:
                axis.set_axis_off()
                continue
            points = [d for d in details if (d.model, d.block) == (subject.label, index) and not d.layer_norm_zero]
            s = row.gamma * torch.tensor([complex(d.real, d.imag) for d in points], dtype=torch.complex128)
            _panel(axis, s, own_blocks[index], row.gamma)
            inside = f"inside: Residual {100 * row.share_residual:.0f} %"
            if row.rule != "Residual":
                own = "none (not linear)" if row.share_rule is None else f"{100 * row.share_rule:.0f} %"
                inside += f", {row.rule} {own}"
            if row.post_norm:
                inside += "\nnorm behind the step in the dots" + (
                    ", not in the curve" if row.rule != "Residual" else ""
                )
            axis.set_title(f"{subject.label}, block {index}\n{inside}", fontsize=9)
    figure.supxlabel(r"Re $s$, $s = \gamma\sigma$, $\sigma$ eigenvalue of $-\partial u/\partial x$")
    figure.supylabel(r"Im $s$")
    files.save(figure)


def _panel(axis: Axes, s: Tensor, block: ThreadsCarry, gamma: float) -> None:
    real, imaginary = s.real.numpy(), s.imag.numpy()
    axis.scatter(real, imaginary, s=3, alpha=0.25, color="black", linewidths=0, rasterized=True)
    low = min(-0.7, 1.15 * float(np.quantile(real, 0.0025)))
    high = max(3.6, 1.15 * float(np.quantile(real, 0.9975)))
    tall = max(1.4, 1.15 * float(np.quantile(np.abs(imaginary), 0.995)))
    axis.set(xlim=(low, high), ylim=(-tall, tall), aspect="equal")
    outside = int(((real < low) | (real > high) | (np.abs(imaginary) > tall)).sum())
    across, up = torch.linspace(low, high, 161).double(), torch.linspace(-tall, tall, 161).double()
    plane = torch.complex(*torch.meshgrid(across, up, indexing="xy"))
    t, coefficients = _step(block)
    sigma = plane.flatten() / gamma
    regions: list[tuple[str, str, str, Tensor | None]] = [("Residual", "tab:blue", "--", residual_radius(gamma, sigma))]
    if type(block.rule).__name__ != "Residual":
        own = spectral_radius(block.rule, t, coefficients, sigma)
        regions.append((type(block.rule).__name__, "tab:orange", "-", own))
    for name, color, style, radius in regions:
        if radius is not None:
            field = radius.reshape(plane.shape).numpy()
            axis.contour(plane.real, plane.imag, field, levels=[1.0], colors=color, linestyles=style, linewidths=1.4)
            axis.plot([], [], color=color, linestyle=style, label=name)
    axis.axhline(0, color="grey", linewidth=0.4)
    axis.axvline(0, color="grey", linewidth=0.4)
    axis.legend(fontsize=7, loc="upper right", title=f"{outside} not shown" if outside else None, title_fontsize=7)


def _draw_epochs(files: Files, rows: list[SpectrumRow]) -> None:
    """Share inside over epochs: mean over blocks, band from the lowest to the highest."""
    rows = [row for row in rows if row.epoch is not None]
    labels = list(dict.fromkeys(row.model for row in rows))
    if all(len({row.epoch for row in rows if row.model == label}) < 2 for label in labels):
        return
    figure, axes = grid(1, len(labels), 4.6, 3.8)
    for axis, label in zip(axes[0], labels, strict=True):
        own = [row for row in rows if row.model == label]
        whole_numbers(axis)
        curves = [("Residual's region", "tab:blue", lambda row: row.share_residual)]
        if any(row.rule != "Residual" for row in own):
            curves.append(("the rule's own region", "tab:orange", lambda row: row.share_rule))
        for name, color, pick in curves:
            found = group_by([row for row in own if pick(row) is not None], lambda row: row.epoch, pick)
            epochs, values = list(found), [100 * np.array(v) for v in found.values()]
            axis.plot(epochs, [v.mean() for v in values], color=color, label=name)
            axis.fill_between(
                epochs, [v.min() for v in values], [v.max() for v in values], color=color, alpha=0.2, linewidth=0
            )
        axis.set(title=label, xlabel="epoch", ylabel="% of eigenvalues inside", ylim=(0, 101))
        axis.legend(fontsize=8, loc="lower left")
    files.save(figure, "epochs")
