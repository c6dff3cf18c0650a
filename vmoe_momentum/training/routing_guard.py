"""Routers that stop routing: experts that learn nothing, gates that are sure of everything; said once, with advice."""

import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..momentum import ThreadsCarry
from ..ranges import COUNT_OR_NONE, SHARE, in_range

_BIAS = "experts.fc2.bias"  # of a SparseMlp
_EVERY = 50  # steps between two looks, each of which waits for the device


@in_range("RouterGuard.", unused_steps=COUNT_OR_NONE, entropy_floor=SHARE.because("0 is none"))
class RouterGuard(Callback):
    """Warns once of experts that no gradient has reached for many steps, and once of gates that have collapsed.

    In every run; give it by hand to set it: --trainer.callbacks+=RouterGuard --trainer.callbacks.unused_steps=2000.
    Read from the gradients of all ranks, it needs no hooks and sees a compiled network as any other.

    Args:
        unused_steps: Optimizer steps in a row without a gradient after which an expert is called unused, 0 to 1e9; 0
            never. Looked at every 50 steps.
        entropy_floor: Mean entropy of a block's gates over validation below which they have collapsed, as a share of
            the log of the number of experts, in [0, 1]; 0 is none.
    """

    def __init__(self, unused_steps: int = 500, entropy_floor: float = 0.02) -> None:
        self.unused_steps, self.entropy_floor = unused_steps, entropy_floor
        self._since: dict[str, Tensor] = {}  # block -> [E], steps since a gradient
        self._told: set[str] = set()

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        if not self.unused_steps or "unused" in self._told:
            return
        for name, block in _blocks(pl_module.model.net):
            grad = block.mlp.get_parameter(_BIAS).grad  # [E, D], exactly zero where no row came through
            if grad is not None:
                reached = grad.detach().abs().amax(dim=1) != 0
                self._since[name] = (self._since.get(name, 0) + 1) * ~reached
        if trainer.global_step % _EVERY == _EVERY - 1:
            self._look(trainer.global_step + 1)

    def _look(self, step: int) -> None:
        found = []
        for name, since in self._since.items():
            whole = since.full_tensor() if isinstance(since, DTensor) else since  # by all ranks
            unused = (whole >= self.unused_steps).nonzero().flatten().tolist()
            if unused:
                found.append(f"{name}: {', '.join(map(str, unused))}")
        if found:
            self._told.add("unused")
            rank_zero_warn(
                f"step {step}: experts without a gradient for {self.unused_steps} steps or more, so that they learn "
                f"nothing ({'; '.join(found)}); raise the router's importance_loss_weight and load_loss_weight or its "
                "noise_std, lower model.optimizer.lr, or take fewer experts"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or not self.entropy_floor or "entropy" in self._told:
            return
        found = []
        for name, block in _blocks(pl_module.model.net):
            entropy = trainer.callback_metrics.get(f"val/{name}/entropy")  # RouterStats's, over all ranks
            most = math.log(block.mlp.get_parameter(_BIAS).shape[0])
            if entropy is not None and most and float(entropy) < self.entropy_floor * most:
                found.append(f"{name}: {float(entropy):.2g} of {most:.2g} nats")
        if found:
            self._told.add("entropy")
            rank_zero_warn(
                f"step {trainer.global_step}: gates have collapsed, each token is sure of its expert and the choice no "
                f"longer learns ({'; '.join(found)}); raise the router's noise_std or importance_loss_weight, or lower "
                "model.optimizer.lr"
            )


def _blocks(net: torch.nn.Module) -> Iterator[tuple[str, ThreadsCarry]]:
    """By the names that RouterStats logs."""
    for name, block in net.named_modules():
        if isinstance(block, ThreadsCarry):
            yield "block" + name.rpartition(".")[2], block
