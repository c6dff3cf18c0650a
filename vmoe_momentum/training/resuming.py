"""What makes a resumed run the run it would have been: random draws by step, checkpoints that are whole or absent."""

import random
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from ..files.checksums import sealed, verify_archive, verify_folder
from ..files.staging import draft_of
from ..models.sharded import is_sharded, read_sharded
from ..resources import room_for


class SeededSteps(Callback):
    """Draws of a training step (mixup, erasing, drop path, router noise) follow from (seed, epoch, batch, rank) alone.

    Lightning restores no generator. The seed is what seed_everything set when the run began; it lies in the checkpoint.
    """

    def __init__(self) -> None:
        self.seed: int | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if self.seed is None:
            self.seed = torch.initial_seed()

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        assert self.seed is not None  # since the run began
        # ranks that share their images (tensor parallel) must share their draws
        share = getattr(getattr(trainer, "strategy", None), "distributed_sampler_kwargs", None) or {}
        key = (self.seed, trainer.current_epoch, batch_idx, share.get("rank", trainer.global_rank))
        seeds = np.random.SeedSequence(key).generate_state(3)
        random.seed(int(seeds[0]))
        np.random.seed(seeds[1])
        if pl_module.device.type == "cpu":  # torch.manual_seed tells every kind of device, which takes milliseconds
            torch.default_generator.manual_seed(int(seeds[2]))
        else:
            torch.manual_seed(int(seeds[2]))

    def state_dict(self) -> dict[str, int | None]:
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, int | None]) -> None:
        self.seed = state_dict["seed"]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, to the disk, with a sha256, and renames: a run killed while saving keeps its last good
    checkpoint. Reads only what is as it was written.

    Lightning 2.6.6 writes to $TMPDIR and moves, which copies where that is another file system and can be cut short.

    Attributes:
        writing: A lock, held while a file is being written.
    """

    def __init__(self) -> None:
        self.writing = threading.Lock()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Raises OSError: no room; what was there stays."""
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        target = Path(path)
        draft = draft_of(target, for_folder=is_sharded(target))
        with self.writing, room_for(target, _size(checkpoint)), draft as file, sealed(file) as archive:
            torch.save(checkpoint, archive)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Raises ValueError: it is not as it was written."""
        if is_sharded(Path(path)):  # of more devices than this run has
            verify_folder(Path(path), "ckpt_path=")
            return read_sharded(Path(path))
        if Path(path).is_file():
            verify_archive(Path(path), "ckpt_path=")
        return super().load_checkpoint(path, *args, **kwargs)


def _size(value: Any) -> int:
    """Bytes of all tensors, those that share their storage counted once."""
    found: dict[int, int] = {}

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict | list | tuple):
            for part in item.values() if isinstance(item, dict) else item:
                add(part)

    add(value)
    return sum(found.values())
