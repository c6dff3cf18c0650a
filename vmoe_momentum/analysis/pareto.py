"""How near the router's combination of experts comes to the least-norm point of what they answer.

Read as gradients of E objectives (arXiv:2410.14574, section 2), the experts' outputs on a token have a convex hull; its
shortest vector is the step of the multiple-gradient descent algorithm, and zero where the token is Pareto-stationary.
B images, N tokens, D width, T tokens looked at, E experts, M = min(D, E).
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from ..models.pixels import Wrapped
from ..moe import Plan, SoftRouter
from ..momentum import ThreadsCarry
from ..progress import track
from .hulls import compare_points
from .output import Files, grid, group_by, show, whole_numbers
from .subjects import Subject, latest
from .trace import Visit, sparse_blocks, sparse_mlp, walk

HULLS = list(product(("all", "chosen"), ("raw", "unit")))  # of which experts, of which outputs
CHUNK = 256  # tokens that all experts answer at a time
LineStyle = Literal["-", "--", "-.", ":"]
STYLES: dict[str, LineStyle] = {"router": "-", "shuffled": "-.", "equal": ":"}
PANELS = {
    "norm": "norm",
    "cosine": "cosine with the least-norm point",
    "relative_gap": "distance to it / norm",
    "common": "% of tokens along every expert",
}


class ParetoRow(NamedTuple):
    """One combination in one hull at one MoE block; means over tokens."""

    model: str
    epoch: int | None
    step: int | None  # optimizer steps of the checkpoint
    block: int
    experts: str  # whose hull: all, or chosen, those whose outputs the token gets; tokens with one are left out there
    outputs: str  # as they are (raw), or each divided by its norm (unit)
    combination: str  # weights that sum to 1: the router's, the same shuffled among `experts`, or equal for all of them
    tokens: int
    unreached: int  # tokens left out because no expert has a weight in them
    expert_norm: float
    least_norm: float
    stationary: float  # share of tokens with zero in the hull
    norm: float
    cosine: float | None  # with the least-norm point, where that is not zero; None where it is everywhere
    gap: float  # distance from the least-norm point
    relative_gap: float  # gap / norm, in [0, 1]; 0 where the combination is the least-norm point
    common: float  # share of tokens whose combination has no negative inner product with any of `experts`
    weight_sum: float  # of the router's weights as they are: its update is so many times its combination


class Answers(NamedTuple):
    """What the experts of one block answer, and how much of each a token gets."""

    outputs: Tensor  # [T, E, M] float64, in coordinates of their own span: lengths and angles are those in the stream
    weights: Tensor  # [T, E] float64; all 0 where a token reaches no expert


def pareto(
    subjects: list[Subject], batches: list[Tensor], files: Files, tokens: int = 2048, device: str = "cpu"
) -> list[ParetoRow]:
    """Measures, writes and draws. tokens: at most so many, sampled among all of `batches`, the same at every block.

    Raises ValueError: a network whose experts see no single tokens (soft routing) or has one expert a layer, outputs
    that are not finite, no token that reaches an expert.
    """
    for subject in subjects:
        _check(subject)
    rows: list[ParetoRow] = []
    notes: list[str] = []
    for subject in subjects:
        answers = _answers(subject, batches, tokens, device)
        found = {block: _rows(subject, block, own) for block, own in answers.items()}
        notes += _missing(subject, found)
        rows += chain.from_iterable(found.values())
    if not rows:
        raise ValueError(f"--tokens={tokens}: none of those sampled reaches an expert; use more")
    files.write(rows)
    files.save(_panels(_latest(subjects, rows), lambda row: row.block, "block"))
    _draw_training(files, rows)
    _show(_latest(subjects, rows))
    for note in notes:
        print(note)
    return rows


def combine_weights(plan: Plan, num_tokens: int, num_experts: int) -> Tensor:
    """[T, E] float64: the weight of each expert's output in each token's; read off the plan's own `combine`, which gets
    rows that say whose they are in place of outputs."""
    rows, ends = plan.dispatch(plan.gates.new_zeros(num_tokens, 1))
    row = torch.arange(len(rows), device=rows.device, dtype=torch.int32)
    expert = row // (len(rows) // num_experts) if ends is None else torch.searchsorted(ends, row, right=True)
    return plan.combine(F.one_hot(expert.long(), num_experts).double())


def _check(subject: Subject) -> None:
    for mlp in map(sparse_mlp, sparse_blocks(subject.build().net).values()):
        if isinstance(mlp.router, SoftRouter):
            raise ValueError(
                f"--model={subject.saved.source}: {type(mlp.router).__name__} gives experts mixtures of tokens, so no "
                "token has outputs of its own to combine; leave this network out"
            )
        if mlp.experts.fc1.weight.shape[0] < 2:
            raise ValueError(f"--model={subject.saved.source}: one expert a layer, so there is nothing to combine")


@torch.no_grad()
def _answers(subject: Subject, batches: list[Tensor], tokens: int, device: str) -> dict[int, Answers]:
    """Block -> at the tokens sampled."""
    model: Wrapped = subject.build(device)
    parts: dict[int, list[Answers]] = {}
    picked, start = None, 0
    for _, visits in walk(model, batches, subject.name):
        if picked is None:
            picked = _pick(sum(map(len, batches)) * visits[0].tokens.shape[1], tokens)
        size = visits[0].tokens.shape[0] * visits[0].tokens.shape[1]
        own, start = picked[start : start + size], start + size
        for visit in visits:
            parts.setdefault(visit.block, []).append(_answer(subject, model, visit, own.to(visit.tokens.device)))
    return {block: Answers(*map(torch.cat, zip(*found, strict=True))) for block, found in parts.items()}


def _pick(total: int, tokens: int) -> Tensor:
    """[total] bool."""
    picked = torch.zeros(total, dtype=torch.bool)
    picked[torch.randperm(total, generator=torch.Generator().manual_seed(0))[:tokens]] = True
    return picked


def _answer(subject: Subject, model: Wrapped, visit: Visit, picked: Tensor) -> Answers:
    block, tokens = sparse_blocks(model.net)[visit.block], visit.tokens.flatten(0, 1)
    weights = combine_weights(visit.plan, len(tokens), sparse_mlp(block).experts.fc1.weight.shape[0])[picked]
    outputs = torch.cat([_outputs(subject, visit.block, block, part) for part in tokens[picked].split(CHUNK)])
    return Answers(outputs.cpu(), weights.cpu())


def _outputs(subject: Subject, index: int, block: ThreadsCarry, tokens: Tensor) -> Tensor:
    """[T, D] -> [T, E, M]."""
    outputs = block.ls2(sparse_mlp(block).every_output(tokens)).double()
    if not outputs.isfinite().all():
        raise ValueError(f"--model={subject.saved.source}: experts of block {index} give numbers that are not finite")
    # Of a matrix whose columns are the outputs, R of QR has the same lengths and angles in far fewer numbers.
    return torch.linalg.qr(outputs.transpose(1, 2), mode="r").R.transpose(1, 2)


def _rows(subject: Subject, block: int, answers: Answers) -> list[ParetoRow]:
    reached = answers.weights > 0
    rows = []
    for experts, outputs in track(HULLS, f"{subject.name}, block {block}"):
        members = torch.ones_like(reached) if experts == "all" else reached
        kept = reached.any(dim=-1) & (members.sum(dim=-1) > 1)
        if kept.any():
            vectors = answers.outputs[kept]
            if outputs == "unit":
                vectors = F.normalize(vectors, dim=-1, eps=torch.finfo(vectors.dtype).tiny)
            start = (subject.label, subject.epoch, subject.step, block, experts, outputs)
            rows += [
                ParetoRow(*start, name, int(kept.sum()), int((~reached.any(dim=-1)).sum()), **values)
                for name, values in compare_points(vectors, answers.weights[kept], members[kept]).items()
            ]
    return rows


def _missing(subject: Subject, found: dict[int, list[ParetoRow]]) -> Iterator[str]:
    """What a CSV without these rows does not say."""
    unreached = [str(block) for block, rows in found.items() if not rows]
    single = [str(block) for block, rows in found.items() if rows and rows[-1].experts == "all"]
    if unreached:
        yield f"{subject.name}, block {', '.join(unreached)}: no token sampled reaches an expert"
    if single:
        yield f"{subject.name}, block {', '.join(single)}: no token has two experts, so no hull of those chosen"


def _show(rows: list[ParetoRow]) -> None:
    groups: dict[tuple[str, int | None, int, str], dict[str, ParetoRow]] = {}
    for row in rows:
        key = (row.model, row.epoch, row.block, f"{row.experts} {row.outputs}")
        groups.setdefault(key, {})[row.combination] = row
    cells = []
    for key, at in groups.items():
        cosine = at["router"].cosine
        cells.append((*key, "" if cosine is None else cosine, *(at[name].relative_gap for name in STYLES)))
    columns = ("model", "epoch", "block", "hull", "cosine", "gap", "shuffled", "equal")
    show("Gap between the router's combination and the least-norm point, by its norm", columns, cells)


def _latest(subjects: list[Subject], rows: list[ParetoRow]) -> list[ParetoRow]:
    """Those of the epoch of each label that was trained longest."""
    last = {(subject.label, subject.epoch) for subject in latest(subjects)}
    return [row for row in rows if (row.model, row.epoch) in last]


def _draw_training(files: Files, rows: list[ParetoRow]) -> None:
    """Over training: mean over blocks, the router's with a band from the lowest block to the highest."""
    steps: dict[str, set[int]] = {}
    for row in rows:
        if row.step is not None:
            steps.setdefault(row.model, set()).add(row.step)
    rows = [row for row in rows if row.step is not None and len(steps[row.model]) > 1]
    if rows:
        files.save(_panels(rows, lambda row: row.step or 0, "step (mean over blocks, band: router's)"), "training")


