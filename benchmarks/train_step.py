"""What momentum costs: a whole training step of one network under HeavyBall beside Residual.

python benchmarks/train_step.py --csv benchmarks/results/train_step.csv
"""

from collections.abc import Callable
from pathlib import Path

import jsonargparse
import torch
import torch.nn.functional as F
from rich.console import Console
from timing import side_by_side, write_rows

from vmoe_momentum import HeavyBall, Residual, create_model
from vmoe_momentum.momentum import MomentumRule
from vmoe_momentum.training import OptimizerSettings


def step(name: str, rule: MomentumRule, images: int) -> Callable[[], None]:
    """Forward, backward and AdamW on fixed pixels."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = create_model(name, rule=rule).to(device).train()
    optimizer = OptimizerSettings().build(net)
    size = net.patch_embed.img_size
    pixels = torch.randn(images, 3, *size, device=device)
    labels = torch.arange(images, device=device)

    def run() -> None:
        logits, aux_loss = net.forward_with_aux(pixels)
        (F.cross_entropy(logits, labels) + aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main(name: str = "vmoe_small_patch32_224", images: int = 16, repeats: int = 30, csv: str | None = None) -> None:
    """Print (and write) the median seconds of both and their ratio.

    Args:
        name: A V-MoE name of timm's registry.
        images: Images a step.
        repeats: Timed rounds of each.
        csv: File to write the row to.
    """
    ball, plain, ratio = side_by_side(step(name, HeavyBall(), images), step(name, Residual(), images), repeats)
    Console().print(f"{name}, {images} images: HeavyBall {ball * 1e3:.1f} ms, Residual {plain * 1e3:.1f} ms, "
                    f"ratio {ratio:.3f}")  # fmt: skip
    if csv is not None:
        numbers = {"heavy_ball_ms": f"{ball * 1e3:.1f}", "residual_ms": f"{plain * 1e3:.1f}", "ratio": f"{ratio:.3f}"}
        write_rows(Path(csv), [{"network": name, "images": images, **numbers}])


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
