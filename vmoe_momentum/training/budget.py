"""What a run needs of each device's memory, known before anything is allocated there."""

import os
import resource
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn

from ..moe.experts import Experts
from .sharding import FSDP2Strategy, blocks
from .trainers import callbacks_of, data_of

MOMENTS = {"adamw": 2, "adam": 2, "momentum": 1, "nesterov": 1, "lion": 1, "sgd": 1}  # tensors as large as the weights


class Budget(NamedTuple):
    """Bytes on each device. None: not known for this optimizer or network."""

    weights: int
    gradients: int
    optimizer: int | None
    averages: int
    gathered: int  # of other devices' weights, at once
    activations: int | None  # kept for the backward pass of one batch, in float32: half types take less

    @property
    def certain(self) -> int:
        return self.weights + self.gradients + (self.optimizer or 0) + self.averages

    def line(self) -> str:
        told = [f"{name} {size(value)}" for name, value in self._asdict().items() if value]
        return ", ".join([*told, *(f"{name} unknown" for name, value in self._asdict().items() if value is None)])


def budget(trainer: pl.Trainer, module: Any) -> Budget:
    """Of a run that is about to start. Sharded weights are counted as evenly spread."""
    net, strategy = module.model, trainer.strategy
    parameters = _bytes(net)
    shares = trainer.world_size if isinstance(strategy, FSDP2Strategy) else 1
    moments = MOMENTS.get(module.optimizer_settings.name)
    averaged = any(isinstance(callback, WeightAveraging) for callback in callbacks_of(trainer))
    own = -(-parameters // shares)
    gathered = 0
    if isinstance(strategy, FSDP2Strategy) and shares > 1:
        sizes = [_gathered(block, strategy.expert_parallel) for block in blocks(net.net)]
        around = parameters - sum(_gathered(block, 1) for block in blocks(net.net))  # stays until the backward pass
        kept = sorted(sizes)[-2:] if strategy.reshard_after_forward else sizes  # the next one comes while one computes
        gathered = around + sum(kept)
    kept = module.saved_bytes(data_of(trainer))
    return Budget(own, own, None if moments is None else moments * own, averaged * own, gathered, kept)


def _gathered(block: nn.Module, expert_parallel: int) -> int:
    """Of a block, while it computes."""
    experts = sum(_bytes(part) for part in block.modules() if isinstance(part, Experts))
    return _bytes(block) - experts + experts // expert_parallel


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def refuse_too_large(needed: Budget, trainer: pl.Trainer) -> None:
    """Raises ValueError: weights, gradients and moments alone are more than the device has."""
    there, where = free_bytes(trainer)
    if needed.certain > there:
        sharded = isinstance(trainer.strategy, FSDP2Strategy)
        each = f"each of {trainer.world_size} devices" if trainer.world_size > 1 else "one device"
        way_out = "more devices" if sharded else "--config configs/scale/fsdp2.yaml, which spreads them over devices"
        raise ValueError(
            f"model.net: its weights, gradients and optimizer need {size(needed.certain)} on {each} ({needed.line()}), "
            f"and {where} has {size(there)}; use {way_out}, or a smaller network"
        )


def free_bytes(trainer: pl.Trainer) -> tuple[int, str]:
    """Of one device, and its name. A machine's memory is shared by its processes, and may be limited (ulimit -v)."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1], torch.cuda.get_device_name(device)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    here = max(1, trainer.world_size // trainer.num_nodes)
    left = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // here
    if limit == resource.RLIM_INFINITY:
        return left, "this machine, for each process,"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    return min(left, limit - used), "each process (ulimit -v)"


def size(number: int) -> str:
    """For people: 3 digits and a unit of 1000."""
    value, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def shape_of(trainer: pl.Trainer) -> str:
    """The mesh, for people."""
    strategy, ranks = trainer.strategy, trainer.world_size
    if isinstance(strategy, FSDP2Strategy):
        apart = f", experts on {strategy.expert_parallel} of them" if strategy.expert_parallel > 1 else ""
        return f"FSDP2 over {ranks} device{'s' if ranks > 1 else ''}{apart}"
    return f"{ranks} copies of the network, one a device" if ranks > 1 else "one device"
