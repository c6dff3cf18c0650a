"""The sparse layer, under every router, beside a dense MLP that does the same arithmetic, and beside other people's.

make bench-peers                                     # once: their packages, in .peers
python benchmarks/moe_layer.py --peers_path .peers --csv benchmarks/results/moe_layer.csv
python benchmarks/moe_layer.py --grow true --plot_to growth.png
python benchmarks/moe_layer.py --at "[S/16]" --busy 1    # beside a loader's worker

All in one process, in turn. The floor, ratio 1, is a dense MLP on K T tokens: as many products as K experts a token
take, with one set of weights and no routing. The bound is E dense MLPs on K T / E tokens each: as many products with
all the weights, no routing either.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import jsonargparse
import torch
from peers import PEERS, First, Shape
from rich.console import Console
from rich.table import Table
from timing import Timing, growth_picture, interleaved, write_rows
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

from vmoe_momentum.moe import ExpertChoiceRouter, GShardRouter, M6TRouter, Router, SoftRouter, SparseMlp, TopKRouter

SHAPES = {
    "S/16": Shape(8, 196, 384, 1536, 8),
    "many experts": Shape(8, 196, 384, 1536, 64),
    "digits": Shape(32, 17, 64, 128, 4),
    "B/16, a GPU's batch": Shape(128, 196, 768, 3072, 8),
}
ON_CPU = ("S/16", "many experts", "digits")
GROWTH = {  # one axis at a time
    "T": [Shape(images, 64, 384, 1536, 8) for images in (4, 8, 16, 32, 64, 128)],
    "E": [Shape(8, 196, 384, 1536, experts) for experts in (8, 16, 32, 64)],
    "D": [Shape(8, 196, width, 4 * width, 8) for width in (64, 128, 192, 384, 768)],
}
FLOOR = "dense MLP"


class Bound(nn.Module):
    """E dense MLPs, each on its share of K T tokens."""

    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.experts = nn.ModuleList(Mlp(s.width, s.hidden, act_layer=GELUTanh) for _ in range(s.experts))

    def forward(self, many: Tensor) -> Tensor:
        parts = many.tensor_split(len(self.experts), dim=1)
        return torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)], dim=1)


def routers(s: Shape) -> dict[str, Router]:
    """As many rows for the experts as K a token, but for the free slots of capacity 1.05, in the reference's groups of
    8 images: of an image alone each of 64 experts would get 8 slots, the next multiple of 4, for 6.1 tokens."""
    groups = {"group_size": min(8, s.images) * s.tokens}
    quiet = {"noise_std": 0.0, "importance_loss_weight": 0.0, "load_loss_weight": 0.0, **groups}
    found: dict[str, Router] = {
        "ours, dropless": TopKRouter(s.top_k, capacity_factor="dropless", **quiet),
        "ours, capacity 1.05": TopKRouter(s.top_k, capacity_factor=1.05, **quiet),
        "ours, capacity 1.05, noise and losses": TopKRouter(s.top_k, capacity_factor=1.05, **groups),
        "ours, expert choice": ExpertChoiceRouter(capacity_factor=s.top_k, noise_std=0.0, **groups),
        "ours, soft": SoftRouter(s.top_k * s.tokens // s.experts),
        "ours, M6-T": M6TRouter(num_prototypes=s.top_k, **groups),
    }
    return found | ({"ours, GShard": GShardRouter(**groups)} if s.top_k == 2 else {})


def build(s: Shape, compiled: bool, peers: bool) -> tuple[dict[str, nn.Module], list[str]]:
    """Layers by name, and why others are not there."""
    layers: dict[str, nn.Module] = {FLOOR: Mlp(s.width, s.hidden, act_layer=GELUTanh), "bound": Bound(s)}
    for name, router in routers(s).items():
        layers[name] = First(SparseMlp(s.width, s.hidden, s.experts, router, GELUTanh))
    missing = []
    for name, make in PEERS.items() if peers else ():
        if name == "transformers batched_mm" and s.width > 64 and not torch.cuda.is_available():
            missing.append(f"{name} ({s}): copies K experts' weights for every token, gigabytes here")
            continue
        try:
            layers[name] = make(s)
        except ImportError as error:
            missing.append(f"{name}: {error}")
    if compiled:
        for name in (FLOOR, "ours, dropless", "ours, capacity 1.05"):
            layers[f"{name}, compiled"] = torch.compile(layers[name])
    return layers, missing


def passes(layers: dict[str, nn.Module], s: Shape, dtype: torch.dtype, backward: bool) -> dict[str, Callable[[], None]]:
    """One call each, gradients cleared before it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    few = torch.randn(s.images, s.tokens, s.width, device=device, dtype=dtype)
    many = torch.randn(1, s.top_k * s.images * s.tokens, s.width, device=device, dtype=dtype)

    def one(layer: nn.Module, x: Tensor) -> Callable[[], None]:
        x = x.clone().requires_grad_(backward)
        ones = torch.ones_like(x)

        def run() -> None:
            if not backward:
                with torch.no_grad():
                    layer(x)
                return
            for leaf in (x, *layer.parameters()):
                leaf.grad = None
            layer(x).backward(ones)

        return run

    dense = (FLOOR, "bound", f"{FLOOR}, compiled")
    return {name: one(layer, many if name in dense else few) for name, layer in layers.items()}


