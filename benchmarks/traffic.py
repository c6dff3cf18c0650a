"""What spreading a network over ranks moves in a training step, and what a rank holds: `python benchmarks/traffic.py`.

Computed for every network of the zoo on 8 and 64 GPUs: networks live on the meta device, nothing is allocated. Measured
on gloo, ranks being processes here, for a small one: bytes that a rank's process writes (Linux counts them). Writes
results/traffic.csv; `python benchmarks/tables.py` puts it into configs/scale/README.md.

W bytes of weights on N ranks cost each rank, in rings, W (N-1)/N to gather them and as much to scatter the sum of
gradients; twice that to sum gradients for all. Gloo scatters by summing for all, with
twice the bytes of NCCL, and counted so.
"""

import csv
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.progress import track
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from zoo import SHAPELESS

from vmoe_momentum.models import PixelModel
from vmoe_momentum.models.variants import NAMES
from vmoe_momentum.moe import SparseMlp
from vmoe_momentum.training import OptimizerSettings
from vmoe_momentum.training.experts import experts_mesh
from vmoe_momentum.training.sharding import cut_axis, shard

RESULTS = Path(__file__).parent / "results" / "traffic.csv"
BATCH = 1024  # images a step on all ranks, as V-MoE trains
NODE = 8  # GPUs of a node: the ranks that exchange rows where both are used
WEIGHT = 4  # bytes: float32, as gradients and each of AdamW's two moments
SMALL, SMALL_IMAGES = "vmoe_tiny_patch4_16", 16  # what is measured, images a rank
STEPS = 3


@dataclass(frozen=True)
class Spread:
    """One way to spread a network. ranks: N; expert_parallel: P."""

    how: str
    ranks: int
    expert_parallel: int = 1
    backend: str = "nccl"
    row: int = 2  # bytes of a number in rows: bfloat16 under bf16-mixed

    @property
    def gathering(self) -> float:
        return (self.ranks - 1) / self.ranks

    @property
    def scattering(self) -> float:
        """Of gradients, in units of gathering."""
        return 2.0 if self.backend == "gloo" else 1.0


