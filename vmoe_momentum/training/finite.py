"""A run whose numbers stop being finite ends before it replaces a good checkpoint, and says where it began."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from ..ranges import COUNT_OR_NONE, in_range
from .resuming import SeededSteps
from .trainers import callbacks_of

# float16's loss scale is halved at each overflow; that gradients overflow at a smaller one than this has another cause
_SMALLEST_SCALE = 2.0**-8


class NotFinite(FloatingPointError):
    """A loss, gradient, weight or score became infinite or not a number.

    rank: where it began; all raise it.
    """

    def __init__(self, told: str, rank: int = 0) -> None:
        super().__init__(told)
        self.rank = rank


class Finding(NamedTuple):
    """What one rank found. cause: 0 where it began there, 1 where it may have come from another, 2 for nothing."""

    cause: int
    told: str
    weights: bool  # are all finite?
    rank: int = 0


@in_range("FiniteTraining.", skip_steps=COUNT_OR_NONE)
class FiniteTraining(Callback):
    """Ends a run at the first loss or gradient that is not finite, naming step, batch and layer; evaluation, too.

    In every run; give it by hand to set it: --trainer.callbacks+=FiniteTraining --trainer.callbacks.skip_steps=3.
    Overflow that float16's loss scaling mends by itself is none. All ranks skip a step or none does: it leaves weights
    and the optimizer's moments as they were, averages go on with the same weights, the schedule counts it as a step,
    and the mean loss of its epoch is not finite. `train/skipped_steps` logs how many there were. Weights that are not
    finite end a run whatever the setting. With trainer.gradient_clip_val the norm of all gradients must be finite, too:
    clipping by an infinite one would make every gradient zero.

    Args:
        skip_steps: Steps in a row that may be left out before the run ends, 0 to 1e9; 0 ends it at the first.
    """

    def __init__(self, skip_steps: int = 0) -> None:
        self.skip_steps, self.skipped, self.in_a_row = skip_steps, 0, 0
        self._current: tuple[Any, int] | None = None  # batch and its number
        self._bad: tuple[Any, int, float] | None = None  # the first whose loss is not finite, and that loss

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict.get("in_a_row", 0)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._current = (batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        self._keep(loss)

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any) -> None:
        """Before the weights move: gradients are those of the whole step, summed over its batches and the ranks."""
        found = [p.grad for group in optimizer.param_groups for p in group["params"]]
        gradients = finite(found, norm=2.0 if trainer.gradient_clip_val else float("inf"))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        mends_itself = scaler is not None and scaler.get_scale() > _SMALLEST_SCALE
        fine = self._bad is None and (gradients or mends_itself)
        fine = trainer.strategy.reduce_boolean_decision(fine, all=True)
        if fine:
            self.in_a_row = 0
        else:
            self._skip_or_end(trainer, pl_module, optimizer, gradients)
        if self.skip_steps:
            pl_module.log("train/skipped_steps", float(self.skipped))

    def _skip_or_end(self, trainer: pl.Trainer, pl_module: Any, optimizer: Any, gradients: bool) -> None:
        found = self._where(trainer, pl_module, gradients)
        if found.weights and self.in_a_row < self.skip_steps:
            self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
            optimizer.zero_grad(set_to_none=True)  # parameters without a gradient are left alone
            rank = f"rank {found.rank}, " if trainer.world_size > 1 else ""
            rank_zero_warn(f"{rank}{found.told}; step skipped, {self.skip_steps - self.in_a_row} more in a row may be")
            self._bad = None
            return
        raise NotFinite(f"{found.told}; {_way_out(trainer, pl_module)}", found.rank)

    def _latest(self) -> tuple[Any, int]:
        """The batch that runs or ran last, and its number."""
        assert self._current is not None  # one has begun
        return self._current

    def _keep(self, loss: Any) -> None:
        if self._bad is None and isinstance(loss, Tensor) and not bool(loss.isfinite().all()):
            self._bad = (*self._latest(), float(loss.detach().float().mean()))

    def _where(self, trainer: pl.Trainer, module: Any, gradients: bool) -> Finding:
        """What, step, batch and layer, in words, the same on all ranks."""
        batch, number, loss = self._bad or (*self._latest(), None)
        weights, layer = _state_or_layer(trainer, module, batch, number, training=True)
        what = "gradient" if loss is None else f"loss ({loss})"
        if layer is None and loss is None and not gradients:
            named = [name for name, p in module.model.named_parameters() if not finite([p.grad])]
            # backward begins with the last
            layer = f"the gradient of {named[-1]}" if named else "the norm of all, each of which is finite"
        at = f"step {trainer.global_step}, batch {number} of epoch {trainer.current_epoch}"
        told = f"{at}: the {what} is not finite, first in {layer or 'the loss itself'}"
        cause = 2 if loss is None else 0
        if loss is None and not gradients:  # the sum over ranks, or over some
            cause = 1
        return _agreed(Finding(cause, told, weights is None))

    # Evaluation: decided at its end, which all ranks reach.

    def _evaluated(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._current = (batch, batch_idx)
        self._keep(outputs[0] if isinstance(outputs, tuple) else outputs)

    def _decide(self, trainer: pl.Trainer, module: Any, what: str) -> None:
        if self._current is None or trainer.strategy.reduce_boolean_decision(self._bad is None, all=True):
            return
        batch, number, loss = self._bad or (*self._latest(), None)
        weights, layer = _state_or_layer(trainer, module, batch, number, training=False)
        value = "" if loss is None else f" ({loss})"
        told = f"step {trainer.global_step}, {what} batch {number}: its result{value} is not finite"
        told = f"{told}, first in {layer or 'the loss itself'}"
        found = _agreed(Finding(2 if loss is None else 0, told, weights is None))
        way_out = _way_out(trainer, module) if trainer.state.fn == "fit" else "use another checkpoint or precision"
        raise NotFinite(f"{found.told}; {way_out}", found.rank)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluated(outputs, batch, batch_idx)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._decide(trainer, pl_module, "validation")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._decide(trainer, pl_module, "test")

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._decide(trainer, pl_module, "prediction")


def refuse_to_save(module: Any, checkpoint: dict[str, Any]) -> None:
    """Raises NotFinite: weights or the optimizer's numbers, of any rank, are not; what was saved before stays."""
    found = first_not_finite(module.model)
    if found is None:
        named = dict(_tensors("the optimizer's state", checkpoint.get("optimizer_states", ())))
        if not finite(named.values()):
            found = next(name for name, value in named.items() if not finite([value]))
    trainer = module.trainer
    if trainer.strategy.reduce_boolean_decision(found is None, all=True):
        return
    told = f"step {trainer.global_step}: {found} is not finite, so no checkpoint is written"
    agreed = _agreed(Finding(2 if found is None else 0, told, False))
    raise NotFinite(f"{agreed.told}; {_way_out(trainer, module)}", agreed.rank)