def _panels(rows: list[ParetoRow], place: Callable[[ParetoRow], int], xlabel: str) -> Figure:
    """A row of panels a hull, a colour a network. place: a row's x."""
    hulls = [hull for hull in HULLS if any(hull == (row.experts, row.outputs) for row in rows)]
    colors = {label: f"C{number % 10}" for number, label in enumerate(dict.fromkeys(row.model for row in rows))}
    figure, axes = grid(len(hulls), len(PANELS), 3.9, 2.9)
    for number, (line, hull) in enumerate(zip(axes, hulls, strict=True), 1):
        for axis, (metric, title) in zip(line, PANELS.items(), strict=True):
            for label, color in colors.items():
                own = [row for row in rows if row.model == label and (row.experts, row.outputs) == hull]
                _curves(axis, own, metric, place, color)
            low, high = axis.get_ylim()
            axis.set_ylim(min(0, low) if metric == "cosine" else 0, high + 0.05 * high)
            axis.set_title(f"{hull[0]} experts, {hull[1]} outputs\n{title}", fontsize=9)
            whole_numbers(axis)
            if number == len(hulls):
                axis.set_xlabel(xlabel, fontsize=8)
            axis.tick_params(labelbottom=number == len(hulls))
    keys = [Line2D([], [], color=color, label=label) for label, color in colors.items()]
    keys += [Line2D([], [], color="black", linestyle=style, label=name) for name, style in STYLES.items()]
    keys.append(Line2D([], [], color="black", linestyle="--", label="least-norm point"))
    figure.legend(handles=keys, loc="outside lower center", ncols=8, fontsize=9, frameon=False)
    return figure


def _curves(axis: Axes, rows: Sequence[ParetoRow], metric: str, place: Callable[[ParetoRow], int], color: str) -> None:
    def value(row: ParetoRow) -> float:
        return 100 * row.common if metric == "common" else getattr(row, metric)

    curves = {
        (name, style): group_by([r for r in rows if r.combination == name and value(r) is not None], place, value)
        for name, style in STYLES.items()
    }
    if metric == "norm":
        router = [row for row in rows if row.combination == "router"]
        curves["least", "--"] = group_by(router, place, lambda row: row.least_norm)
    for (name, style), curve in curves.items():
        places, values = list(curve), list(curve.values())
        axis.plot(places, [sum(v) / len(v) for v in values], color=color, linestyle=style, linewidth=1.3)
        if name == "router":
            axis.fill_between(places, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15, lw=0)
