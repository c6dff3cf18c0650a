"""What every module shares that `fit` trains, and what callbacks and checkpoints ask of it."""

import math
from abc import ABC, abstractmethod
from typing import Any

import lightning.pytorch as pl
from torch import nn

from ..models.saved import KEY
from .finite import refuse_to_save
from .identity import check_checkpoint
from .meshes import by_mesh, clip_gradients, weights_of
from .optimization import OptimizerSettings, ScheduleSettings
from .profile import Cost


class Trained(pl.LightningModule, ABC):
    """Optimizer, schedule, clipping, and checkpoints that say what network they are of."""

    model: nn.Module  # what is called, with the network as `net`
    optimizer_settings: OptimizerSettings
    schedule_settings: ScheduleSettings
    training_settings: dict[str, Any]  # other settings that training follows, by their names
    override_model: bool  # load a checkpoint of other settings of the network

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What a checkpoint says of the network beyond the tensors. JSON only, so that it loads with weights_only."""

    @abstractmethod
    def logged(self) -> list[str]:
        """Metrics that a run logs by the module itself, but for the loss."""

    @abstractmethod
    def cost(self) -> Cost:
        """Parameters, and operations of what `told` says."""

    @abstractmethod
    def told(self, cost: Cost) -> dict[str, str]:
        """What is printed of the network before a run."""

    @abstractmethod
    def saved_bytes(self, data: Any) -> int | None:
        """What a training batch of the data module keeps for the backward pass, in float32; None: not known."""

    @abstractmethod
    def seconds_per_batch(self, data: Any) -> float:
        """Of a forward and backward pass on one of its training batches."""

    @abstractmethod
    def check_data(self, data: Any) -> None:
        """Raises ValueError: what the network cannot be trained on."""

    @abstractmethod
    def try_batch(self, data: Any) -> None:
        """A forward pass of training on a batch without content."""

    def to(self, *args: Any, **kwargs: Any) -> "Trained":
        """Lightning's, but for networks without memory yet: weight averaging moves its copy at once."""
        on_meta = any(parameter.is_meta for parameter in self.parameters())
        return self if on_meta else super().to(*args, **kwargs)

    def configure_optimizers(self) -> Any:  # timm's schedulers are none of torch's, which Lightning's type names
        steps = self.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise ValueError(
                f"trainer.max_epochs={self.trainer.max_epochs}: the schedule decays to the last step, so there must be "
                "one; set trainer.max_epochs or trainer.max_steps"
            )
        net, fused = self.model.get_submodule("net"), self.trainer.precision != "16-mixed"
        optimizer = self.optimizer_settings.build(net, fused=fused)
        scheduler = self.schedule_settings.build(optimizer, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        weights = weights_of(optimizer)
        if not gradient_clip_val or len(by_mesh(weights)) < 2:
            return super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        clip_gradients(weights, gradient_clip_val, gradient_clip_algorithm)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step_update(self.global_step)  # timm's: the rate of the step to come

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_to_save(self, checkpoint)
        checkpoint[KEY] = self.facts()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_checkpoint(self, checkpoint, self.facts(), self.override_model)
