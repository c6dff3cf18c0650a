"""Answering a cell: its pictures are made, attacked and shown to models, a batch at a time. N pictures, L blocks."""

from collections.abc import Callable
from contextlib import nullcontext
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from .attacks import ATTACKS, Budget, Classifier, Stages, cross_entropy, frozen, input_gradient, run_attack
from .begun import Begun
from .cells import Cell, Outcome
from .models import Model
from .pictures import Batch, batches

EXAMPLES, FIVE = 6, 5


class Memory:
    """What is asked again in every cell: the routing of clean pictures, and which of them have no gradient.

    Kept while it is small; answers are the same without it.
    """

    def __init__(self, limit_bytes: int = 2**28) -> None:
        self.left = limit_bytes
        self.known: dict[tuple[object, ...], dict[str, Tensor]] = {}

    def get(self, key: tuple[object, ...], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if key in self.known:
            return self.known[key]
        made = make()
        size = sum(value.numel() * value.element_size() for value in made.values())
        if size <= self.left:
            self.left -= size
            self.known[key] = made
        return made


def run_cell(
    cell: Cell,
    models: list[Model],
    batch_size: int,
    workers: int,
    device: str,
    memory: Memory,
    advance: Callable[[int], None],
    begun: Begun,
    source: Model | None = None,
) -> tuple[dict[str, Outcome], Tensor]:
    """Outcomes by model name, and a few of the pictures the first model saw (uint8).

    begun: what is answered already, and where answers go. source: whose pictures they are in a transfer attack.
    """
    views = list(dict.fromkeys(model.view for model in models))
    numbers = begun.numbers.tolist()
    shown = {numbers[i * len(numbers) // EXAMPLES] for i in range(EXAMPLES)}  # they lie class by class
    left = numbers[begun.done :]
    for batch in batches(cell.pictures, views, batch_size, workers, cell.change, left) if left else ():
        images = None if source is None else _attacked(cell, source, batch, device)
        found = {model.name: _answer(cell, model, batch, device, memory, images, begun) for model in models}
        own = [i for i, number in enumerate(batch.index.tolist()) if number in shown]
        seen = (found[models[0].name][1][own] * 255).round().byte().cpu()
        begun.add({name: outcome for name, (outcome, _) in found.items()}, seen)
        del found
        advance(len(batch.index))
    return begun.whole()


def _answer(
    cell: Cell, model: Model, batch: Batch, device: str, memory: Memory, made: Tensor | None, begun: Begun
) -> tuple[Outcome, Tensor]:
    """made: the pictures of a transfer attack."""
    labels = batch.labels.to(device)
    images = _images(batch, model, device)
    before = batch.clean[model.view].to(device).float() / 255 if batch.clean is not None else images
    zero = np.zeros(0, dtype=bool)
    pictures = (model.name, cell.pictures.paths[0], batch.index.numpy().tobytes(), batch.clean is None)
    if cell.kind == "noise":
        images = _noisy(images, batch.index, cell.allowance)
    elif cell.kind == "attack":
        assert cell.attack is not None
        if ATTACKS[cell.attack].spends != "queries" and cell.source in (None, model.name):
            found = memory.get(
                ("gradient", *pictures), lambda: {"zero": _without_gradient(model.module, before, labels)}
            )  # fmt: skip
            zero = found["zero"].cpu().numpy()
        images = _attacked(cell, model, batch, device, begun.stages(model.name)) if made is None else made
    seed = crc32(batch.index.numpy().tobytes(), 0 if cell.budget is None else cell.budget.seed)
    with torch.inference_mode(), frozen(model.module, seed) if model.random else nullcontext():
        routing = {}
        # of what was corrupted elsewhere, and of other sets, the clean picture is not at hand
        route = model.routing
        if route is not None and cell.kind != "published" and not cell.pictures.whole:
            clean = memory.get(("routing", *pictures), lambda: route(before)[1])
            logits, now = route(images)
            routing = {block: routing_change(clean[block], now[block]).cpu().numpy() for block in clean}
        else:
            logits = model.module(images)
        if not bool(logits.isfinite().all()):
            raise ValueError(
                f"--model={model.name}: gives logits that are not finite on {cell.pictures.name}, {cell.condition} "
                f"{cell.severity}; its answers mean nothing there"
            )
        logits = logits.float() if cell.pictures.classes is None else logits.float()[:, cell.pictures.classes]
        confidence, predicted = logits.softmax(dim=1).max(dim=1)
        # of the logits: in float32 a softmax has many zeros, and nothing ranks those
        five = logits.topk(FIVE).indices if logits.shape[1] > FIVE else predicted.new_zeros((len(logits), 0))
        if cell.pictures.merged is not None:
            label_of = torch.tensor(cell.pictures.merged, device=device)
            predicted, five = label_of[predicted], label_of[five]
    correct = (predicted == labels).cpu().numpy()
    parts = (batch.index.numpy(), correct, predicted.cpu().numpy(), confidence.cpu().numpy())
    return Outcome(*parts, routing, zero, five.cpu().numpy()), images


def _images(batch: Batch, model: Model, device: str) -> Tensor:
    return batch.views[model.view].to(device).float() / 255


def _attacked(cell: Cell, model: Model, batch: Batch, device: str, stages: Stages | None = None) -> Tensor:
    assert cell.attack is not None
    router_loss = model.router_loss if cell.router_aware else None
    budget = cell.allowance._replace(router_loss=router_loss, stages=stages)
    return run_attack(cell.attack, model.module, _images(batch, model, device), batch.labels.to(device), budget)


def routing_change(before: Tensor, after: Tensor) -> Tensor:
    """1 - IoU of each token's expert sets, mean over tokens. [B, N, E] bool -> [B].

    A token that no expert takes before and after has not changed (V-MoE's adversarial project counts it as changed, so
    that clean against clean is not 0 there).
    """
    both, either = (before & after).sum(dim=-1).float(), (before | after).sum(dim=-1).float()
    return (1.0 - torch.where(either > 0, both / either.clamp_min(1), 1.0)).mean(dim=-1)


def _noisy(images: Tensor, index: Tensor, budget: Budget) -> Tensor:
    """Noise of size eps, each picture its own: uniform in the Linf ball or on the L2 sphere, clipped to the box."""
    drawn = []
    for image, number in zip(images, index.tolist(), strict=True):
        generator = torch.Generator().manual_seed(budget.seed * 1_000_003 + number)
        if budget.norm == "Linf":
            noise = torch.rand(image.shape, generator=generator) * 2 - 1
        else:
            noise = torch.randn(image.shape, generator=generator)
            noise /= noise.norm()
        drawn.append(noise.to(images.device))
    return (images + budget.eps * torch.stack(drawn)).clamp(0.0, 1.0)


def _without_gradient(module: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.enable_grad():
        gradient = input_gradient(Classifier(module), images.clone(), labels.clone(), cross_entropy, Budget(0.0))
    return ~(gradient.flatten(1).abs().amax(dim=1) > 0)  # NaN is none either
