"""Who computes what: processes that share a folder, on one machine or several, claim a part before they begin it.

A claim is a lock on one byte of FOLDER/.claims. The kernel gives it back when its process ends, however that ends, and
there is nothing to clear up. Where the file system has no locks (some network ones), everybody gets every claim: parts
are then computed twice at worst, with equal results.
"""

import errno
import fcntl
import hashlib
import os
import time
from pathlib import Path

_TAKEN = (errno.EAGAIN, errno.EACCES)  # which of them depends on the system


class Claims:
    """Of this process. A context manager; all are given back at its end. One a process and folder: another one would
    share its claims, and give them back."""

    def __init__(self, folder: Path) -> None:
        """Raises OSError: nothing can be written there."""
        folder.mkdir(parents=True, exist_ok=True)
        self.file = os.open(folder / ".claims", os.O_RDWR | os.O_CREAT, 0o666)
        self.missing: str | None = None  # why there are no locks here
        self.take("")  # to know it at once
        self.give_back("")

    def __enter__(self) -> "Claims":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.file)

    def take(self, name: str) -> bool:
        """False where another process has it."""
        try:
            self._lock(fcntl.LOCK_EX | fcntl.LOCK_NB, name)
        except OSError as error:
            if error.errno in _TAKEN:
                return False
            self.missing = error.strerror
        return True

    def wait_for(self, name: str, seconds: float) -> None:
        """`take`, but for a process that keeps it longer than that."""
        end = time.monotonic() + seconds
        while not self.take(name) and time.monotonic() < end:
            time.sleep(0.2)

    def give_back(self, name: str) -> None:
        try:
            self._lock(fcntl.LOCK_UN, name)
        except OSError as error:
            self.missing = error.strerror

    def _lock(self, how: int, name: str) -> None:
        # of a record, not flock: workers that are forked do not inherit it, and keep it, and NFS knows it between hosts
        fcntl.lockf(self.file, how, 1, int(hashlib.sha256(name.encode()).hexdigest()[:15], 16), os.SEEK_SET)
