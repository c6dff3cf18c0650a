"""Text is prepared as a loop over a dict would, whatever the parts it is read in; broken input ends in one line."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from text_helpers import LINES, write_texts

from vmoe_momentum.datasets import FolderDataModule, TextDataModule, prepare_text, text_prepare, text_sources
from vmoe_momentum.datasets.commands import run
from vmoe_momentum.datasets.text_files import TEXT_SPLITS, verify_text


@pytest.fixture
def source(tmp_path) -> Path:
    return write_texts(tmp_path / "source")


def prepare(source: Path, name: str = "out", **settings):
    return prepare_text(str(source.parent / name), str(source), **settings)


def read(root: Path) -> tuple[list[str], dict[str, list[int]]]:
    words = (root / "vocabulary.txt").read_bytes().decode().removesuffix("\n").split("\n")
    return words, {split: np.fromfile(root / f"{split}.bin", "<i4").tolist() for split in TEXT_SPLITS}


def naive(lines: dict[str, str], order: str, min_count: int, lower: bool) -> tuple[list[str], dict[str, list[int]]]:
    texts = {}
    for split, text in lines.items():
        texts[split] = []
        for line in text.removesuffix("\n").split("\n"):
            texts[split] += (line.lower() if lower else line).split() + ["<eos>"]
    counts = Counter(texts["train"])
    if min_count > 1:
        for split, words in texts.items():
            texts[split] = [w if counts[w] >= min_count or w in ("<eos>", "<unk>") else "<unk>" for w in words]
    vocabulary = {}
    for split in TEXT_SPLITS:
        for word in texts[split]:
            vocabulary.setdefault(word, len(vocabulary))
    words = list(vocabulary)
    if order == "frequency":
        counts = Counter(texts["train"])
        words = sorted(words, key=lambda word: -counts[word])  # a stable sort
    return words, {split: [words.index(word) for word in texts[split]] for split in TEXT_SPLITS}


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("min_count", [1, 2, 3, 99])
@pytest.mark.parametrize("order", ["appearance", "frequency"])
def test_ids_are_those_of_a_naive_loop_whatever_the_parts(source, monkeypatch, order, min_count, lower):
    expected = naive(LINES, order, min_count, lower)
    settings = {"order": order, "min_count": min_count, "lower": lower}
    done = prepare(source, **settings)
    assert read(done.root) == expected
    words, ids = expected
    assert done[1:] == (len(words), *(len(ids[split]) for split in TEXT_SPLITS))
    told = json.loads((done.root / "text.json").read_text())
    assert [told["splits"][split]["types"] for split in TEXT_SPLITS] == [len(set(ids[s])) for s in TEXT_SPLITS]
    assert words[told["vocabulary"]["eos"]] == "<eos>" and words[told["vocabulary"]["unk"]] == "<unk>"
    monkeypatch.setattr(text_prepare, "_REMAPPED", 2)
    for part in (1, 2, 5):
        monkeypatch.setattr(text_sources, "PART", 30 if part == 1 else 1 << 20)
        read_in_parts = lambda *a, part=part: text_sources.words_of(*a, part=part)  # noqa: E731
        monkeypatch.setattr(text_prepare, "words_of", read_in_parts)
        other = prepare(source, f"part{part}", **settings).root
        assert all((other / p.name).read_bytes() == p.read_bytes() for p in done.root.iterdir())


def test_unknown_words_get_one_place_also_where_the_text_has_none(tmp_path):
    lines = {"train": "x a a\nb a y\n", "valid": "a z\n", "test": "b\n"}
    done = prepare(write_texts(tmp_path / "source", lines), min_count=2)
    assert read(done.root) == (
        ["<unk>", "a", "<eos>"],
        {"train": [0, 1, 1, 2, 0, 1, 0, 2], "valid": [1, 0, 2], "test": [0, 2]},
    )
    told = json.loads((prepare(tmp_path / "source", "all").root / "text.json").read_text())
    assert told["vocabulary"]["unk"] is None and told["vocabulary"]["words"] == 6


def test_wikitext_names_give_the_same_text(source, tmp_path):
    wiki = write_texts(tmp_path / "wiki", name="wiki.{}.tokens")
    assert read(prepare(wiki, "other").root) == read(prepare(source).root)
    shutil.copy(wiki / "wiki.valid.tokens", source)
    with pytest.raises(ValueError, match=r"valid\.txt and wiki\.valid\.tokens are for the same split; remove one"):
        prepare(source, "third")


def test_punctuation_is_split_off_but_not_inside_words(tmp_path):
    train = "(God's burnt-offering,) x_y <unk>; \u201cna\u00efve\u201d cafe\u0301 3.5 -- '\n"
    lines = {"train": train, "valid": "a\n", "test": "a\n"}
    words, ids = read(prepare(write_texts(tmp_path / "source", lines), split_punctuation=True).root)
    assert [words[i] for i in ids["train"]] == [
        "(", "God's", "burnt-offering", ",", ")", "x", "_", "y", "<unk>", ";", "\u201c", "na\u00efve", "\u201d",
        "cafe\u0301", "3", ".", "5", "-", "-", "'", "<eos>",
    ]  # fmt: skip


def test_a_byte_order_mark_and_nul_bytes_do_no_harm(tmp_path):
    lines = dict.fromkeys(TEXT_SPLITS, "\ufeffone \0 two\0\n")
    words, ids = read(prepare(write_texts(tmp_path / "source", lines)).root)
    assert words == ["one", "\0", "two\0", "<eos>"] and set(map(tuple, ids.values())) == {(0, 1, 2, 3)}
    assert TextDataModule(str(tmp_path / "out")).vocabulary == words


BROKEN = {  # what is done to the source, message
    "no folder": (shutil.rmtree, "--source=.*: no such folder; name one with train.txt"),
    "a file": (lambda s: (shutil.rmtree(s), s.write_text("x")), "--source=.*: no such folder"),
    "split missing": (lambda s: (s / "valid.txt").unlink(), "neither valid.txt nor wiki.valid.tokens; add one of them"),
    "empty": (lambda s: (s / "test.txt").write_bytes(b""), r"test\.txt: empty; every split needs text"),
    "not UTF-8": (lambda s: (s / "valid.txt").write_bytes(b"a\nb\nc \xff\n"), r"valid.txt, line 3: not UTF-8 .*0xff"),
    "cut character": (lambda s: (s / "test.txt").write_bytes(b"a\n\xc3"), r"test\.txt, line 2: not UTF-8 .*0xc3"),
    "a folder": (lambda s: ((s / "test.txt").unlink(), (s / "test.txt").mkdir()), "test.txt: cannot be read .Is a dir"),
    "no white space": (lambda s: (s / "test.txt").write_bytes(b"x" * 3_000_000), "a word of more than 1,048,576 bytes"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_source_ends_in_one_line_that_names_it(source, damage, message):
    damage(source)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        prepare(source)
    assert "\n" not in str(error.value) and str(source) in str(error.value)
    assert [path.name for path in source.parent.iterdir()] == (["source"] if source.exists() else [])


def test_the_line_of_a_wrong_byte_is_right_in_later_parts(source, monkeypatch):
    (source / "train.txt").write_bytes(b"aa bb\ncc dd\n\nee \x80f\n")
    monkeypatch.setattr(text_prepare, "words_of", lambda *a: text_sources.words_of(*a, part=4))
    with pytest.raises(ValueError, match=r"train\.txt, line 4: not UTF-8"):
        prepare(source)


def test_out_is_not_the_source_nor_in_a_file(source):
    for name in ("source", "source/out", "."):
        with pytest.raises(ValueError, match="--out=.*overlaps --source"):
            prepare(source, name, overwrite=True)
    (source.parent / "file").write_text("x")
    with pytest.raises(ValueError, match="--out=.*is no folder that can be written"):
        prepare(source, "file/out")
    assert sorted(path.name for path in source.iterdir()) == ["test.txt", "train.txt", "valid.txt"]


def test_an_existing_out_is_refused_replaced_or_accepted(source):
    done = prepare(source)
    stamp = (done.root / "text.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="it exists.*--overwrite"):
        prepare(source)
    assert prepare(source, exist_ok=True) == done and (done.root / "text.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="prepared with .*'min_count': 1.*, not with .*'min_count': 2") as error:
        prepare(source, exist_ok=True, min_count=2)
    assert "\n" not in str(error.value)
    assert prepare(source, overwrite=True, min_count=2).vocab_size < done.vocab_size
    before = read(done.root)
    (source / "test.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="not UTF-8"):
        prepare(source, overwrite=True)
    assert read(done.root) == before and len(list(source.parent.iterdir())) == 2
    verify_text(str(done.root))
    precious = source.parent / "mine" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("ten years")
    with pytest.raises(ValueError, match="not written by this command .no text.json"):
        prepare(source, "mine", overwrite=True)


def test_interrupted_while_it_writes_it_leaves_nothing(source, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(text_prepare, "write_facts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source)
    assert [path.name for path in source.parent.iterdir()] == ["source"]


def test_the_command_line_prepares_verifies_and_describes(source, capsys):
    out = source.parent / "out"
    run(["prepare", "text", "--source", str(source), "--out", str(out), "--order", "frequency", "--lower", "true"])
    assert f"{out}: 12 words, 17 training, 9 validation and 8 test tokens" in capsys.readouterr().out
    run(["verify", str(out)])
    told = "sound (12 words, tokens: 17 train, 9 valid, 8 test, checksums of 5 files)"
    assert capsys.readouterr().out == f"{out}: {told}\n"
    run(["info", str(out)])
    assert "tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="root=.*: a prepared text, not pictures"):
        run(["sample", str(out)])
    with pytest.raises(ValueError, match="data.root=.*: a prepared text, not pictures; load it with TextDataModule"):
        FolderDataModule(str(out))


@pytest.mark.parametrize("name", ["vocabulary.txt", "train.bin", "valid.bin", "test.bin", "text.json"])
def test_verify_finds_a_flipped_bit_a_cut_and_a_missing_file(source, name):
    root = prepare(source).root
    path = root / name
    whole = path.read_bytes()
    damages = [whole[:5] + bytes([whole[5] ^ 1]) + whole[6:], whole[:-2]]
    for content in damages:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            run(["verify", str(root)])
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="text.json|classes.json"):
        run(["verify", str(root)])


# ---- the worked example

needs_bible = pytest.mark.skipif(shutil.which("bible") is None, reason="Debian's bible-kjv is not installed")


@needs_bible
def test_the_bible_is_always_the_same_text(tmp_path):
    done = prepare_text(str(tmp_path / "kjv"))
    assert done[1:] == (8362, 848774, 46733, 49201)
    words, ids = read(done.root)
    said = {split: " ".join(words[i] for i in ids[split][:14]) for split in TEXT_SPLITS}
    assert said["train"] == "in the beginning god created the heaven and the earth . <eos> and the"
    assert said["valid"].startswith("and the lord said unto noah , come thou")  # Genesis 7
    assert said["test"].startswith("and when abram was ninety years old and nine")  # Genesis 17
    everything = prepare_text(str(tmp_path / "all"), min_count=1, lower=False, split_punctuation=False)
    assert "<unk>" not in read(everything.root)[0]
    eos = json.loads((everything.root / "text.json").read_text())["vocabulary"]["eos"]
    assert sum(ids.count(eos) for ids in read(everything.root)[1].values()) == 31102


def test_without_its_program_the_example_says_what_to_install(tmp_path, monkeypatch):
    program = tmp_path / "bible"
    monkeypatch.setattr(text_sources, "_BIBLE", (str(program),))
    with pytest.raises(FileNotFoundError, match=r"--source is not given.*\(apt install bible-kjv\)") as error:
        prepare_text(str(tmp_path / "out"))
    assert "\n" not in str(error.value)
    program.write_text("#!/bin/sh\necho Ge1:1 In the beginning\n")
    with pytest.raises(ValueError, match="the program bible does not answer .*Permission denied"):
        prepare_text(str(tmp_path / "out"))
    program.chmod(0o755)
    with pytest.raises(ValueError, match="the program bible gives no 31,102 verses; install the packages bible-kjv"):
        prepare_text(str(tmp_path / "out"))
