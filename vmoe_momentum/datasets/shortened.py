"""A mapped file that is cut short while it is read: the kernel then kills the process, by SIGBUS, without a word.

Sizes are looked at before each batch, which gives an ordinary error. What is cut in the middle of one cannot be caught
in Python, whose handlers run only after the instruction that faults, again and again: there a compiled handler writes
the line and ends the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
from functools import cache
from pathlib import Path


class CutShort(ValueError):
    """A file that is smaller than when it was opened."""


class Watched:
    """A file whose size must stay."""

    def __init__(self, path: Path) -> None:
        self.path, self.opened = path, path.stat()

    def check(self) -> None:
        """Raises CutShort. A file put in its place is none of ours: the old one stays mapped."""
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return
        if now.st_ino == self.opened.st_ino and now.st_size < self.opened.st_size:
            raise CutShort(_message(self.path, f"{now.st_size} of {self.opened.st_size} bytes are left"))


def _message(path: Path, found: str) -> str:
    return (
        f"{path}: cut short while it was read ({found}); bring it back or prepare it again, then go on from the last"
        " checkpoint with --ckpt_path"
    )


@cache  # which also keeps handler and message for as long as the process may be signalled
def speak_before_sigbus(folder: Path) -> object:
    """From now on this process ends with a line that names `folder`, and 1, where a mapped file is gone under it."""
    from numba import cfunc, types  # as heavy as ffcv, which brings it

    text = os.fsencode(f"vmoe-momentum: {_message(folder, 'SIGBUS')}\n")
    buffer, libc = ctypes.create_string_buffer(text), ctypes.CDLL(None)
    write, leave, address, size = libc.write, libc._exit, ctypes.addressof(buffer), len(text)
    write.argtypes, write.restype = (ctypes.c_int, ctypes.c_size_t, ctypes.c_size_t), ctypes.c_ssize_t
    leave.argtypes, leave.restype = (ctypes.c_int,), None

    @cfunc(types.void(types.int32))
    def handler(number: int) -> None:
        write(2, address, size)
        leave(1)

    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGBUS, handler.address)
    return buffer, handler
