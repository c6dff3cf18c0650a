"""What exporting costs: latency and size of each format beside eager torch, in one run.

    python benchmarks/export.py --csv benchmarks/results/export.csv

Weights are random, as latency does not ask for more; accuracy is compared by every `vmoe-momentum export` on real
pictures. Formats take turns, so that a machine that slows down slows all of them.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import jsonargparse
import torch
from rich.console import Console
from timing import write_rows

from vmoe_momentum import create_model
from vmoe_momentum.export import FORMATS, Request, Servable
from vmoe_momentum.export.base import as_answer
from vmoe_momentum.models import PixelModel

CASES = (("eager", "fp32"), ("compiled", "fp32"), ("pt2", "fp32"), ("onnx", "fp32"), ("onnx", "fp16"), ("onnx", "int8"))


def answers(model: PixelModel, folder: Path) -> dict[tuple[str, str], tuple[Callable, float]]:
    """Case -> what runs it, and megabytes on disk."""
    plain = Servable(model, Request())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.net.state_dict().values()) / 1e6
    found = {("eager", "fp32"): (as_answer(plain), weights)}
    found["compiled", "fp32"] = (as_answer(torch.compile(plain)), weights)
    for kind, precision in CASES[2:]:
        place = folder / f"{kind}_{precision}"
        place.mkdir()
        FORMATS[kind].write(model, place, Request(precision=precision), {})
        size = sum(path.stat().st_size for path in place.iterdir()) / 1e6
        found[kind, precision] = (FORMATS[kind].open(place, {}), size)
    return found


def main(
    network: str = "vmoe_small_patch16_224",
    rule: str = "HeavyBall",
    batches: list[int] | None = None,
    rounds: int = 7,
    csv: str | None = None,
) -> None:
    """Time every format.

    Args:
        network: A name of `timm.list_models("*moe*")`, or any timm classifier.
        rule: Momentum rule of V-MoE names.
        batches: Batch sizes; default [1, 8].
        rounds: Repetitions; the median counts.
        csv: Where the rows go.
    """
    torch.manual_seed(0)
    sparse = {"rule": rule, "share_expert_init": False} if "moe" in network else {}
    model = PixelModel(create_model(network, **sparse)).eval()
    torch.nn.init.normal_(model.net.head.weight, std=0.02)
    side, rows = model.net.patch_embed.img_size[0], []
    with tempfile.TemporaryDirectory() as folder:
        found = answers(model, Path(folder))
        for batch in batches or [1, 8]:
            images = torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1))
            times: dict[tuple[str, str], list[float]] = {case: [] for case in found}
            expected = found["eager", "fp32"][0](images)
            gaps = {case: float((run(images) - expected).abs().max()) for case, (run, _) in found.items()}
            for _ in range(rounds):
                for case, (run, _) in found.items():
                    start = time.perf_counter()
                    run(images)
                    times[case].append(1000 * (time.perf_counter() - start))
            eager = median(times["eager", "fp32"])
            for case, (_, size) in found.items():
                middle = median(times[case])
                rows.append(
                    {"network": network, "rule": rule if sparse else "", "format": case[0], "precision": case[1],
                     "batch": batch, "milliseconds": f"{middle:.1f}", "ratio": f"{middle / eager:.2f}",
                     "megabytes": f"{size:.1f}", "difference": f"{gaps[case]:.1e}"}
                )  # fmt: skip
                Console().print(" ".join(map(str, rows[-1].values())), highlight=False)
    if csv is not None:
        write_rows(Path(csv), rows)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
