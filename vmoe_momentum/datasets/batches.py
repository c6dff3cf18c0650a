"""Which images make which batch: a pure function of (seed, epoch, rank), the same for both backends."""

from __future__ import annotations

import numpy as np


class BatchPlan:
    """The batches of one process, as arrays of image indices.

    Training shuffles by (seed, epoch), gives every process the same number of full batches and drops what is left. The
    k-th batches of all processes are the same images however many processes they are shared by.
    Evaluation keeps the stored order and visits each image exactly once over all processes: no padding with
    duplicates, which would bias a metric.

    Args:
        count: Images in the split.
        batch_size: Images per batch in this process.
        training: Shuffle and drop the incomplete last batch.
        seed: Seed of the order; epochs of one seed and equal epochs of two seeds are independent.
        rank: This process among `world_size`.
        world_size: Processes that share the split.
        repeats: Times a training image is shown in its epoch, each time augmented anew; the epoch stays as long, so it
            shows so many fewer images (repeated augmentation; order as timm's RepeatAugSampler).
        reshuffle: Shuffle anew each epoch; False repeats epoch 0's order, for overfitting a few batches on purpose.

    Raises:
        ValueError: The split is too small for the batch size and number of processes.
    """

    things = "images"  # of which a batch has batch_size

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        training: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        reshuffle: bool = True,
        repeats: int = 1,
    ) -> None:
        self.count, self.batch_size, self.training, self.seed = count, batch_size, training, seed
        self.rank, self.world_size, self.reshuffle, self.repeats = rank, world_size, reshuffle, repeats
        if training and not len(self):
            raise ValueError(
                f"data.batch_size={batch_size} on {world_size} device(s) needs {batch_size * world_size} training"
                f" images for one step, found {count}; lower data.batch_size or add images"
            )
        if not training and count < world_size:
            raise ValueError(
                f"{count} images are too few to evaluate on {world_size} devices; use at most {count} (trainer.devices)"
            )
        if not training and len(self) > count // world_size:
            raise ValueError(
                f"data.eval_batch_size={batch_size}: {count} images cannot give each of {world_size} devices"
                f" {len(self)} non-empty batches; raise data.eval_batch_size or evaluate on one device"
            )

    def __len__(self) -> int:
        """Batches per epoch, equal on every rank: collectives inside a forward would otherwise wait forever."""
        if self.training:
            return self.count // self.world_size // self.batch_size
        largest_share = -(-self.count // self.world_size)
        return -(-largest_share // self.batch_size)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """One epoch's draws in order, int64 arrays of at most `batch_size`; `images_of` says of which images."""
        indices = np.arange(self.count)
        if self.training:
            # A seed sequence, not seed + epoch: seed 0 at epoch 1 must not repeat seed 1 at epoch 0.
            indices = np.random.default_rng([self.seed, epoch if self.reshuffle else 0]).permutation(indices)
            shown = indices[: -(-self.count // self.repeats)]
            indices = (shown[:, None] + self.count * np.arange(self.repeats)).reshape(-1)[: self.count]
        share = np.ascontiguousarray(indices[self.rank :: self.world_size])
        if self.training:
            share = share[: len(self) * self.batch_size]
        cuts = list(range(self.batch_size, len(share), self.batch_size))
        if len(cuts) + 1 < len(self):
            # This rank's share is one image short of starting another batch: split its last batch instead.
            cuts.append(len(share) - 1)
        return np.split(share, cuts)

    def images_of(self, draws: np.ndarray) -> np.ndarray:
        """The image of each draw; draw // count says which of its repeats it is."""
        return draws % self.count

    def identity(self) -> dict[str, int]:
        """What must agree for a position inside an epoch to mean the same images."""
        return {
            "data.seed": self.seed,
            "data.batch_size": self.batch_size,
            "images": self.count,
            "devices": self.world_size,
            "data.repeated_augmentation": self.repeats,
        }