def measure(
    label: str, s: Shape, dtype: torch.dtype, repeats: int, compiled: bool, peers: bool
) -> tuple[list[dict[str, object]], list[str]]:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers, missing = build(s, compiled, peers)
    layers = {name: layer.to(device, dtype).train() for name, layer in layers.items()}
    rows = []
    for what in ("forward", "forward+backward"):
        functions = passes(layers, s, dtype, what != "forward")
        for name in list(functions):
            try:
                functions[name]()
            except Exception as error:  # not ours: a peer that does not take this shape, type or device
                if name == FLOOR or name.startswith(("ours", "bound")):
                    raise
                missing.append(f"{name} ({s}): {type(error).__name__}: {str(error).splitlines()[0][:120]}")
                del functions[name]
        for name, timing in interleaved(functions, repeats).items():
            rows.append(row(label, s, dtype, name, what, timing))
    return rows, missing


def row(label: str, s: Shape, dtype: torch.dtype, name: str, what: str, timing: Timing) -> dict[str, object]:
    numbers = {"ms": f"{timing.seconds * 1e3:.3f}", "ratio": f"{timing.ratio:.3f}",
               "low": f"{timing.low:.3f}", "high": f"{timing.high:.3f}"}  # fmt: skip
    products = 4 * s.top_k * s.images * s.tokens * s.width * s.hidden * (3 if "backward" in what else 1)
    return {"at": label, "layer": name, "pass": what, **numbers, "GFLOPs": f"{products / 1e9:.3f}", **s._asdict(),
            "dtype": str(dtype).removeprefix("torch.")}  # fmt: skip


def show(rows: list[dict[str, object]]) -> None:
    for label in dict.fromkeys(row["at"] for row in rows):
        own = [row for row in rows if row["at"] == label]
        shape = Shape(*(own[0][name] for name in Shape._fields))
        table = Table(title=f"{label}: {shape} {own[0]['dtype']}, time over a dense MLP on K T tokens (quartiles)")
        for column in ("layer", "forward, ms", "ratio", "forward+backward, ms", "ratio"):
            table.add_column(column, justify="left" if column == "layer" else "right")
        for name in dict.fromkeys(row["layer"] for row in own):
            cells = []
            for what in ("forward", "forward+backward"):
                one = next((r for r in own if (r["layer"], r["pass"]) == (name, what)), None)
                cells += ["", ""] if one is None else [one["ms"], f"{one['ratio']} ({one['low']}-{one['high']})"]
            table.add_row(str(name), *cells)
        Console().print(table)


def plot(rows: list[dict[str, object]], path: Path) -> None:
    shown = (FLOOR, "bound", "ours, dropless", "ours, capacity 1.05", "ours, expert choice", "ours, soft")
    points = [
        (*str(row["at"]).split("="), row["layer"], float(str(row["ms"])))
        for row in rows
        if row["pass"] == "forward+backward" and row["layer"] in shown
    ]
    growth_picture([(axis, float(value), str(name), ms) for axis, value, name, ms in points], path)


def main(
    at: list[Literal["S/16", "many experts", "digits", "B/16, a GPU's batch"]] | None = None,
    dtypes: list[Literal["float32", "bfloat16"]] | None = None,
    repeats: int = 20,
    compiled: bool = False,
    grow: bool = False,
    peers_path: str | None = None,
    busy: int = 0,
    threads: int | None = None,
    csv: str | None = None,
    plot_to: str | None = None,
) -> None:
    """Print (and write) medians and ratios.

    Args:
        at: Shapes; by default all on a GPU, all but the last on a CPU.
        dtypes: float32 on a CPU, float32 and bfloat16 on a GPU by default.
        repeats: Timed rounds.
        compiled: Compiled layers, too.
        grow: Instead, ours alone over T, E and D.
        peers_path: Folder of the peers' packages; without it only the plain ones.
        busy: Processes that use a core each beside it, as a loader's workers do.
        threads: Of torch; by default one a core.
        csv: File to write the rows to.
        plot_to: Picture of the growth.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if peers_path is not None:
        sys.path.append(peers_path)
    at = at or (list(SHAPES) if torch.cuda.is_available() else list(ON_CPU))
    cases = {f"{letter}={value}": s for letter, value, s in growing()} if grow else {a: SHAPES[a] for a in at}
    kinds = dtypes or (["float32", "bfloat16"] if torch.cuda.is_available() else ["float32"])
    rows, missing = [], []
    for label, s, kind in [(label, s, kind) for kind in kinds for label, s in cases.items()]:
        with beside(busy):
            found, left_out = measure(label, s, getattr(torch, kind), repeats, compiled, peers=not grow)
        found = [row | {"busy": busy} for row in found] if busy else found
        show(found)
        rows, missing = rows + found, missing + left_out
        if csv is not None:  # what was measured is kept, whatever comes after
            write_rows(Path(csv), rows)
    for line in dict.fromkeys(missing):
        Console().print(f"left out: {line}")
    if plot_to is not None:
        plot(rows, Path(plot_to))


@contextmanager
def beside(busy: int) -> Iterator[None]:
    """That many processes that do nothing but use a core each."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        yield
    finally:
        for other in others:
            other.kill()


def growing() -> list[tuple[str, int, Shape]]:
    found = []
    for letter, shapes in GROWTH.items():
        values = {"T": lambda s: s.images * s.tokens, "E": lambda s: s.experts, "D": lambda s: s.width}
        found += [(letter, values[letter](s), s) for s in shapes]
    return found


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
