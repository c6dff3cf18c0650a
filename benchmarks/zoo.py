"""Parameters, active parameters and FLOPs of every registered V-MoE, at its own size: `python benchmarks/zoo.py`.

Nothing is allocated (the networks live on the meta device), so the 54-billion-parameter ones count too. Writes
results/zoo.csv; `python benchmarks/tables.py` puts it into docs/networks.md.
"""

import csv
from pathlib import Path

import timm
import torch
from rich.progress import track

from vmoe_momentum.models import PixelModel
from vmoe_momentum.models.variants import NAMES
from vmoe_momentum.training.profile import Cost, measure_cost

RESULTS = Path(__file__).parent / "results" / "zoo.csv"
SHAPELESS = ("vmoe_custom", "vmoe_upcycled")  # they have whatever shape they are given


def row(name: str) -> dict[str, object]:
    with torch.device("meta"):
        net = timm.create_model(name)
    model = PixelModel(net).to("meta")  # its constants are read before they go
    size = net.patch_embed.img_size[0]
    cost: Cost = measure_cost(model, size)
    experts = net.blocks[net.moe_layers[-1]].mlp.experts.fc1.weight.shape[0]
    sparse = f"{len(net.moe_layers)} of {len(net.blocks)}"
    facts = {"name": name, "image": size, "sparse_blocks": sparse, "experts": experts}
    router = net.router_spec["class_path"]
    return {**facts, "router": router, "parameters": cost.parameters, "active": cost.active, "gflops": cost.gflops}


def main() -> None:
    rows = [row(name) for name in track(NAMES, "counting") if name not in SHAPELESS]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({**r, "gflops": f"{r['gflops']:.6g}"} for r in rows)
    print(f"{len(rows)} networks: {RESULTS}")


if __name__ == "__main__":
    main()
