"""Optimizer and learning-rate schedule, by timm's factories."""

from dataclasses import dataclass
from typing import Literal

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from ..models.settings import did_you_mean


@dataclass(frozen=True)
class OptimizerSettings:
    """How weights move.

    Weight decay is decoupled (adamw) and applies to matrices only: biases, norms, learned momentum, class token and
    positions are exempt; the router is not.

    Args:
        name: A timm optimizer: adamw, sgd, lamb, lion, ...
        lr: Peak learning rate.
        weight_decay: Decoupled weight decay.
        betas: Decay of Adam's first and second moment; for optimizers that have them.
        layer_decay: Factor on the learning rate per block from the top down (fine-tuning uses 0.75 or so).
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    layer_decay: float | None = None

    def build(self, net: nn.Module) -> torch.optim.Optimizer:
        if self.name not in list_optimizers():
            raise ValueError(f"model.optimizer.name={self.name}{did_you_mean(self.name, list_optimizers())}")
        if not self.lr > 0:
            raise ValueError(f"model.optimizer.lr={self.lr} must be > 0; 1e-3 suits adamw on batches of 1024")
        betas = {} if self.betas is None else {"betas": tuple(self.betas)}
        return create_optimizer_v2(
            net, self.name, lr=self.lr, weight_decay=self.weight_decay, layer_decay=self.layer_decay, **betas
        )


@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over optimizer steps: linear warm-up from 0, then decay to min_lr at the last step.

    Args:
        decay: Shape after warm-up.
        warmup_steps: Optimizer steps of warm-up.
        min_lr: Learning rate at the last step.
    """

    decay: Literal["cosine", "linear"] = "cosine"
    warmup_steps: int = 0
    min_lr: float = 1e-5

    def build(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Scheduler:
        """A timm scheduler stepped by `step_update(number of optimizer steps done)`."""
        if not 0 <= self.warmup_steps < total_steps:
            raise ValueError(
                f"model.schedule.warmup_steps={self.warmup_steps}: this run has {total_steps} steps in all; "
                f"use fewer, or train longer (trainer.max_epochs)"
            )
        decay_steps = total_steps - self.warmup_steps
        shared = {
            "warmup_t": self.warmup_steps, "warmup_lr_init": 0.0, "warmup_prefix": True, "t_in_epochs": False,
        }  # fmt: skip
        if self.decay == "linear":
            return PolyLRScheduler(optimizer, decay_steps, power=1.0, lr_min=self.min_lr, **shared)
        return CosineLRScheduler(optimizer, decay_steps, lr_min=self.min_lr, **shared)