def spreads(ranks: int, **more: object) -> list[Spread]:
    node = min(NODE, ranks // 2)
    ways = [("DDP", 1), ("FSDP2", 1), ("experts", ranks), ("FSDP2 x experts", node)]
    # on one node, or on two ranks, there is nothing to share but what experts do
    return [Spread(how, ranks, p, **more) for how, p in ways if how != "FSDP2 x experts" or 1 < p < ranks]


class Network(NamedTuple):
    """Parameters, as shapes, and rows."""

    around: list[torch.Size]  # outside the blocks
    blocks: list[list[torch.Size]]  # without experts
    experts: list[list[torch.Size]]  # [E, ...] of each sparse block
    num_experts: int
    rows: int  # an image sends in all sparse blocks, in training
    width: int

    @classmethod
    def of(cls, net: nn.Module, side: int) -> "Network":
        layers = [module for module in net.modules() if isinstance(module, SparseMlp)]
        expert = {id(p) for layer in layers for p in layer.experts.parameters()}
        inside = {id(p) for p in net.blocks.parameters()}
        around = [p.shape for p in net.parameters() if id(p) not in inside]
        blocks = [[p.shape for p in block.parameters() if id(p) not in expert] for block in net.blocks]
        experts = [[p.shape for p in layer.experts.parameters()] for layer in layers]
        rows: list[int] = []
        for layer in layers:
            layer.router.even = True
            layer.experts.register_forward_pre_hook(lambda _, given: rows.append(given[0].shape[0]))
        with torch.no_grad():
            net.train()(torch.zeros(1, 3, side, side, device=next(net.parameters()).device))
        return cls(around, blocks, experts, experts[0][0][0], sum(rows), net.embed_dim)


def numbers(shapes: list[torch.Size], ranks: int) -> int:
    """In all ranks' shares, each of which is as large as the largest. Scalars stay whole, and are next to nothing."""
    total = 0
    for shape in filter(None, shapes):
        long = shape[cut_axis(torch.empty(shape, device="meta"), ranks)]
        total += shape.numel() // long * math.ceil(long / ranks) * ranks
    return total


def sent(net: Network, spread: Spread, images: int) -> tuple[float, float]:
    """Bytes that a rank sends in a step, and receives: weights with gradients, and rows. images: a rank's."""
    n, p = spread.ranks, spread.expert_parallel
    around, blocks = WEIGHT * numbers(net.around, n), WEIGHT * sum(numbers(block, n) for block in net.blocks)
    experts = WEIGHT * sum(numbers(layer, 1) for layer in net.experts)
    if spread.how == "DDP":
        whole = [*net.around, *(s for part in (*net.blocks, *net.experts) for s in part)]
        return 2 * WEIGHT * numbers(whole, 1) * spread.gathering, 0.0
    if p == 1:
        blocks += WEIGHT * sum(numbers(layer, n) for layer in net.experts)
    # blocks are gathered for both passes, what lies around them once
    weights = ((2 + spread.scattering) * blocks + (1 + spread.scattering) * around) * spread.gathering
    if p == 1:
        return weights, 0.0
    copies = n // p
    weights += (2 + spread.scattering) * experts / p * (copies - 1) / copies
    # there and back, and the same for the gradient
    return weights, 4.0 * net.rows * images * net.width * spread.row * (p - 1) / p


def held(net: Network, spread: Spread) -> tuple[float, float]:
    """Bytes on a rank: weights, gradients and two moments at rest; and what is gathered at once, at most: the weights
    of a unit and of the next, one unit's gradients, and both of what lies around the blocks."""
    n, p = spread.ranks, spread.expert_parallel
    around = numbers(net.around, n)
    dense = [numbers(block, n) for block in net.blocks]
    experts = [numbers(layer, 1) for layer in net.experts]
    if spread.how == "DDP":
        return 4.0 * WEIGHT * (numbers(net.around, 1) + sum(numbers(b, 1) for b in net.blocks) + sum(experts)), 0.0
    at_rest = (around + sum(dense) + sum(experts)) / n
    units = sorted([*dense, *(layer / p for layer in experts)] if p > 1 else _joined(net, n))
    gathered = 2 * around + 2 * units[-1] + units[-2]
    return 4 * WEIGHT * at_rest, WEIGHT * gathered


def _joined(net: Network, ranks: int) -> list[float]:
    """Blocks with their experts, for a bound: the sparse ones are the largest."""
    dense = sorted((numbers(block, ranks) for block in net.blocks), reverse=True)
    experts = [numbers(layer, ranks) for layer in net.experts]
    return [d + (experts[i] if i < len(experts) else 0) for i, d in enumerate(dense)]


def row_of(name: str, net: Network, spread: Spread, images: int, measured: tuple[float, float] | None) -> dict:
    weights, rows = sent(net, spread, images)
    rest, gathered = held(net, spread)
    seen = ("", "") if measured is None else tuple(f"{value / 1e6:.4g}" for value in measured)
    return {
        "network": name, "ranks": spread.ranks, "how": spread.how, "expert_parallel": spread.expert_parallel,
        "backend": spread.backend, "images_a_rank": images, "weights_MB": f"{weights / 1e6:.4g}",
        "rows_MB": f"{rows / 1e6:.4g}", "sent_MB": f"{(weights + rows) / 1e6:.4g}", "measured_sent_MB": seen[0],
        "held_MB": f"{rest / 1e6:.4g}", "measured_held_MB": seen[1], "gathered_MB": f"{gathered / 1e6:.4g}",
    }  # fmt: skip


def computed() -> list[dict]:
    found = []
    for name in track([name for name in NAMES if name not in SHAPELESS], "computing"):
        with torch.device("meta"):
            model = timm.create_model(name)
        net = Network.of(model, model.patch_embed.img_size[0])
        for ranks in (8, 64):
            for spread in spreads(ranks):
                if net.num_experts % spread.expert_parallel == 0:
                    found.append(row_of(name, net, spread, BATCH // ranks, None))
    return found


class Trained(nn.Module):
    """What DDP wants: a module whose forward is training's."""

    def __init__(self, model: PixelModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits, aux_loss = self.model.forward_normalized(images)
        return logits.square().mean() + aux_loss


def written() -> int:
    """Bytes that this process has written so far, into files and sockets alike."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar")).split()[1])


def local(tensor: Tensor) -> int:
    part = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part.numel() * part.element_size()


def measure(rank: int, ways: list[Spread], meeting: str, out: str) -> None:
    """A rank's part: training steps in each way, and the means over ranks of bytes sent in a step and held."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ways[0].ranks)
    found = torch.tensor([measure_one(spread) for spread in ways], dtype=torch.float64)
    dist.all_reduce(found)
    if rank == 0:
        torch.save((found / ways[0].ranks).tolist(), out)
    dist.barrier()
    dist.destroy_process_group()


def measure_one(spread: Spread) -> tuple[float, float]:
    torch.manual_seed(0)
    model = PixelModel(timm.create_model(SMALL))
    if spread.how == "DDP":
        trained: nn.Module = DistributedDataParallel(Trained(model))
    else:
        parallel = spread.expert_parallel
        experts = experts_mesh("cpu", spread.ranks, parallel) if parallel > 1 else None
        shard(model, init_device_mesh("cpu", (spread.ranks,)), experts=experts)
        trained = Trained(model)
    optimizer = OptimizerSettings().build(model.net)
    images = torch.randn(SMALL_IMAGES, 3, 16, 16)
    start = 0
    for step in range(STEPS + 2):
        if step == 2:  # the first two set up connections, buckets and moments
            dist.barrier()
            start = written()
        optimizer.zero_grad()
        trained(images).backward()
        optimizer.step()
    sent_by_step = (written() - start) / STEPS
    weights = list(model.parameters())
    moments = [m for w in weights for m in optimizer.state[w].values() if m.ndim]
    return sent_by_step, sum(map(local, [*weights, *(w.grad for w in weights), *moments]))


def measured() -> list[dict]:
    net, found = Network.of(timm.create_model(SMALL), 16), []
    for ranks in (2, 4):
        ways = spreads(ranks, backend="gloo", row=4)
        with tempfile.TemporaryDirectory() as folder:
            meeting, out = Path(folder) / "meeting", Path(folder) / "out"
            mp.spawn(measure, (ways, str(meeting), str(out)), nprocs=ranks)
            results = torch.load(out)
        found += [row_of(SMALL, net, way, SMALL_IMAGES, seen) for way, seen in zip(ways, results, strict=True)]
    return found


def main() -> None:
    rows = [*computed(), *measured()]
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows: {RESULTS}")


if __name__ == "__main__":
    main()
