"""The sparse layer beside a dense MLP that does the same arithmetic: K times as many tokens, one expert.

python benchmarks/moe_layer.py --csv benchmarks/results/moe_layer.csv
"""

from functools import partial
from pathlib import Path

import jsonargparse
import torch
from rich.console import Console
from rich.table import Table
from timing import side_by_side, write_rows
from timm.layers import GELUTanh, Mlp
from torch import Tensor, nn

from vmoe_momentum.moe import SparseMlp, TopKRouter


def forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: nn.Module, x: Tensor) -> None:
    outputs = layer(x)
    tokens = outputs[0] if isinstance(layer, SparseMlp) else outputs
    tokens.backward(torch.ones_like(tokens))


def main(
    images: int = 8,
    tokens: int = 196,
    width: int = 384,
    hidden: int = 1536,
    num_experts: int = 8,
    top_k: int = 2,
    repeats: int = 30,
    csv: str | None = None,
) -> None:
    """Print (and write) medians and ratios; a ratio of 1 means that routing costs nothing.

    Args:
        images: Images a batch.
        tokens: Tokens an image.
        width: Token width.
        hidden: Hidden width of an expert.
        num_experts: Experts.
        top_k: Experts a token.
        repeats: Timed rounds of each.
        csv: File to write the rows to.
    """
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dense = Mlp(width, hidden, act_layer=GELUTanh).to(device)
    x = torch.randn(images, tokens, width, device=device, requires_grad=True)
    many = torch.randn(1, top_k * images * tokens, width, device=device, requires_grad=True)
    rows = []
    for mode, factor in (("dropless", "dropless"), ("capacity 1.05", 1.05)):
        router = TopKRouter(top_k, capacity_factor=factor, noise_std=0.0)
        layer = SparseMlp(width, hidden, num_experts, router, GELUTanh).to(device).train()
        for what, run in (("forward", forward), ("forward+backward", forward_backward)):
            ours, peer, ratio = side_by_side(partial(run, layer, x), partial(run, dense, many), repeats)
            numbers = {"sparse_ms": f"{ours * 1e3:.2f}", "dense_ms": f"{peer * 1e3:.2f}", "ratio": f"{ratio:.3f}"}
            shape = f"T={images * tokens} D={width} F={hidden} E={num_experts} K={top_k} float32"
            rows.append({"layer": mode, "pass": what, **numbers, "shape": shape})
    table = Table(title="sparse layer over a dense MLP on K T tokens")
    for column in ("layer", "pass", "sparse_ms", "dense_ms", "ratio"):
        table.add_column(column)
    for row in rows:
        table.add_row(*(str(row[column]) for column in ("layer", "pass", "sparse_ms", "dense_ms", "ratio")))
    Console().print(table)
    if csv is not None:
        write_rows(Path(csv), rows)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
