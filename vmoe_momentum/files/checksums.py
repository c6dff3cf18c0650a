"""Checksums of what is written, and their verification by whatever reads it: a flipped bit is an error, never other
weights.

A checkpoint carries the sha256 of its own bytes as the comment of its zip archive, so that it may be moved and renamed.
A folder lists the sha256 of each of its files in one of them, metadata.json (exports) or checksums.json (imports), and
of that list itself. What was written before there were checksums is read with a remark.
"""

import functools
import hashlib
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import IO, Any

COMMENT = b"vmoe_momentum sha256 "  # in a checkpoint, followed by 64 hexadecimal digits
SEALED = len(COMMENT) + 64
END = 22  # bytes of a zip archive's last record; its last two are the length of the comment
FILES, ITSELF = "sha256", "metadata_sha256"  # keys in a folder's list
LISTS = ("metadata.json", "checksums.json")
_OTHER = "copy it again from where it came, or use another checkpoint"
_AGAIN = "write the folder again, or copy it again"
PROSE = ("README.md",)  # for people to edit; nothing reads it


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- one archive


class _Sealing:
    """A file to write a zip archive to: hashes what passes, but holds back the archive's end until it is known."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.tail = file, hashlib.sha256(), b""

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        whole = len(data)
        if whole < END:
            data = memoryview(self.tail + bytes(data))
        else:
            self._pass_on(self.tail)
        cut = max(len(data) - END, 0)
        self._pass_on(data[:cut])
        self.tail = bytes(data[cut:])
        return whole

    def flush(self) -> None:
        pass  # torch asks for it; the end is still to come

    def finish(self) -> None:
        self._pass_on(self.tail[:-2] + SEALED.to_bytes(2, "little"))
        self.file.write(COMMENT + self.digest.hexdigest().encode())

    def _pass_on(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.file.write(data)


@contextmanager
def sealed(file: IO[bytes]) -> Iterator[Any]:
    """Gives something to write one zip archive to, as torch.save does; the archive in `file` then carries the sha256 of
    all bytes before its comment."""
    sealing = _Sealing(file)
    yield sealing
    sealing.finish()


def verify_archive(path: Path, setting: str = "") -> None:
    """Raises ValueError: `path` is not as it was written. Files that are no zip archives are left to their reader.

    setting: the name to blame, as "ckpt_path=". Without our comment each record's CRC32, which torch writes and does
    not read, is all there is.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - SEALED, 0))
        comment = file.read()
        if not comment.startswith(COMMENT):
            return _verify_records(path, setting)
        file.seek(0)
        digest, left = hashlib.sha256(), size - SEALED
        while chunk := file.read(min(left, 1 << 20)):
            digest.update(chunk)
            left -= len(chunk)
    if digest.hexdigest().encode() != comment[len(COMMENT) :]:
        raise ValueError(f"{setting}{path} is damaged: its bytes are not those of the sha256 in it; {_OTHER}")


def _verify_records(path: Path, setting: str) -> None:
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # whatever damaged bytes make of the reader
        raise ValueError(f"{setting}{path} is damaged ({error}); {_OTHER}") from error
    if bad is not None:
        raise ValueError(f"{setting}{path} is damaged: the record {bad} is not that of its CRC32; {_OTHER}")
    remark(f"{path}: written without a sha256 (by an earlier version, or another program); its CRC32s are right")


@functools.cache
def remark(text: str) -> None:
    """One line on stderr, once in a process."""
    print(text, file=sys.stderr, flush=True)


# ---- a folder


def listed(folder: Path, facts: dict[str, Any], known: Mapping[str, str] = MappingProxyType({})) -> dict[str, Any]:
    """`facts` with the sha256 of every file in `folder` (but the lists), and of themselves: what a list holds.

    known: those that somebody has already, by name.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in LISTS)
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    facts = {**facts, FILES: {name: known.get(name) or sha256(path) for name, path in names.items()}}
    return {**facts, ITSELF: _of_facts(facts)}


def _of_facts(facts: dict[str, Any]) -> str:
    """Of JSON content, however it is laid out; without its own digest."""
    content = {name: value for name, value in facts.items() if name != ITSELF}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def seal_folder(folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> None:
    """Writes checksums.json, for folders that have no other list."""
    facts = listed(folder, {"vmoe_momentum_checksums": 1}, known)
    (folder / LISTS[1]).write_text(json.dumps(facts, indent=1) + "\n")


def verify_folder(folder: Path, setting: str = "") -> None:
    """Raises ValueError: a file of `folder` is missing, or is not as it was written; the list itself is not."""
    path = next((folder / name for name in LISTS if (folder / name).is_file()), None)
    if path is None:
        return remark(f"{folder}: written without checksums (by an earlier version, or another program)")
    facts = read_list(path, setting)
    if FILES not in facts:
        return remark(f"{folder}: written without checksums (by an earlier version, or another program)")
    verify_files(path, facts, setting)


def read_list(path: Path, setting: str = "") -> dict[str, Any]:
    """What `listed` made of a folder; its files are not looked at. Without digests: as it is.

    Raises ValueError: it cannot be read, or is not as it was written.
    """
    try:
        facts = json.loads(path.read_text())
        if not isinstance(facts, dict):
            raise ValueError("it holds no facts")
    except (OSError, ValueError) as error:
        raise ValueError(f"{setting}{path} is damaged ({error}); {_AGAIN}") from error
    if {FILES, ITSELF} & set(facts) and facts.get(ITSELF) != _of_facts(facts):
        raise ValueError(f"{setting}{path} is damaged: its content is not that of its own sha256; {_AGAIN}")
    return facts


def verify_files(path: Path, facts: dict[str, Any], setting: str = "") -> None:
    """Raises ValueError: a file beside the list at `path` is missing, or is not as its `facts` say."""
    for name, digest in facts[FILES].items():
        file = path.parent / name
        if not file.is_file():
            raise ValueError(f"{setting}{file} is missing: {path.name} lists it; {_AGAIN}")
        if name not in PROSE and sha256(file) != digest:
            raise ValueError(f"{setting}{file} is damaged: its bytes are not of the sha256 in {path.name}; {_AGAIN}")
