"""Lightning callbacks: what is printed before a run, and what is logged on validation."""

import time
from contextlib import ExitStack
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from rich.console import Console
from rich.table import Table
from torch.distributed.fsdp import FSDPModule

from ..specs import describe
from .budget import budget, refuse_too_large, shape_of
from .instruments import RouterWatch, watch_routers
from .trainers import data_of


class RouterStats(Callback):
    """Logs, per MoE block and validation pass: `val/block5/load_0` ... (share of assignments per expert), `dropped`,
    `entropy` (of the gates, nats), `token_norm`, `update_norm` and `momentum_norm`. Nothing for dense networks."""

    def __init__(self) -> None:
        self.stack, self.watch = ExitStack(), RouterWatch()

    def _start(self, module: Any) -> None:
        self.stack.close()
        self.watch = self.stack.enter_context(watch_routers(module.model.net))

    def _finish(self, module: Any, stage: str) -> None:
        self.stack.close()
        for block, stats in self.watch.result().items():
            values = {f"load_{expert}": share for expert, share in enumerate(stats.load)}
            values |= {name: value for name, value in stats._asdict().items() if name != "load" and value is not None}
            # means over the whole pass already; other ranks may have seen another number of tokens, see _evaluate
            weight = int(self.watch.sums[block]["tokens"]) * module.trainer.world_size
            module.log_dict({f"{stage}/{block}/{k}": v for k, v in values.items()}, batch_size=weight, sync_dist=True)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._start(pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish(pl_module, "val")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._start(pl_module)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish(pl_module, "test")

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self.stack.close()


class EpochSeconds(Callback):
    """Logs `train/epoch_seconds`, validation not counted. The first epoch includes compiling data pipelines; one that
    began in another run, before it was resumed, is not logged."""

    def __init__(self) -> None:
        self.start: float | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.start = time.perf_counter()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking and self.start is not None:
            pl_module.log("train/epoch_seconds", time.perf_counter() - self.start, batch_size=1, sync_dist=True)


class RunSummary(Callback):
    """Prints what is about to be trained, where, and for how long, before the first step; refuses what has no room."""

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """While the network is whole. Raises ValueError: weights, gradients and moments are more than the memory."""
        if stage == "fit":
            self.cost = pl_module.cost()
            self.budget = budget(trainer, pl_module)
            refuse_too_large(self.budget, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        cost, facts = self.cost, pl_module.facts()
        steps = int(trainer.estimated_stepping_batches)
        network, *more = pl_module.told(cost).items()
        rows = dict([network])
        for name in ("rule", "router"):
            if name in facts["settings"]:
                rows[name] = describe(facts["settings"][name])
        rows["parameters"] = f"{cost.parameters:,} in all, {cost.active:,} active"
        rows |= dict(more)
        rows["devices"] = shape_of(trainer)
        rows["memory"] = self.budget.line() + (", on each of them" if trainer.world_size > 1 else "")
        rows["steps"] = f"{steps:,}"
        data = data_of(trainer)
        if data is not None and not isinstance(pl_module.model, FSDPModule):  # sharded ones have no passes to time
            batches = steps * trainer.accumulate_grad_batches
            hours = batches * pl_module.seconds_per_batch(data) / 3600
            rows["estimate"] = f"{_duration(hours)} of forward and backward passes on {pl_module.device}"
        table = Table(show_header=False, box=None)
        for name, value in rows.items():
            table.add_row(f"[bold]{name}[/bold]", value)
        if trainer.is_global_zero:
            Console().print(table)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        found = {"logs": trainer.log_dir}
        for checkpoint in trainer.checkpoint_callbacks:
            if isinstance(checkpoint, ModelCheckpoint):
                found["last checkpoint" if checkpoint.monitor is None else "best checkpoint"] = (
                    checkpoint.best_model_path
                )
        if trainer.is_global_zero:
            for name, path in found.items():
                if path:
                    Console().print(f"[bold]{name}[/bold]  {path}", soft_wrap=True, highlight=False)


def _duration(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes ({hours:.2g} hours)"
