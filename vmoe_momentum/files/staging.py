"""All or nothing: a folder or file is built under a hidden sibling name and takes its own only when it is complete.

Whoever builds holds a lock on it for as long as it lives, so what a killed process left is known at the next start.
Locks, not process numbers, which mean nothing in another container or on another host. Where the file system has no
locks, and for a day where another kernel wrote, whose locks may not be seen here, drafts are kept.
"""

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
from typing import BinaryIO

_KEPT_SECONDS = 24 * 3600
_ENDING = 2.0  # seconds in which the processes of a command that was killed let go of their lock, one after another
_LOCK, _OLD = "lock", "old"  # in the folder around a draft: the lock, and what is being replaced


@contextmanager
def staged(out: Path, overwrite: bool, mark: str, for_file: bool = False) -> Iterator[Path]:
    """Gives a folder to fill; renames it to `out` when the block succeeds, removes it when it raises.

    mark: a file that every finished folder of this kind has. Raises ValueError when `out` exists and `overwrite` is
    False, or is True and `out` lacks the mark: what it would delete may be anything. for_file: A file may have this
    name; it is then removed.
    """
    remove_abandoned(out)
    if not (for_file and out.is_file()):
        refuse_existing(out, overwrite, mark)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        around, claim = _locked_folder(out)
        work = around / "new"
        work.mkdir()
    except OSError as error:
        raise ValueError(f"--out={out}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield work
        umask = os.umask(0)
        os.umask(umask)
        for path in work.rglob("*"):  # the 0600 of safetensors is not right for what others read
            found = path.lstat()
            if stat.S_ISREG(found.st_mode) and found.st_nlink == 1:  # links are somebody else's files, too
                path.chmod(found.st_mode | (0o444 & ~umask))
        _swap(work, out)
    finally:
        shutil.rmtree(around, ignore_errors=True)
        os.close(claim)


@contextmanager
def resumed(out: Path, overwrite: bool, mark: str) -> Iterator[Path]:
    """`staged` for what takes hours: the folder, OUT.unfinished, stays when the block raises or is killed, and is given
    again to the next call, with what lies in it.

    Raises ValueError: as `staged`, and where another process fills that folder.
    """
    refuse_existing(out, overwrite, mark)
    work = unfinished(out)
    try:
        work.mkdir(parents=True, exist_ok=True)
        claim = os.open(work / f".{_LOCK}", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ValueError(f"--out={out}: {work} cannot be written ({error.strerror}); choose another folder") from error
    try:
        limit = time.monotonic() + _ENDING
        while not _lock(claim, close=False):
            if time.monotonic() > limit:
                raise ValueError(f"--out={out}: another process fills {work}; wait for it, or choose another folder")
            time.sleep(0.05)
        yield work
        (work / f".{_LOCK}").unlink()
        _replace_folder(work, out)
    finally:
        os.close(claim)


def unfinished(out: Path) -> Path:
    """Where what is to be `out` grows, for people to see."""
    return out.with_name(f"{out.name}.unfinished")


@contextmanager
def draft_of(target: Path, for_folder: bool = False) -> Iterator[BinaryIO]:
    """Gives a file to write, which is on the disk and called `target` when the block succeeds, and gone when it raises.

    for_folder: A folder may have this name; it is then removed. Removes what killed processes left of their attempts at
    `target`. Raises OSError: no room, no right, a folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(target)
    handle, draft = _locked_file(target)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            umask = os.umask(0)
            os.umask(umask)
            os.fchmod(file.fileno(), 0o666 & ~umask)
            os.fsync(file.fileno())
            if for_folder and target.is_dir():
                _replace_folder(draft, target)
            else:
                draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_together(folder: Path, files: dict[str, bytes]) -> None:
    """Every one of them whole, or none: all are written under other names before the first takes its own.

    files: by name, or path in the folder.
    Raises ValueError: there is no room, or the folder cannot be written; what stood there stays.
    """
    needed, partial = sum(map(len, files.values())), {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        umask = os.umask(0)
        os.umask(umask)
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            handle, place = tempfile.mkstemp(
                dir=(folder / name).parent, prefix=f".{Path(name).name}.", suffix=".partial"
            )
            partial[name] = Path(place)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(handle)  # some file systems tell of a full disk only then
            partial[name].chmod(0o666 & ~umask)
        for name, draft in partial.items():
            draft.replace(folder / name)
    except OSError as error:
        raise ValueError(
            f"{folder}: {', '.join(files)} cannot be written ({error.strerror}): {needed:,} bytes needed, "
            f"{_free(folder)} free; make room, or choose another folder"
        ) from error
    finally:
        for draft in partial.values():
            draft.unlink(missing_ok=True)


def _free(folder: Path) -> str:
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "0"


def refuse_existing(out: Path, overwrite: bool, mark: str) -> None:
    """Raises ValueError unless `out` is free, or may be overwritten and is of the kind that has `mark`.

    Removes what killed processes left of their attempts at it before it looks.
    """
    remove_abandoned(out)
    if not out.exists() and not out.is_symlink():
        above = next(folder for folder in out.absolute().parents if folder.exists())
        if not above.is_dir() or not os.access(above, os.W_OK):
            raise ValueError(f"--out={out}: {above} is no folder that can be written; choose another")
        return
    if not overwrite:
        raise ValueError(f"--out={out}: it exists; choose another folder, or replace it with --overwrite")
    if not (out / mark).is_file() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"--out={out}: not written by this command (no {mark}), so it is not overwritten; remove it")


def remove_abandoned(out: Path) -> None:
    """What killed processes left of their attempts at `out`; what one of them was about to replace comes back."""
    for left in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        _remove_if_left(left, out)


def _remove_if_left(left: Path, out: Path | None = None) -> None:
    """Removes a draft whose lock nobody holds, once that can be told."""
    lock = left / _LOCK if left.is_dir() and (left / _LOCK).exists() else left
    try:
        claim = os.open(lock, os.O_RDONLY if lock.is_dir() else os.O_RDWR)
    except OSError:  # somebody else was quicker
        return
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # no lock in a folder: just being made, or of an earlier version of this file
        if lock.is_dir() or not left.name.startswith(_prefix(Path(left.name.rsplit(".", 2)[0][1:]))):
            newest = max(path.lstat().st_mtime for path in (left, *(left.iterdir() if left.is_dir() else ())))
            if time.time() - newest <= _KEPT_SECONDS:
                return
        if out is not None and (left / _OLD).exists() and not out.exists():
            (left / _OLD).rename(out)
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    except OSError:  # its writer lives, or there are no locks here
        pass
    finally:
        os.close(claim)


def _locked_folder(out: Path) -> tuple[Path, int]:
    """A new hidden folder beside `out`, and what holds its lock until it is closed."""
    while True:
        around = Path(tempfile.mkdtemp(prefix=_prefix(out), suffix=".partial", dir=out.parent))
        claim = os.open(around / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        if _lock(claim):
            return around, claim


def _locked_file(target: Path) -> tuple[int, Path]:
    """A new hidden file beside `target`: what writes it and holds its lock until it is closed, and its name."""
    while True:
        claim, name = tempfile.mkstemp(prefix=_prefix(target), suffix=".partial", dir=target.parent)
        if _lock(claim):
            return claim, Path(name)


def _lock(claim: int, close: bool = True) -> bool:
    """False, and closed if `close`, where somebody took it for abandoned between its making and its locking."""
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if close:
            os.close(claim)
        return False
    except OSError:
        return True  # no locks here: nobody else can take it either
    if os.fstat(claim).st_nlink == 0:
        if close:
            os.close(claim)
        return False
    return True


def _prefix(target: Path) -> str:
    """Of a draft's name: whose it is, and which running kernel wrote it, the same one in all its containers."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    except OSError:
        kernel = f"unknown{os.getpid()}"  # so that no draft is taken for one of this kernel's
    return f".{target.name}.{kernel}-"


def _replace_folder(draft: Path, out: Path) -> None:
    around, claim = _locked_folder(out)
    try:
        work = around / "new"
        draft.rename(work)
        _swap(work, out)
    finally:
        shutil.rmtree(around, ignore_errors=True)
        os.close(claim)


def _swap(work: Path, out: Path) -> None:
    """Renames `work` to `out`; what stood there is deleted only after the new one is in place."""
    if not out.exists():
        work.rename(out)
        return
    old = work.with_name(_OLD)
    out.rename(old)
    try:
        work.rename(out)
    except OSError:
        old.rename(out)
        raise


def check_writable(folder: str | os.PathLike[str], setting: str) -> None:
    """Raises ValueError: nothing can be written there, or it is a file."""
    path = Path(folder).absolute()
    above = next(place for place in (path, *path.parents) if place.exists())
    try:  # permissions do not tell of every file system
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        raise ValueError(f"{setting}={folder}: cannot be written ({error.strerror}); choose another folder") from error
