"""Cores, and full disks and memory in words that name the file or the setting."""

import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SOCKET = 107  # characters of a socket's name, at most (unix(7)); multiprocessing adds 32 to TMPDIR's
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_MEMORY = re.compile(r"DefaultCPUAllocator: |not enough memory|CUDA out of memory|Cannot allocate memory")


def usable_cores() -> int:
    """Cores this process may run on; where the system does not say (macOS), all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_sockets(setting: str) -> None:
    """Raises ValueError: the processes that `setting` asks for could not be told from; they would wait for ever."""
    folder = tempfile.gettempdir()
    if len(folder) + 32 > _SOCKET:
        raise ValueError(
            f"TMPDIR={folder}: {len(folder)} characters are too many for the sockets of worker processes, "
            f"{_SOCKET - 32} at most; set TMPDIR to a shorter folder, or {setting}=0"
        )


class Exhausted(OSError):
    """A disk or memory is full, in words for people."""


@contextmanager
def room_for(path: Path, needed: int) -> Iterator[None]:
    """Raises OSError with path, bytes needed and free where the block finds the disk full, however it says so."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = _full(error)
        if full is None:
            raise
        raise Exhausted(_words(path, full, needed)) from error


def explain(error: BaseException, way_out: str) -> str | None:
    """One line for a full disk or memory, None for other errors. way_out: what takes less memory."""
    if isinstance(error, Exhausted):
        return str(error)
    if full := _full(error):
        path = full.filename or _being_written(full)
        return _words(Path(path) if path else None, full, None)
    if is_out_of_memory(error):
        asked = re.search(r"allocate (\d+ bytes|[\d.]+ \wiB)", str(error))
        return f"out of memory{f' (asked for {asked[1]})' if asked else ''}: {way_out}"
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Of the machine or a GPU."""
    torch = sys.modules.get("torch")  # where it is not loaded, the error is not torch's
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError) if torch else MemoryError)
    return known or (isinstance(error, RuntimeError | OSError) and bool(_MEMORY.search(str(error))))


def _full(error: BaseException | None) -> OSError | None:
    """The full disk behind an error: writers of archives raise another one while they clear up."""
    seen = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _words(path: Path | None, full: OSError, needed: int | None) -> str:
    asked = "" if needed is None else f"about {needed:,} bytes needed, "
    free = "free space unknown"
    if path is not None:
        folder = next((above for above in path.absolute().parents if above.is_dir()), Path("/"))
        free = f"{shutil.disk_usage(folder).free:,} bytes free"
    room = f"{full.strerror} ({asked}{free})"
    return f"{path or 'a file'}: {room}; what was complete is kept: make room, or write to another disk"


def _being_written(error: OSError) -> str | None:
    """The file whose writing raised: `write` says no name, but the innermost frame that holds an open file does."""
    found, trace = None, error.__traceback__
    while trace is not None:
        for value in trace.tb_frame.f_locals.values():
            name = getattr(value, "name", None) if hasattr(value, "write") else None
            found = name if isinstance(name, str) else found
        trace = trace.tb_next
    return found
