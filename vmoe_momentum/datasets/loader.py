"""An iterable over batches that Lightning can number, stop early, checkpoint and resume.

Lightning calls `iter()` once to look and throws the result away, calls `set_epoch` after the first `iter()`,
and stops at `len()` without ever exhausting the iterator. So nothing starts before the first `next`, the epoch is read
then, and whatever was started is closed in a `finally`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Generator
from types import SimpleNamespace
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch

Batch = tuple[torch.Tensor, torch.Tensor]
Piece = TypeVar("Piece")  # what a plan says of a batch
Made = TypeVar("Made")  # the batch


class Plan(Protocol[Piece]):
    """What makes which batch in this process."""

    things: str  # of which a batch has batch_size
    rank: int
    world_size: int

    def __len__(self) -> int: ...

    def batches(self, epoch: int) -> list[Piece]: ...

    def identity(self) -> dict[str, int]: ...


class EpochLoader(ABC, Generic[Piece, Made]):
    """Yields batches that are safe to keep: `(images uint8 [B, 3, H, W] channels_last, labels int64 [B])`, or text's.

    A backend implements `open`. Each `iter()` runs the epoch last given to `set_epoch` (0 at first).
    """

    def __init__(self, plan: Plan[Piece]) -> None:
        self.plan = plan
        self._epoch = 0
        self._position = (0, 0)  # (epoch, batches yielded in it): what a checkpoint records
        self._resume: dict[str, int] | None = None

    @abstractmethod
    def open(self, batches: list[Piece], epoch: int) -> Generator[Made, None, None]:
        """Starts decoding `batches` of `epoch`'s draws; closing the generator must release every thread and process."""

    @property
    def batch_sampler(self) -> SimpleNamespace:
        """Where Lightning finds `set_epoch`. A plain `sampler` would do too, but makes it suspect shuffling."""
        return SimpleNamespace(sampler=self)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch the next iteration runs."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Generator[Made, None, None]:
        epoch, start = self._epoch, self._start(self._epoch)
        self._position = (epoch, start)
        source = self.open(self.plan.batches(epoch)[start:], epoch)
        try:
            for done, batch in enumerate(source, start=start + 1):
                self._position = (epoch, done)
                yield batch
        finally:
            source.close()

    def state_dict(self) -> dict[str, int]:
        """Position after the last batch handed out, with what identifies the order it is a position in."""
        if self._resume is not None:
            return dict(self._resume)
        epoch, batch = self._position
        return {"epoch": epoch, "batch": batch, "batches": len(self), **self.plan.identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continues at a saved position: the rest of that epoch's order, without decoding what came before.

        On another number of devices, too, where a step has as many images (or streams of text), which are the same ones
        then; else with the next epoch, and a line says so. The first batch raises ValueError for another order.
        """
        self._resume = state

    def _start(self, epoch: int) -> int:
        """First batch of `epoch` to yield. A position is used once, and at an epoch's boundary there is none."""
        state, self._resume = self._resume, None
        if state is None or state["epoch"] != epoch or state["batch"] in (0, state["batches"]):
            return 0
        ours, moved = self.plan.identity(), state.get("devices", self.plan.world_size) != self.plan.world_size
        sizes = [told["data.batch_size"] * told["devices"] for told in (ours, {**ours, **state})]
        for setting, value in ours.items():
            if moved and setting in ("devices", "data.batch_size"):
                continue
            if state.get(setting, value) != value:
                raise ValueError(
                    f"{setting}={value}: the checkpoint was saved inside an epoch with {setting}={state[setting]};"
                    f" resume with that value, or from a checkpoint saved at the end of an epoch"
                )
        if sizes[0] == sizes[1]:
            return state["batch"]
        if self.plan.rank == 0:
            there = f"epoch {epoch}, in steps of {sizes[1]} {self.plan.things} on {state['devices']} devices"
            here = f"{sizes[0]} on {ours['devices']}"
            told = f"the checkpoint lies inside {there}; here they are {here}: training goes on with the next epoch"
            print(told, file=sys.stderr)
        return len(self)


ImageLoader = EpochLoader[np.ndarray, Batch]  # arrays of draws make them
