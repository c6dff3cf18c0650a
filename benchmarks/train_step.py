"""What sparsity and momentum cost: whole training steps under every rule, beside a dense ViT of equal active FLOPs.

python benchmarks/train_step.py --csv benchmarks/results/train_step.csv
python benchmarks/train_step.py --grow true --csv growth.csv --plot_to growth.png

The dense network has the V-MoE's blocks, and in place of each sparse MLP one whose hidden width is K times an
expert's: as many products as K experts a token take. Both have the same activation (on a CPU the tanh form of GELU
takes three times as long as timm's default, the exact one). Both have the same optimizer, images and labels; all in one
process, in turn. On a GPU under bfloat16 autocast.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import jsonargparse
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timing import growth_picture, interleaved, write_rows
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from vmoe_momentum import create_model
from vmoe_momentum.momentum import MomentumRule
from vmoe_momentum.specs import subclasses
from vmoe_momentum.training import OptimizerSettings

DENSE = "dense ViT"
NETWORKS = {  # images a step on two cores and on a GPU, and whether under every rule: all are in memory at once
    "vmoe_tiny_patch4_16": (32, 256, True),
    "vmoe_small_patch32_224": (16, 512, True),
    "vmoe_small_patch16_224": (4, 128, False),
    "vmoe_base_patch16_224": (2, 64, False),
}
GROWTH = {"images": (16, 32, 64, 128, 256), "tokens": (16, 64, 256), "blocks": (4, 8, 16, 32)}
RULES = [name for name, cls in subclasses(MomentumRule).items() if cls.__module__.startswith("vmoe_momentum")]


def dense_like(sparse: nn.Module) -> nn.Module:
    """A timm ViT of the same widths, its MLPs as wide as K experts where the other is sparse."""
    block, router = sparse.blocks[sparse.moe_layers[0]], sparse.blocks[sparse.moe_layers[0]].mlp.router
    ratio = block.mlp.experts.fc1.weight.shape[1] / sparse.embed_dim

    def build(**settings: Any) -> Block:
        wide = settings.pop("depth") in sparse.moe_layers
        return Block(**{**settings, "mlp_ratio": ratio * (router.top_k if wide else 1)})

    return VisionTransformer(
        img_size=sparse.patch_embed.img_size, patch_size=sparse.patch_embed.patch_size, embed_dim=sparse.embed_dim,
        depth=len(sparse.blocks), num_heads=sparse.blocks[0].attn.num_heads, num_classes=sparse.num_classes,
        block_fn=build, act_layer=type(block.mlp.experts.act),
    )  # fmt: skip


class Step:
    """Forward, backward and AdamW on fixed pixels, under autocast on a GPU."""

    def __init__(self, net: nn.Module, images: int, device: str, compiled: bool) -> None:
        self.net, self.device = net.to(device).train(), device
        size = net.patch_embed.img_size
        self.optimizer = OptimizerSettings().build(net)
        self.pixels = torch.randn(images, 3, *size, device=device)
        self.labels = torch.arange(images, device=device) % net.num_classes
        self.losses = torch.compile(self._losses) if compiled else self._losses
        self.seconds: dict[str, list[float]] = {"forward": [], "backward": [], "optimizer": []}

    def _losses(self) -> torch.Tensor:
        if hasattr(self.net, "forward_with_aux"):
            logits, aux_loss = self.net.forward_with_aux(self.pixels)
            return F.cross_entropy(logits, self.labels) + aux_loss
        return F.cross_entropy(self.net(self.pixels), self.labels)

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast("cuda", torch.bfloat16) if self.device == "cuda" else nullcontext()

    def run(self) -> None:
        with self.autocast():
            loss = self.losses()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def parts(self) -> None:
        """One step whose three parts are timed by themselves."""
        marks = [self._now()]
        with self.autocast():
            loss = self.losses()
        marks.append(self._now())
        loss.backward()
        marks.append(self._now())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(self._now())
        for name, start, end in zip(self.seconds, marks, marks[1:], strict=False):
            self.seconds[name].append(end - start)

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_megabytes(self) -> float:
        """What one step takes at its peak beside weights and optimizer's state: activations and gradients."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run()
            return (torch.cuda.max_memory_allocated() - before) / 1e6
        from torch.distributed._tools.mem_tracker import MemTracker

        tracker = MemTracker()
        with tracker:
            self.run()
        return max(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values()) / 1e6


