"""Checkpoints that are written while training goes on."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist

from ..models.sharded import Group, write_sharded_later


class Later:
    """One after the other, by all ranks together, in a thread and a process group of their own."""

    def __init__(self) -> None:
        self._group: Group = None
        self._ends: ThreadPoolExecutor | None = None
        self._saving: Future[None] | None = None
        self._after: list[Future[None]] = []

    def write(self, checkpoint: dict[str, Any], path: Path, writing: AbstractContextManager[Any]) -> None:
        """Once the one before is whole. Raises OSError: that one could not be written, or this one not begun."""
        self.finish()
        if self._group is None:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo"))  # all ranks are in it
        self._ends = self._ends or ThreadPoolExecutor(1, "checkpoints")
        self._saving = write_sharded_later(checkpoint, path, self._group, self._ends, writing)

    def then(self, action: Callable[[], None]) -> None:
        """At once where nothing is being written; else once that is whole, and not at all where it fails."""
        saving = self._saving
        if saving is None:
            action()
        else:
            assert self._ends is not None  # what is being written was begun in it
            self._after.append(self._ends.submit(lambda: None if saving.exception() else action()))

    def check(self) -> None:
        """Raises OSError: what was being written has failed."""
        if self._saving is not None and self._saving.done():
            self.finish()

    def finish(self) -> None:
        """Waits. Raises OSError: what was being written has failed."""
        pending = [] if self._saving is None else [self._saving, *self._after]
        self._saving, self._after = None, []
        for future in pending:
            future.result()

    def close(self) -> None:
        """Waits, whatever becomes of it: another error is on its way."""
        if self._ends is not None:
            self._ends.shutdown()
        self._ends, self._saving, self._after = None, None, []