def finite(tensors: Any, norm: float = float("inf")) -> bool:
    """Of floating tensors, of sharded ones this rank's part; None are skipped. One wait for the device for all.

    norm: which one of all together has to be finite.
    """
    own = [t.to_local() if hasattr(t, "to_local") else t for t in tensors if t is not None]
    values = [t.detach() for t in own if t.is_floating_point() and t.numel()]
    # the largest magnitude, unlike a norm of squares, overflows for none
    return not values or bool(nn.utils.get_total_norm(values, norm).isfinite())


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first parameter or buffer that is not."""
    named = [*model.named_parameters(), *model.named_buffers()]
    if finite(value for _, value in named):
        return None
    return next(name for name, value in named if not finite([value]))


def last_checkpoint(trainer: pl.Trainer) -> Path | None:
    """The file written last, of those that this run keeps."""
    paths = [
        Path(path)
        for saver in trainer.checkpoint_callbacks
        if isinstance(saver, ModelCheckpoint)
        for path in (saver.best_model_path, saver.last_model_path, saver._last_checkpoint_saved)
    ]
    return max(
        (path for path in paths if path.exists() and path.name), key=lambda path: path.stat().st_mtime, default=None
    )


def _way_out(trainer: pl.Trainer, module: Any) -> str:
    saved, rate = last_checkpoint(trainer), module.optimizer_settings.lr
    kept = f"{saved} stays the last good checkpoint; " if saved else ""
    return f"{kept}lower model.optimizer.lr={rate:g}, set trainer.gradient_clip_val or use another trainer.precision"


def _state_or_layer(
    trainer: pl.Trainer, module: Any, batch: Any, number: int, training: bool
) -> tuple[str | None, str | None]:
    """The first weight or buffer that is not finite, and the first of weights, pictures and layers."""
    weights = first_not_finite(module.model)
    layer = _first_layer(trainer, module, batch, number, training)  # by all ranks: sharded weights make it a collective
    return weights, weights or layer


def _first_layer(trainer: pl.Trainer, module: Any, batch: Any, number: int, training: bool) -> str | None:
    """Runs the batch once more, with the draws it had and without compiling; the layer whose output is not finite
    though nothing before it was so."""
    images = batch[0]
    if not finite([images]):
        return "the images"
    found: list[str] = []
    handles = []

    def hook(name: str) -> Any:
        def look(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not found and (bad := [where for where, value in _tensors("", output) if not finite([value])]):
                found.append(f"the output {bad[0].lstrip('.')} of {name}".replace("output  of", "output of"))

        return look

    for name, layer in module.model.named_modules():
        if name:  # inner layers are done first
            handles.append(layer.register_forward_hook(hook(name)))
    if training:
        for callback in callbacks_of(trainer):
            if isinstance(callback, SeededSteps):
                callback.on_train_batch_start(trainer, module, batch, number)
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
            module.training_losses(batch) if training else module(images)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested containers and plain objects, such as carries and plans of routers, with their names."""
    if isinstance(value, Tensor):
        yield name, value
    elif hasattr(value, "_asdict"):
        yield from _tensors(name, value._asdict())
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f"{name}.{key}", item)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _tensors(f"{name}.{index}" if len(value) > 1 else name, item)
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from _tensors(name, vars(value))


def _agreed(ours: Finding) -> Finding:
    """That of the first rank where it began; weights are those of all."""
    everyone: list[Any] = [ours]
    if dist.is_available() and dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, ours)
    rank, found = min(enumerate(everyone), key=lambda item: item[1].cause)
    return found._replace(rank=rank, weights=all(other.weights for other in everyone))
