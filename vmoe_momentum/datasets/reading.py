"""Picture files read in threads, and what is said of those that cannot be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, TypeVar

from ..pictures import UnreadablePicture, read_picture
from ..progress import track
from .layout import ImageFile

OnError = Literal["stop", "list"]
_WINDOW_PER_THREAD = 32
_SHOWN = 5

Item = TypeVar("Item")
Result = TypeVar("Result")


class UnreadableImages(ValueError):
    """lines: each picture with what is wrong with it."""

    def __init__(self, lines: list[str], way_out: str = "replace or remove them, then prepare again") -> None:
        self.lines = lines
        more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
        super().__init__("; ".join(lines[:_SHOWN]) + more + f"; {way_out}")


class BadImages:
    """What to do about pictures that do not decode: stop at the first, or go through all and list every one.

    name: how a person finds the picture, of the path it was read from.
    """

    def __init__(self, on_error: OnError = "stop", name: Callable[[Path], str] = str) -> None:
        self.on_error, self.name = on_error, name
        self.lines: list[str] = []

    def sift(self, results: Iterable[Result | UnreadablePicture]) -> Iterator[Result]:
        """Passes results on until one is bad. Raises UnreadableImages at once where errors stop."""
        for result in results:
            if isinstance(result, UnreadablePicture):
                self.lines.append(f"{self.name(result.path)}: {result.reason}")
                if self.on_error == "stop":
                    raise UnreadableImages(self.lines, "replace or remove it; --on_error list finds all of them")
            elif not self.lines:
                yield result

    def finish(self) -> None:
        """Raises UnreadableImages where there were any."""
        if self.lines:
            raise UnreadableImages(self.lines)


def check_images(
    files: list[ImageFile], num_workers: int, bad: BadImages, upright: bool = False, what: str = "checking images"
) -> list[str]:
    """Decodes every file; gives the sha256 of each."""

    def look(file: ImageFile) -> str:
        content = read_content(file.path)
        read_picture(file.path, upright, content)
        return hashlib.sha256(content).hexdigest()

    return list(bad.sift(in_threads(look, files, num_workers, what)))


def read_content(path: Path) -> bytes:
    """A file whole, for its checksum and its pixels to be of the same bytes. Raises UnreadablePicture."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UnreadablePicture(path, f"cannot be read ({error.strerror})") from error


def in_threads(
    function: Callable[[Item], Result], items: list[Item], num_workers: int, what: str
) -> Iterator[Result | UnreadablePicture]:
    """`function` of each item, in order, or the UnreadablePicture it raised; behind a progress bar."""

    def attempt(item: Item) -> Result | UnreadablePicture:
        try:
            return function(item)
        except UnreadablePicture as error:
            return error

    def results() -> Iterator[Result | UnreadablePicture]:
        # Windows, not one map over everything: finished results would pile up in memory ahead of the writer.
        window = _WINDOW_PER_THREAD * num_workers
        with ThreadPoolExecutor(num_workers) as pool:
            for start in range(0, len(items), window):
                yield from pool.map(attempt, items[start : start + window])

    yield from track(results(), what, len(items))
