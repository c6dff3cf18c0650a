"""All or nothing: a folder is built under a hidden sibling name and takes its own only when it is complete."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ABANDONED_SECONDS = 24 * 3600


@contextmanager
def staged(out: Path, overwrite: bool, mark: str) -> Iterator[Path]:
    """Gives a folder to fill; renames it to `out` when the block succeeds, removes it when it raises.

    mark: a file that every finished folder of this kind has. Raises ValueError when `out` exists and `overwrite` is
    False, or is True and `out` lacks the mark: what it would delete may be anything.
    """
    refuse_existing(out, overwrite, mark)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    except OSError as error:
        raise ValueError(f"--out={out}: cannot be written ({error.strerror}); choose another folder") from error
    claim = _claim(work)
    try:
        yield work
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)  # mkdtemp's 0700 is right for secrets, not for what others read
        for path in work.rglob("*"):  # nor is the 0600 of safetensors
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:  # links are somebody else's files, too
                path.chmod(found.st_mode | (0o444 & ~umask))
        _swap(work, out)
    finally:
        if claim is not None:
            os.close(claim)
        shutil.rmtree(work, ignore_errors=True)


def write_together(folder: Path, files: dict[str, bytes]) -> None:
    """Every one of them whole, or none: all are written under other names before the first takes its own.

    Raises ValueError: there is no room, or the folder cannot be written; what stood there stays.
    """
    needed, partial = sum(map(len, files.values())), {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        umask = os.umask(0)
        os.umask(umask)
        for name, content in files.items():
            handle, place = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".partial")
            partial[name] = Path(place)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(handle)  # some file systems tell of a full disk only then
            partial[name].chmod(0o666 & ~umask)
        for name, place in partial.items():
            place.replace(folder / name)
    except OSError as error:
        raise ValueError(
            f"{folder}: {', '.join(files)} cannot be written ({error.strerror}): {needed:,} bytes needed, "
            f"{_free(folder)} free; make room, or choose another folder"
        ) from error
    finally:
        for place in partial.values():
            place.unlink(missing_ok=True)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "0"


def refuse_existing(out: Path, overwrite: bool, mark: str) -> None:
    """Raises ValueError unless `out` is free, or may be overwritten and is of the kind that has `mark`."""
    if not out.exists() and not out.is_symlink():
        above = next(folder for folder in out.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise ValueError(f"--out={out}: {above} is no folder that can be written; choose another")
        return
    if not overwrite:
        raise ValueError(f"--out={out}: it exists; choose another folder, or replace it with --overwrite")
    if not (out / mark).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out={out}: not written by this command (no {mark}), so it is not overwritten; remove it")


def _claim(folder: Path) -> int | None:
    """A lock held until this process ends, however it does; None where it is taken, or the file system has none."""
    try:
        claim = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return claim
    except OSError:
        os.close(claim)
        return None


def _remove_abandoned(out: Path) -> None:
    """What processes that were killed left of their attempts at `out`: a day old, as other hosts' locks may not be seen
    here, and locked by nobody."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        if time.time() - left.lstat().st_mtime > _ABANDONED_SECONDS and (claim := _claim(left)) is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(claim)


def _swap(work: Path, out: Path) -> None:
    """Renames `work` to `out`; what stood there is deleted only after the new folder is in place."""
    if not out.exists():
        work.rename(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent)) / out.name
    out.rename(old)
    try:
        work.rename(out)
    except OSError:
        old.rename(out)
        raise
    finally:
        shutil.rmtree(old.parent, ignore_errors=True)


def check_writable(folder: str | os.PathLike[str], setting: str) -> None:
    """Raises ValueError: nothing can be written there, or it is a file."""
    path = Path(folder).absolute()
    above = next(place for place in (path, *path.parents) if place.exists())
    try:  # permissions do not tell of every file system
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ValueError(f"{setting}={folder}: cannot be written ({error.strerror}); choose another folder") from error
