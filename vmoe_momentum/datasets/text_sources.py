"""Text to prepare: a folder in WikiText's form, or the King James Bible of Debian's package; and its words."""

from __future__ import annotations

import functools
import io
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .text_files import EOS, TEXT_SPLITS, UNK

PART = 1 << 20  # bytes read at once, and of the longest word
_NAMES = ("{}.txt", "wiki.{}.tokens")  # the second is WikiText-103's
_BIBLE = ("bible", "-f", "-l", "100000", "gen1:1-rev22:21")  # -f: a verse a line
_VERSE = re.compile(r"(?P<chapter>\d?[A-Za-z]+\d+):\d+ +(?P<text>\S.*)")
_VERSES = 31102
_HELD_OUT = {7: "valid", 17: "test"}  # running number of the chapter, modulo 20


class Source(NamedTuple):
    """A text: its name in messages, bytes of UTF-8, and what opens them."""

    name: str
    size: int
    open: Callable[[], BinaryIO]


def find_texts(folder: Path) -> dict[str, Source]:
    """train.txt or wiki.train.tokens, and so on, by split.

    Raises FileNotFoundError: no such folder, or a split is missing; ValueError: it is there twice, or empty.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--source={folder}: no such folder; name one with train.txt, valid.txt and test.txt")
    found = {}
    for split in TEXT_SPLITS:
        names = [name.format(split) for name in _NAMES]
        paths = [folder / name for name in names if (folder / name).exists()]
        if not paths:
            raise FileNotFoundError(f"--source={folder}: it holds neither {' nor '.join(names)}; add one of them")
        if len(paths) > 1:
            raise ValueError(f"--source={folder}: {' and '.join(names)} are for the same split; remove one of them")
        size = paths[0].stat().st_size
        if not size:
            raise ValueError(f"{paths[0]}: empty; every split needs text")
        found[split] = Source(str(paths[0]), size, functools.partial(_open, paths[0]))
    return found


def _open(path: Path) -> BinaryIO:
    return path.open("rb")


def bible() -> dict[str, Source]:
    """The King James Bible, a verse a line, split by chapters.

    Of the 1,189 chapters in their order, Genesis 1 being number 1, those whose number is 7 modulo 20 are valid and
    those of 17 modulo 20 test. Raises FileNotFoundError: the program is not installed; ValueError: its text is another.
    """
    try:
        done = subprocess.run(_BIBLE, stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            "--source is not given, and the program bible of the worked example is not installed; install it"
            " (apt install bible-kjv), or name a folder with train.txt, valid.txt and test.txt"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"--source is not given, and the program bible does not answer ({error})") from error
    lines = done.stdout.decode(errors="replace").splitlines()
    verses = [verse for line in lines if (verse := _VERSE.fullmatch(line))]
    if not len(lines) == len(verses) == _VERSES:
        raise ValueError(
            f"--source is not given, and the program bible gives no {_VERSES:,} verses; install the packages bible-kjv"
            " and bible-kjv-text anew, or name a folder with train.txt, valid.txt and test.txt"
        )
    split_lines: dict[str, list[str]] = {split: [] for split in TEXT_SPLITS}
    number, chapter = 0, ""
    for verse in verses:
        if verse["chapter"] != chapter:
            number, chapter = number + 1, verse["chapter"]
        split_lines[_HELD_OUT.get(number % 20, "train")].append(verse["text"].strip())
    texts = {split: "".join(f"{line}\n" for line in split_lines[split]).encode() for split in TEXT_SPLITS}
    return {s: Source(f"bible ({s})", len(text), functools.partial(io.BytesIO, text)) for s, text in texts.items()}


def words_of(
    source: Source, lower: bool, split_punctuation: bool, part: int | None = None
) -> Iterator[tuple[int, list[str]]]:
    """Bytes read and their words, in order, `<eos>` at each line's end, for as many parts as it takes.

    A line ends with \\n, the last one also without. Words are what str.split gives: what lies between white space of
    any kind. part: bytes read at once; None: PART. Raises ValueError: not UTF-8, a word longer than a part, unreadable.
    """
    line = 1
    for piece, position in _pieces(source, PART if part is None else part):
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            line += piece.count(b"\n", 0, error.start)
            raise ValueError(
                f"{source.name}, line {line}: not UTF-8 (byte {piece[error.start]:#04x}); convert it (such as by iconv)"
            ) from error
        line += piece.count(b"\n")
        if position == len(piece):
            text = text.removeprefix("\ufeff")  # how some editors begin UTF-8
        text = text.lower() if lower else text
        if position == source.size and not piece.endswith(b"\n"):
            text += "\n"
        text = text.replace("\n", f" {EOS} ")
        yield (
            len(piece),
            [part for word in text.split() for part in _split(word)] if split_punctuation else text.split(),
        )


def _pieces(source: Source, part: int) -> Iterator[tuple[bytes, int]]:
    """Whole words, and how many bytes were given with them."""
    rest, given = b"", 0
    try:
        with source.open() as file:
            while block := file.read(part):
                block = rest + block
                cut = max(block.rfind(b"\n"), block.rfind(b" ")) + 1
                piece, rest = block[:cut], block[cut:]
                if len(rest) > PART:
                    raise ValueError(f"{source.name}: a word of more than {PART:,} bytes; is it text?")
                if piece:
                    given += len(piece)
                    yield piece, given
    except OSError as error:
        raise ValueError(f"{source.name}: cannot be read ({error.strerror}); copy it again") from error
    if rest:
        yield rest, given + len(rest)


@functools.lru_cache(1 << 20)
def _split(word: str) -> tuple[str, ...]:
    """Parts of a word, in which one of ' ’ - may join letters, and each other sign of punctuation is a part."""
    return tuple(_splitter().findall(word))


@functools.cache
def _splitter() -> re.Pattern[str]:
    signs = "".join(re.escape(chr(c)) for c in range(sys.maxunicode + 1) if unicodedata.category(chr(c))[0] in "PS")
    plain = rf"[^\s{signs}]+"
    return re.compile(rf"{EOS}|{UNK}|{plain}(?:['’-]{plain})*|[{signs}]")
