"""Turns text into a prepared text (text_files.py): a vocabulary, and the ids of each split."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..files.staging import refuse_existing, remove_abandoned, staged
from ..progress import Meter, Work
from ..ranges import COUNT, in_range
from .prepare import refuse_overlap, require_names
from .text_files import EOS, ID, TEXT, TEXT_SPLITS, UNK, VOCABULARY, TextFacts, holds_text, read_facts, write_facts
from .text_sources import Source, bible, find_texts, words_of

Order = Literal["appearance", "frequency"]
_REMAPPED = 1 << 22  # ids at once


class PreparedText(NamedTuple):
    """A finished text. train, valid and test: tokens, `<eos>` counted."""

    root: Path
    vocab_size: int
    train: int
    valid: int
    test: int

    def __str__(self) -> str:
        counts = f"{self.train:,} training, {self.valid:,} validation and {self.test:,} test tokens"
        use = f"use it with --data TextDataModule --data.root {self.root}"
        return f"{self.root}: {self.vocab_size:,} words, {counts}\n{use}"


@in_range("--", min_count=COUNT.or_(None))
def prepare_text(
    out: str = "data/text",
    source: str | None = None,
    order: Order = "appearance",
    min_count: int | None = None,
    lower: bool | None = None,
    split_punctuation: bool | None = None,
    overwrite: bool = False,
    exist_ok: bool = False,
) -> PreparedText:
    """Text in WikiText's form, or the King James Bible where Debian's bible-kjv is installed.

    `source` holds train.txt, valid.txt and test.txt, or WikiText-103's wiki.train.tokens and so on, in UTF-8. Words are
    what stands between white space, with <eos> after every line, empty ones too. The vocabulary is that of all three.
    Without `source`: the Bible of the packages bible-kjv and bible-kjv-text, a verse a line. Of its 1,189 chapters in
    their order, from 1, those whose number is 7 modulo 20 are for validation and those of 17 modulo 20 for testing.

    Args:
        out: Folder to create.
        source: Folder with the three files; null: the King James Bible.
        order: Of the ids: appearance (first sight in train, then valid, then test), or frequency (by falling count in
            train, equal ones by first sight), which an adaptive softmax needs.
        min_count: Words that are rarer in train become <unk>, 1 to 1e9; null: 1, which keeps all; of the Bible 2.
        lower: Make all letters small; null: no; of the Bible yes.
        split_punctuation: Make each sign of punctuation a word, but ' and - within one; null: no; of the Bible yes.
        overwrite: Replace a text prepared earlier.
        exist_ok: Succeed at once where `out` was already prepared with the same settings.

    Raises:
        FileNotFoundError: `source` or one of its files does not exist, or the program bible does not.
        ValueError: `out` exists, a file is empty or not UTF-8, or a setting is out of range.
    """
    target, example = Path(out), source is None
    require_names(out=out, **({} if source is None else {"source": source}))
    settings: dict[str, Any] = {
        "source": None if source is None else str(Path(source).resolve()), "order": order,
        "min_count": min_count if min_count is not None else 2 if example else 1,
        "lower": example if lower is None else lower,
        "split_punctuation": example if split_punctuation is None else split_punctuation,
    }  # fmt: skip
    if exist_ok and (found := _already_prepared(target, settings)):
        return found
    if source is not None:
        refuse_overlap(Path(source), target)
    refuse_existing(target, overwrite, TEXT)
    texts = bible() if source is None else find_texts(Path(source))
    with staged(target, overwrite, TEXT) as work:
        sights, counts = _number(work, texts, settings["lower"], settings["split_punctuation"])
        words, ids = _vocabulary(list(sights), counts, order, settings["min_count"])
        (work / VOCABULARY).write_bytes("".join(f"{word}\n" for word in words).encode())
        counted = {split: _remap(work / f"{split}.bin", ids, len(words)) for split in TEXT_SPLITS}
        tokens, types = ({split: both[part] for split, both in counted.items()} for part in (0, 1))
        write_facts(work, settings, words, tokens, types)
    return _summary(read_facts(target, "--out"))


def _number(
    work: Path, texts: dict[str, Source], lower: bool, split_punctuation: bool
) -> tuple[dict[str, int], np.ndarray]:
    """Writes each split by the words' first sight; gives those numbers, and how often train has each word."""
    sights: dict[str, int] = {}
    counts = np.zeros(0, np.int64)
    with Meter("reading text", Work([("bytes", sum(text.size for text in texts.values()))])) as meter:
        for split in TEXT_SPLITS:
            meter.tell(split)
            with (work / f"{split}.bin").open("wb") as file:
                for size, words in words_of(texts[split], lower, split_punctuation):
                    ids = np.fromiter((sights.setdefault(word, len(sights)) for word in words), ID, len(words))
                    file.write(ids.tobytes())
                    grown = np.zeros(len(sights), np.int64)
                    grown[: len(counts)] = counts
                    counts = grown + (np.bincount(ids, minlength=len(sights)) if split == "train" else 0)
                    meter.advance("bytes", size)
    return sights, counts


def _vocabulary(words: list[str], counts: np.ndarray, order: Order, min_count: int) -> tuple[list[str], np.ndarray]:
    """Words of the text in which rare ones are `<unk>`, and the id there of each of `words`, which are by first sight.

    counts: how often train has each, int64 [V].
    """
    kept = counts >= min_count if min_count > 1 else np.ones(len(words), bool)
    special = {word: words.index(word) for word in (EOS, UNK) if word in words}
    kept[list(special.values())] = True
    owner = np.arange(len(words))
    if not kept.all():  # one place for all of them: the first at which the text has <unk>
        unknown = np.append(np.flatnonzero(~kept), [special[UNK]] if UNK in special else []).astype(np.int64)
        owner[unknown] = unknown.min()
        words = [*words]
        words[unknown.min()] = UNK
    totals = np.zeros(len(words), np.int64)
    np.add.at(totals, owner, counts)
    chosen = np.unique(owner)
    if order == "frequency":
        chosen = chosen[np.argsort(-totals[chosen], kind="stable")]
    ids = np.empty(len(words), ID)
    ids[chosen] = np.arange(len(chosen), dtype=ID)
    return [words[index] for index in chosen.tolist()], ids[owner]


def _remap(path: Path, ids: np.ndarray, vocab_size: int) -> tuple[int, int]:
    """Puts ids in the place of first sights. Gives tokens and types."""
    values = np.memmap(path, ID, mode="r+")
    seen = np.zeros(vocab_size, bool)
    for start in range(0, len(values), _REMAPPED):
        new = ids[values[start : start + _REMAPPED]]
        values[start : start + _REMAPPED] = new
        seen[new] = True
    values.flush()
    return len(values), int(seen.sum())


def _already_prepared(target: Path, settings: dict[str, Any]) -> PreparedText | None:
    """The text at `target` if it was made with these settings. Raises ValueError: it was made with others."""
    remove_abandoned(target)
    if not holds_text(target):
        return None
    facts = read_facts(target, "--out")
    if facts.settings != settings:
        raise ValueError(
            f"--out={target}: prepared with {facts.settings}, not with {settings}; choose another folder, or replace it"
            " with --overwrite and without --exist_ok"
        )
    return _summary(facts)


def _summary(facts: TextFacts) -> PreparedText:
    return PreparedText(facts.root, facts.vocab_size, *(facts.tokens[split] for split in TEXT_SPLITS))
