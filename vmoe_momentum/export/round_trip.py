"""An export against the network it comes from, on real pictures."""

import copy
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from ..models import PixelModel
from ..progress import track
from .asked import Request
from .base import Answer, Servable, as_answer

CHUNKS = (17, 2, 1)  # batch sizes that are tried
TOLERANCE = 1e-4  # of logits, in float32
EPSILON = torch.finfo(torch.float32).eps
MOVED = 4  # times that weights are moved, to see what rounding makes of a network
TIMED = 8  # pictures in a batch that is timed


class RoundTrip(NamedTuple):
    """What was found. Accuracies are shares of the pictures."""

    pictures: int
    max_difference: float  # of logits or probabilities
    agreement: float  # share of pictures with the same most likely class
    top1_before: float
    top1_after: float
    latency_ratio: float  # over eager torch, batches of TIMED
    megabytes: float
    rounding_error: float | None  # in float32, where the difference is large enough to ask
    device: str  # of eager torch


def round_trip(
    model: PixelModel,
    answer: Answer,
    pixels: Tensor,
    labels: Tensor,
    request: Request,
    folder: Path,
    device: str = "cpu",
) -> RoundTrip:
    """pixels: uint8 [N, 3, S, S]. Moves `model` to the device."""
    eager = as_answer(Servable(model, request), device)
    taken = pixels if request.input == "uint8" else pixels.float() / 255
    expected, found = [], []
    for start in track(range(0, len(taken), CHUNKS[0]), "comparing"):
        batch = taken[start : start + CHUNKS[0]]
        expected.append(eager(batch))
        found.append(answer(batch))
    before, after = torch.cat(expected), torch.cat(found)
    largest = float((before - after).abs().max())
    for size in CHUNKS[1:]:
        for start in range(0, min(len(taken), 6), size):
            batch = taken[start : min(start + size, len(taken))]  # a network may route its images together
            largest = max(largest, float((answer(batch) - eager(batch)).abs().max()))
    top1 = [float((each.argmax(1) == labels).float().mean()) for each in (before, after)]
    agreement = float((before.argmax(1) == after.argmax(1)).double().mean())  # 9 in 10 are 0.9, not less
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    ratio = _ratio(eager, answer, taken[:TIMED])
    own = None
    if request.precision == "fp32" and largest > TOLERANCE:
        own = rounding_error(model, pixels[:64].to(device).float() / 255)
    return RoundTrip(len(taken), largest, agreement, top1[0], top1[1], ratio, round(size / 1e6, 3), own, device)


@torch.no_grad()
def rounding_error(model: PixelModel, images: Tensor) -> float:
    """Largest difference of logits in float32 from those in float64. Rules that divide by small numbers magnify it.

    One way to round says little of another program's, so weights are moved by a unit in their last place, too.
    """
    exact, largest = copy.deepcopy(model).double()(images.double()), 0.0
    generator = torch.Generator().manual_seed(0)
    for draw in range(1 + MOVED):
        other = copy.deepcopy(model)
        for weight in other.parameters() if draw else ():
            weight.mul_(1 + EPSILON * torch.randn(weight.shape, generator=generator).to(weight))
        largest = max(largest, float((other(images).double() - exact).abs().max()))
    return largest


def check(found: RoundTrip, precision: str, to: str) -> None:
    """Raises ValueError: the export is not the network."""
    told = f"differs by up to {found.max_difference:.3g}, the same class for {100 * found.agreement:.1f} % of pictures"
    if not found.max_difference < float("inf"):
        raise ValueError(f"--to={to}: gives values that are not finite; nothing was written")
    allowed = max(TOLERANCE, 2 * (found.rounding_error or 0.0))  # the network's own rounding, and the export's
    if precision == "fp32" and found.max_difference > allowed:  # classes as near as that may change places
        raise ValueError(
            f"--to={to}: not the network it comes from ({told}); nothing was written. Report this as a bug"
        )
    if found.agreement < 0.9:
        raise ValueError(
            f"--precision={precision}: too coarse for this network ({told}); nothing was written; use fp32"
        )


def _ratio(eager: Answer, answer: Answer, batch: Tensor, rounds: int = 5) -> float:
    times: dict[str, list[float]] = {"eager": [], "export": []}
    for number in range(rounds + 1):
        for name, run in (("eager", eager), ("export", answer)):
            start = time.perf_counter()
            run(batch)
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return round(median(times["export"]) / median(times["eager"]), 3)
