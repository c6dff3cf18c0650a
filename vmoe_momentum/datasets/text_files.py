"""Where things lie inside a prepared text, and what vouches for them.

root/vocabulary.txt   one word a line; a word's id is its place
root/train.bin        ids, int32 little endian, `<eos>` after each line; valid.bin and test.bin likewise
root/text.json        settings, counts, and the sha256 of the others and of itself, written last
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from ..files.checksums import FILES, listed, read_list, verify_files

TEXT = "text.json"  # what a finished text has
VOCABULARY = "vocabulary.txt"
TEXT_SPLITS = ("train", "valid", "test")
EOS, UNK = "<eos>", "<unk>"
ID = np.dtype("<i4")
_FORMAT = 1
_HINT = "prepare one with `vmoe-momentum data prepare text --source DIR --out DIR`"


class TextFacts(NamedTuple):
    """What text.json says. tokens and types: of each split; eos and unk: ids, unk None where the text has none.

    settings: as prepared. listed: text.json as it is read.
    """

    root: Path
    vocab_size: int
    vocabulary_bytes: int
    tokens: dict[str, int]
    types: dict[str, int]
    eos: int
    unk: int | None
    settings: dict[str, Any]
    listed: dict[str, Any]

    def path(self, split: str) -> Path:
        """The ids of a split."""
        return self.root / f"{split}.bin"


def holds_text(root: Path) -> bool:
    """Whether a folder is a prepared text, sound or not."""
    return (root / TEXT).is_file()


def write_facts(
    root: Path, settings: dict[str, Any], words: list[str], tokens: dict[str, int], types: dict[str, int]
) -> None:
    """Seals `root`, which holds all other files."""
    facts = {
        "format": _FORMAT, "settings": settings,
        "vocabulary": {
            "words": len(words), "bytes": (root / VOCABULARY).stat().st_size, "eos": words.index(EOS),
            "unk": words.index(UNK) if UNK in words else None,
        },
        "splits": {split: {"tokens": tokens[split], "types": types[split]} for split in TEXT_SPLITS},
    }  # fmt: skip
    (root / TEXT).write_text(json.dumps(listed(root, facts), indent=1) + "\n")


def read_facts(root: Path, setting: str = "data.root") -> TextFacts:
    """Raises FileNotFoundError: no such folder, or no prepared text. ValueError: pictures, or a damaged text.json."""
    if not root.is_dir():
        raise FileNotFoundError(f"{setting}={root}: no such folder; {_HINT}")
    if not holds_text(root):
        if any((root / name).exists() for name in ("classes.json", "manifest.json")):
            raise ValueError(f"{setting}={root}: prepared pictures, not text; load them with FolderDataModule; {_HINT}")
        raise FileNotFoundError(f"{setting}={root}: it holds no {TEXT}, so it is no prepared text; {_HINT}")
    told = read_list(root / TEXT, f"{setting}=")
    if told.get("format") != _FORMAT or FILES not in told:  # its own sha256 vouches for all the rest
        raise ValueError(
            f"{setting}={root}: {TEXT} has format {told.get('format')}, this version reads {_FORMAT}; {_HINT}"
        )
    vocabulary, splits = told["vocabulary"], told["splits"]
    tokens, types = ({split: splits[split][what] for split in TEXT_SPLITS} for what in ("tokens", "types"))
    sizes = vocabulary["words"], vocabulary["bytes"]
    return TextFacts(root, *sizes, tokens, types, vocabulary["eos"], vocabulary["unk"], told["settings"], told)


def check_sizes(facts: TextFacts, splits: tuple[str, ...] = TEXT_SPLITS) -> None:
    """Of the vocabulary and `splits`, in bytes. Raises FileNotFoundError: one is missing; ValueError: it is another."""
    expected = {facts.root / VOCABULARY: facts.vocabulary_bytes}
    expected |= {facts.path(split): facts.tokens[split] * ID.itemsize for split in splits}
    for path, size in expected.items():
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, though {TEXT} speaks of it; prepare the text again")
        if path.stat().st_size != size:
            raise ValueError(
                f"{path}: {path.stat().st_size} bytes, where {TEXT} says {size}; copy it again, or prepare it again"
            )


def read_vocabulary(facts: TextFacts) -> list[str]:
    """Words by id. Raises ValueError: as many as text.json says are not there."""
    path = facts.root / VOCABULARY
    try:
        words = path.read_bytes().decode().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); copy it again, or prepare the text again") from error
    if len(words) != facts.vocab_size + 1 or words.pop():
        raise ValueError(f"{path}: not the {facts.vocab_size} words of {TEXT}; copy it again, or prepare it again")
    return words


def open_ids(facts: TextFacts, split: str) -> np.ndarray:
    """Ids of a split, int32 [tokens], mapped: read where they are looked at."""
    return np.memmap(facts.path(split), ID, mode="r", shape=(facts.tokens[split],))


def verify_text(root: str, sample: int | None = None, num_workers: int = -1) -> str:
    """Sizes and sha256 of every file, in words. sample and num_workers are of pictures: a text is read whole.

    Raises FileNotFoundError: a file is missing; ValueError: it is not as it was written.
    """
    facts = read_facts(Path(root), "root")
    check_sizes(facts)
    verify_files(facts.root / TEXT, facts.listed)
    counts = ", ".join(f"{facts.tokens[split]:,} {split}" for split in TEXT_SPLITS)
    files = len(facts.listed[FILES]) + 1
    return f"{root}: sound ({facts.vocab_size:,} words, tokens: {counts}, checksums of {files} files)"


def text_info(root: str) -> Table:
    """What a prepared text holds, as a table. Raises FileNotFoundError, ValueError: it is none, or damaged."""
    facts = read_facts(Path(root), "root")
    check_sizes(facts)
    table = Table(title=root)
    table.add_column("")
    for split in TEXT_SPLITS:
        table.add_column(split, justify="right")
    for name, counts in (("tokens", facts.tokens), ("types", facts.types)):
        table.add_row(name, *[f"{counts[split]:,}" for split in TEXT_SPLITS])
    made = ", ".join(f"{name} {value}" for name, value in facts.settings.items())
    table.caption = f"{facts.vocab_size:,} words; {made}"
    return table
