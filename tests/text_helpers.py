"""A small text, prepared, that the tests of text share."""

from __future__ import annotations

from pathlib import Path

LINES = {  # an empty line, a line of blanks, words of one split alone, and a last line without its end
    "train": "the cat sat\n\n the  cat\tate the rat \n   \nA rat, the end",
    "valid": "the dog sat\nthe cat <unk> end\n",
    "test": "a\u00a0b the\u2028cat\r\nend\n\n",
}


def write_texts(folder: Path, lines: dict[str, str] = LINES, name: str = "{}.txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in lines.items():
        (folder / name.format(split)).write_bytes(text.encode())
    return folder


def counting(total: int, types: int = 13) -> str:
    """A text of `total` tokens, in lines of at most nine words, no two blocks of it alike."""
    words, left = [], total
    while left:
        length = min(left - 1, 1 + (7 * left) % 9)
        words.append(" ".join(f"w{(left * left + place) % types}" for place in range(length)) + "\n")
        left -= length + 1
    return "".join(words)