def main(
    networks: list[str] | None = None,
    rules: list[str] | None = None,
    images: int | None = None,
    repeats: int = 15,
    compiled: bool = False,
    grow: bool = False,
    csv: str | None = None,
    plot_to: str | None = None,
) -> None:
    """Print (and write) medians, ratios to the dense ViT and to Residual, parts of a step and peak memory.

    Args:
        networks: V-MoE names of timm's registry; the digits' and S/32, S/16, B/16 by default.
        rules: Momentum rules; by default all for the two smallest, HeavyBall for the others. Residual is always there.
        images: Images a step.
        repeats: Timed rounds of each.
        compiled: Compile all of them.
        grow: Instead, the digits' network over images, tokens an image and blocks.
        csv: File to write the rows to.
        plot_to: Picture of the growth.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if grow:
        points = measure_growth(repeats)
        if csv is not None:
            write_rows(
                Path(csv), [dict(zip(("axis", "value", "network", "ms"), point, strict=True)) for point in points]
            )
        return growth_picture(points, Path(plot_to)) if plot_to is not None else None
    rows: list[dict[str, object]] = []
    for name in networks or NETWORKS:
        on_cpu, on_gpu, every = NETWORKS.get(name, (8, 128, False))
        others = rules or (RULES if every else ["HeavyBall"])
        count = images or (on_gpu if device == "cuda" else on_cpu)
        found = measure(name, ["Residual", *(r for r in others if r != "Residual")], count, repeats, compiled)
        show(found)
        rows += found
        if csv is not None:
            write_rows(Path(csv), rows)


def measure_growth(repeats: int) -> list[tuple[str, float, str, float]]:
    """Axis, value, network and ms of steps of vmoe_tiny_patch4_16, one axis at a time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    points = []
    for axis, values in GROWTH.items():
        for value in values:
            size = int(4 * value**0.5) if axis == "tokens" else 16
            blocks, images = value if axis == "blocks" else 8, value if axis == "images" else 32
            steps = {}
            for rule in (DENSE, "Residual", "HeavyBall", "Adam"):
                cls = subclasses(MomentumRule)["Residual" if rule == DENSE else rule]
                net = timm.create_model("vmoe_custom", depth=blocks, img_size=size, num_classes=10, rule=cls())
                steps[rule] = Step(dense_like(net) if rule == DENSE else net, images, device, compiled=False)
            times = interleaved({rule: step.run for rule, step in steps.items()}, repeats)
            points += [(axis, float(value), rule, round(1e3 * time.seconds, 2)) for rule, time in times.items()]
    return points


def measure(name: str, rules: list[str], images: int, repeats: int, compiled: bool) -> list[dict[str, object]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    steps = {}
    for rule in [DENSE, *rules]:
        torch.manual_seed(0)
        net = create_model(name, rule="Residual" if rule == DENSE else rule)
        steps[rule] = Step(dense_like(net) if rule == DENSE else net, images, device, compiled)
    functions: dict[str, Callable[[], None]] = {rule: step.run for rule, step in steps.items()}
    first = {rule: _first(step) for rule, step in steps.items()}
    times = interleaved(functions, repeats)
    rows = []
    for rule, step in steps.items():
        for _ in range(5):
            step.parts()
        parts = {f"{part}_ms": f"{1e3 * sorted(values)[len(values) // 2]:.2f}" for part, values in step.seconds.items()}
        own, seconds = times[rule], times[rule].seconds
        rows.append({
            "network": name, "rule": rule, "images": images, "compiled": compiled, "ms": f"{1e3 * seconds:.2f}",
            "over_dense": f"{own.ratio:.3f}", "low": f"{own.low:.3f}", "high": f"{own.high:.3f}",
            "over_residual": f"{seconds / times['Residual'].seconds:.3f}", **parts,
            "first_step_s": f"{first[rule]:.2f}",
            "peak_MB": f"{step.peak_megabytes():.1f}" if not compiled or device == "cuda" else "",
        })  # fmt: skip
    return rows


def _first(step: Step) -> float:
    start = step._now()
    step.run()
    return step._now() - start


def show(rows: list[dict[str, object]]) -> None:
    table = Table(title=f"{rows[0]['network']}, {rows[0]['images']} images a step")
    columns = ("rule", "ms", "over_dense", "over_residual", "forward_ms", "backward_ms", "optimizer_ms", "peak_MB")
    for column in columns:
        table.add_column(column, justify="left" if column == "rule" else "right")
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console().print(table)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
