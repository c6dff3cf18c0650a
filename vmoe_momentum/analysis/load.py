"""What the experts receive, and whether tokens choose the experts that would answer loudest.

B images, N tokens, D width, T = B*N, E experts, K chosen.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..momentum import ThreadsCarry
from .output import Files, grid, show, whole_numbers
from .subjects import Subject, latest
from .trace import Visit, sparse_blocks, sparse_mlp, walk


class LoadRow(NamedTuple):
    """One number of one MoE block."""

    model: str
    epoch: int | None
    block: int
    metric: str  # load, load_by_norm, cv, entropy, dropped
    # load: the expert; load_by_norm: the rank of its output norm, 0 the largest
    index: int | None  # type: ignore[assignment]  # hides tuple.index, which no row needs
    value: float


def load(subjects: list[Subject], batches: list[Tensor], files: Files, device: str = "cpu") -> list[LoadRow]:
    """Measures, writes and draws.

    load: share of what the experts received (sums to 1). load_by_norm: share of tokens that chose the expert whose
    output on them has the i-th largest norm among all E (sums to K where nothing is dropped); the paper's histogram.
    cv: standard deviation of the load over its mean. entropy: of the load, nats; log E when balanced. dropped: share.
    """
    rows = []
    for subject in subjects:
        model = subject.build(device)
        blocks = sparse_blocks(model.net)
        sums: dict[int, dict[str, Tensor]] = {}
        for _, visits in walk(model, batches, subject.name):
            for visit in visits:
                for name, value in _count(blocks[visit.block], visit).items():
                    known = sums.setdefault(visit.block, {})
                    known[name] = known.get(name, 0) + value
        for block, found in sums.items():
            rows += _rows(subject, block, {name: value.cpu().double() for name, value in found.items()})
    files.write(rows)
    _draw(files, latest(subjects), rows)
    summary: dict[tuple[str, int | None, int], dict[str, float]] = {(r.model, r.epoch, r.block): {} for r in rows}
    for row in rows:
        summary[row.model, row.epoch, row.block][row.metric] = row.value
    columns = ("model", "epoch", "block", "cv", "entropy", "dropped")
    show("Expert load", columns, [(*key, *(found[c] for c in columns[3:])) for key, found in summary.items()])
    return rows


def _count(block: ThreadsCarry, visit: Visit) -> dict[str, Tensor]:
    tokens, assigned = visit.tokens.flatten(0, 1), visit.plan.assigned().flatten(0, 1)
    by_norm = sparse_mlp(block).every_output(tokens).norm(dim=-1).argsort(dim=-1, descending=True, stable=True)
    return {
        "load": visit.plan.load(),
        "load_by_norm": assigned.gather(-1, by_norm).sum(dim=0),
        "dropped": visit.plan.dropped() * len(tokens),
        "tokens": torch.tensor(len(tokens)),
    }


def _rows(subject: Subject, block: int, sums: dict[str, Tensor]) -> list[LoadRow]:
    shares = sums["load"] / sums["load"].sum()
    single = {
        "cv": shares.std(correction=0) / shares.mean(),
        "entropy": torch.special.entr(shares).sum(),
        "dropped": sums["dropped"] / sums["tokens"],
    }
    start = (subject.label, subject.epoch, block)
    rows = [LoadRow(*start, "load", i, value) for i, value in enumerate(shares.tolist())]
    ranks = (sums["load_by_norm"] / sums["tokens"]).tolist()
    rows += [LoadRow(*start, "load_by_norm", i, value) for i, value in enumerate(ranks)]
    return rows + [LoadRow(*start, name, None, float(value)) for name, value in single.items()]


def _draw(files: Files, last: list[Subject], rows: list[LoadRow]) -> None:
    """A row of panels a network: load of each expert as stacked bars, and how often the i-th loudest is chosen."""
    figure, axes = grid(len(last), 2, 5.2, 3.4)
    for (bars, lines), subject in zip(axes, last, strict=True):
        own = [row for row in rows if (row.model, row.epoch) == (subject.label, subject.epoch)]
        blocks = sorted({row.block for row in own})
        for place, block in enumerate(blocks):
            values = {m: [r.value for r in own if (r.block, r.metric) == (block, m)] for m in ("load", "load_by_norm")}
            bottom, shares = 0.0, values["load"]
            for expert, share in enumerate(shares):
                tone = 0.25 + 0.75 * expert / max(1, len(shares) - 1)
                bars.bar(place, 100 * share, 0.7, bottom=bottom, color="tab:blue", alpha=tone, edgecolor="white")
                bottom += 100 * share
            ranks, chosen = range(1, len(shares) + 1), [100 * value for value in values["load_by_norm"]]
            color = f"C{place % 10}" if len(blocks) <= 10 else (0.1, 0.2, place / len(blocks))
            lines.plot(ranks, chosen, marker="o", markersize=3, color=color, label=f"block {block}")
            for expert in range(1, len(shares)):
                bars.plot([place - 0.35, place + 0.35], [100 * expert / len(shares)] * 2, color="black", lw=0.6, ls=":")
            lines.axhline(sum(chosen) / len(chosen), color="black", linewidth=0.6, linestyle=":")
        bars.set_xticks(range(len(blocks)), [f"block {block}" for block in blocks], rotation=45)
        bars.set(title=f"{subject.label}: load (dotted: balanced)", ylabel="% of assignments, experts stacked")
        lines.set(title=f"{subject.label}: load by norm (dotted: blind to norm)", xlabel="rank of the output norm")
        whole_numbers(lines)
        lines.set(ylabel="% of tokens that chose it", ylim=(0, 105))
        if len(blocks) <= 10:
            lines.legend(fontsize=8)
    files.save(figure)
