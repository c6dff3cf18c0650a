"""What the data modules of pictures and of text share: this process's place among all, and where a run goes on."""

from __future__ import annotations

from typing import Any, TypeVar

import torch.distributed as dist
from lightning.pytorch import LightningDataModule

from .loader import EpochLoader

Loader = TypeVar("Loader", bound=EpochLoader[Any, Any])


class ResumingDataModule(LightningDataModule):
    """Keeps the training loader's position in checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self._train_loader: EpochLoader[Any, Any] | None = None
        self._train_state: dict[str, int] | None = None

    def keep_position(self, loader: Loader) -> Loader:
        """The training loader, at the position that a checkpoint holds, and whose own the next checkpoint will."""
        if self._train_state is not None:
            loader.load_state_dict(self._train_state)
            self._train_state = None
        self._train_loader = loader
        return loader

    def state_dict(self) -> dict[str, Any]:
        """The training loader's position. Lightning saves the loader's own state too, but does not restore it when
        the loader was built early, for `trainer.estimated_stepping_batches` (Lightning issue 20550)."""
        return {} if self._train_loader is None else {"train": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a saved position for the next training loader; testing a checkpoint has no use for it.

        And for the one that is there: with sharded weights checkpoints are read once loaders are made.
        """
        if self.trainer is None or self.trainer.state.fn == "fit":
            self._train_state = state_dict.get("train")
            if self._train_loader is not None and self._train_state is not None:
                self._train_loader.load_state_dict(self._train_state)


def shuffles(trainer: Any) -> bool:
    """Whether training draws a new order each epoch; for overfit_batches Lightning has it so in torch's DataLoader
    only."""
    return trainer is None or trainer.overfit_batches == 0


def rank_and_world_size(trainer: Any) -> tuple[int, int]:
    """This process's place among those that must see different data (tensor-parallel ranks share theirs)."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, getattr(trainer, "world_size", 1)  # more than 1 only where a run on several is rehearsed on one
    share = getattr(getattr(trainer, "strategy", None), "distributed_sampler_kwargs", None)
    if share is not None:
        return share["rank"], share["num_replicas"]
    return dist.get_rank(), dist.get_world_size()
