"""Optimizer and learning-rate schedule, by timm's factories."""

import importlib.util
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.distributed.tensor import DTensor

from ..names import did_you_mean
from ..ranges import COUNT_OR_NONE, MOMENTUM, NOT_NEGATIVE, POSITIVE, Range, in_range
from .meshes import ByMesh, by_mesh, weights_of
from .per_expert import ELEMENTWISE, PerExpert, views_of

# Those of torch that do a whole step in one pass over the weights, 2e-8 from what the others do in 50 steps.
FUSED = ("adam", "adamw", "sgd", "momentum", "nesterov")
FUSED_SHARDED = ("adam", "adamw")  # torch 2.15 has no fused sgd for sharded weights
WAY_OUT = "; use another one, adamw for example"


@in_range(
    "model.optimizer.", lr=POSITIVE.because("1e-3 suits adamw on batches of 1024"), weight_decay=NOT_NEGATIVE,
    betas=MOMENTUM.or_(None), layer_decay=Range(0, 1, above=True).or_(None).because("1 or null for equal rates"),
)  # fmt: skip
@dataclass(frozen=True)
class OptimizerSettings:
    """How weights move.

    Weight decay is decoupled (adamw) and applies to matrices only: biases, norms, learned momentum, class token and
    positions are exempt; the router is not.

    Args:
        name: A timm optimizer: adamw, sgd, lamb, lion, muon, ... Those that look at a whole tensor (norms, matrices)
            see each expert's own.
        lr: Peak learning rate, in (0, 1e6].
        weight_decay: Decoupled weight decay, in [0, 1e6].
        betas: Decay of Adam's first and second moment, in [0, 1); for optimizers that have them.
        layer_decay: Factor on the learning rate per block from the top down, in (0, 1] (fine-tuning uses 0.75 or so).
    """

    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    betas: tuple[float, float] | None = None
    layer_decay: float | None = None

    def build(self, net: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
        """fused: False where gradients must be unscaled before the step, as Lightning wants it under 16-mixed."""
        names: list[Any] = list_optimizers()  # strings, as no descriptions are asked for
        if self.name not in names:
            raise ValueError(f"model.optimizer.name={self.name}{did_you_mean(self.name, names)}")
        self._check_name()
        told: dict[str, Any] = {"opt": self.name, "lr": self.lr}
        told |= {} if self.betas is None else {"betas": tuple(self.betas)}
        known = FUSED_SHARDED if any(isinstance(p, DTensor) for p in net.parameters()) else FUSED
        told |= {"fused": True} if fused and self.name in known else {}
        try:
            optimizer = create_optimizer_v2(net, weight_decay=self.weight_decay, layer_decay=self.layer_decay, **told)
            views = {} if self.name in ELEMENTWISE else views_of(net)
        except (AssertionError, ImportError, ValueError) as error:  # CUDA or a package is missing; sharded weights
            raise ValueError(f"model.optimizer.name={self.name}: {error}{WAY_OUT}") from error
        if told.get("fused"):
            # It could unscale gradients itself, so Lightning will not clip them; but nobody scales them here.
            optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]  # fused ones have it
        if not views:
            return ByMesh(optimizer) if len(by_mesh(weights_of(optimizer))) > 1 else optimizer
        if self.name.startswith("kron"):
            raise ValueError(
                f"model.optimizer.name={self.name}: all tensors share its random draws, so that experts would not move "
                f"as separate layers do{WAY_OUT}"
            )
        return PerExpert(optimizer.param_groups, partial(create_optimizer_v2, **told), views)

    def _check_name(self) -> None:
        """Raises ValueError: what cannot be trained with, or betas that it does not take."""
        if self.name == "adahessian":
            raise ValueError(
                "model.optimizer.name=adahessian: it wants gradients of gradients, which a training step here does not "
                f"keep{WAY_OUT}"
            )
        if self.name.startswith("kron") and importlib.util.find_spec("opt_einsum") is None:
            raise ValueError(  # its products of four factors would fill the memory
                f"model.optimizer.name={self.name}: it needs a package; pip install opt_einsum{WAY_OUT}"
            )
        told = get_optimizer_info(self.name)
        takes = told.num_betas if told.has_betas else 0
        if self.betas is not None and len(self.betas) != takes:
            raise ValueError(
                f"model.optimizer.betas={list(self.betas)}: {self.name} takes "
                f"{f'{takes} of them' if takes else 'none'}; leave them out, or use another model.optimizer.name"
            )


@in_range("model.schedule.", warmup_steps=COUNT_OR_NONE, min_lr=NOT_NEGATIVE)
@dataclass(frozen=True)
class ScheduleSettings:
    """The learning rate over optimizer steps: linear warm-up from 0, then decay to min_lr at the last step.

    Args:
        decay: Shape after warm-up; constant leaves the rate where it is, and min_lr aside.
        warmup_steps: Optimizer steps of warm-up, 0 to 1e9 and fewer than there are.
        min_lr: Learning rate at the last step, in [0, 1e6] and at most the peak.
    """

    decay: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = 0
    min_lr: float = 1e-5

    def check_peak(self, lr: float) -> None:
        """Raises ValueError: the rate would climb after warm-up."""
        if self.min_lr > lr:
            raise ValueError(
                f"model.schedule.min_lr={self.min_lr}: the rate decays from model.optimizer.lr={lr} to it; use at most "
                "that, or a higher lr"
            )

    def build(self, optimizer: torch.optim.Optimizer, total_steps: int) -> Scheduler:
        """A timm scheduler stepped by `step_update(number of optimizer steps done)`."""
        if self.warmup_steps >= total_steps:
            raise ValueError(
                f"model.schedule.warmup_steps={self.warmup_steps}: this run has {total_steps} steps in all; "
                f"use fewer, or train longer (trainer.max_epochs)"
            )
        decay_steps = total_steps - self.warmup_steps
        shared: dict[str, Any] = {
            "warmup_t": self.warmup_steps, "warmup_lr_init": 0.0, "warmup_prefix": True, "t_in_epochs": False,
        }  # fmt: skip
        if self.decay == "constant":
            return CosineLRScheduler(optimizer, decay_steps, lr_min=optimizer.defaults["lr"], **shared)
        if self.decay == "linear":
            return PolyLRScheduler(optimizer, decay_steps, power=1.0, lr_min=self.min_lr, **shared)
        return CosineLRScheduler(optimizer, decay_steps, lr_min=self.min_lr, **shared)
