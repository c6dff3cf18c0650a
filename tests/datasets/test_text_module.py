"""TextDataModule: what it reads in which stage, resuming in Lightning, the attacked text, and what it refuses."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from text_helpers import counting, write_texts

from vmoe_momentum.datasets import TextBatch, TextDataModule, prepare_text
from vmoe_momentum.datasets.text_files import TEXT_SPLITS, open_ids


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """260 training, 90 validation and 110 test tokens; the vocabulary has <unk> and not AAA."""
    folder = tmp_path_factory.mktemp("text")
    sizes = {"train": 260, "valid": 90, "test": 110}
    lines = {split: counting(size).replace("w3", "<unk>") for split, size in sizes.items()}
    return prepare_text(str(folder / "out"), str(write_texts(folder / "source", lines))).root


def module(root: Path, **settings) -> TextDataModule:
    return TextDataModule(str(root), **{"block_size": 8, "batch_size": 4, **settings})


def test_facts_are_there_as_soon_as_it_is_built(root):
    data = module(root)
    assert [data.count(split) for split in ("train", "valid", "test")] == [260, 90, 110]
    assert data.vocab_size == len(data.vocabulary) == 14
    assert data.vocabulary[data.facts.eos] == "<eos>" and data.vocabulary[data.facts.unk] == "<unk>"
    assert data.eval_batch_size == 4 and module(root, eval_batch_size=3).eval_batch_size == 3


def read(loader) -> tuple[list[int], list[int]]:
    """Words and targets in the order of the text."""
    found = list(loader)
    for what in (0, 1):
        rows = torch.cat([batch[what] for batch in found], 1)
        keep = torch.cat([batch.targets for batch in found], 1) != -100
        yield rows[keep].tolist()


@pytest.mark.parametrize("streams", [1, 3, 16])
def test_stages_read_their_splits(root, streams):
    data = module(root, eval_batch_size=streams)
    for loader, split in ((data.val_dataloader(), "valid"), (data.test_dataloader(), "test")):
        words, targets = read(loader)
        assert targets == open_ids(data.facts, split).tolist() and words == [data.facts.eos, *targets[:-1]]
    assert list(read(data.predict_dataloader()))[1] == targets
    (first, *_) = data.train_dataloader()
    assert isinstance(first, TextBatch) and first.begins and first.words.shape == (4, 8)


def test_a_word_swap_is_the_same_however_the_text_is_read(root):
    clean = open_ids(module(root).facts, "valid").tolist()
    found = {}
    for streams in (1, 3, 16):
        data = module(root, eval_batch_size=streams, word_swap=0.3)
        (words, targets), batches = read(data.val_dataloader()), list(data.val_dataloader())
        assert words == [data.facts.eos, *targets[:-1]]
        rows = [torch.cat([getattr(batch, name) for batch in batches], 1) for name in ("targets", "clean_targets")]
        assert rows[1][rows[0] != -100].tolist() == clean and torch.equal(rows[0] == -100, rows[1] == -100)
        found[streams] = targets
    assert found[1] == found[3] == found[16]
    changed = [(old, new) for old, new in zip(clean, targets, strict=True) if old != new]
    assert 10 < len(changed) < 40 and {new for _, new in changed} == {data.facts.unk}
    assert not {old for old, _ in changed} & {data.facts.eos, data.facts.unk}
    assert list(read(module(root, word_swap=0.3, seed=1).val_dataloader()))[1] != targets
    own = module(root, word_swap=0.3, word_swap_token="w5")
    assert set(list(read(own.val_dataloader()))[1]) - set(clean) == set() and own._swap_id == own.vocabulary.index("w5")
    assert next(iter(own.train_dataloader())).clean_targets is None


def test_a_swap_by_a_word_that_is_not_there_is_refused(tmp_path):
    source = write_texts(tmp_path / "source", dict.fromkeys(TEXT_SPLITS, "a b\n"))
    root = prepare_text(str(tmp_path / "out"), str(source)).root
    with pytest.raises(ValueError, match=r"data\.word_swap_token=AAA: the vocabulary of .* neither it nor <unk>; choo"):
        module(root, word_swap=0.1)
    assert module(root, word_swap=0.1, word_swap_token="b")._swap_id == 1 and module(root)._swap_id is None


class Recorder(LightningModule):
    """Keeps the targets of each training step."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.steps, self.evaluated = [], []

    def training_step(self, batch, index):
        self.steps.append((self.current_epoch, batch.begins, batch.targets.tolist()))
        return self.weight.square()

    def validation_step(self, batch, index):
        self.evaluated.append(int((batch.targets != -100).sum()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(recorder: Recorder, data: TextDataModule, ckpt_path: str | None = None, **settings) -> None:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(**quiet, **{"max_epochs": 2, "enable_checkpointing": False, **settings})
    trainer.fit(recorder, data, ckpt_path=ckpt_path)


def test_lightning_reads_each_epoch_anew_and_goes_on_inside_one(root, tmp_path):
    whole = Recorder()
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
    fit(whole, module(root), callbacks=[saving], enable_checkpointing=True)
    assert [begins for _, begins, _ in whole.steps] == [index % 7 == 0 for index in range(14)]
    assert whole.steps[0][2] != whole.steps[7][2]
    assert sum(whole.evaluated[-3:]) == 90  # the last of three batches is shorter
    for done in (3, 7, 9):
        rest = Recorder()
        fit(rest, module(root), ckpt_path=str(tmp_path / f"step={done}.ckpt"))
        assert rest.steps == whole.steps[done:]
    with pytest.raises(ValueError, match=r"data\.block_size=4: the checkpoint was saved inside an epoch"):
        fit(Recorder(), module(root, block_size=4), ckpt_path=str(tmp_path / "step=9.ckpt"))


def test_overfitting_repeats_the_first_epoch(root):
    recorder = Recorder()
    fit(recorder, module(root), overfit_batches=2)
    assert [step[2] for step in recorder.steps[:2]] == [step[2] for step in recorder.steps[2:]]


def test_foreign_and_damaged_folders_end_in_one_line(root, digits, tmp_path):
    def refused(kind: type[Exception], message: str, folder: Path, stage: str | None = None) -> None:
        with pytest.raises(kind, match=message) as error:
            module(folder).setup(stage)
        assert "\n" not in str(error.value)

    refused(FileNotFoundError, "data.root=.*: no such folder; prepare one with `vmoe-momentum data", Path("x"))
    refused(ValueError, "data.root=.*: prepared pictures, not text; load them with FolderDataModule", digits)
    refused(FileNotFoundError, "it holds no text.json, so it is no prepared text", tmp_path)
    copy = shutil.copytree(root, tmp_path / "copy")
    (copy / "train.bin").write_bytes((root / "train.bin").read_bytes()[:-4])
    refused(ValueError, r"train\.bin: 1036 bytes, where text\.json says 1040; copy it again", copy, "fit")
    module(copy).setup("test")
    (copy / "test.bin").unlink()
    refused(FileNotFoundError, r"test\.bin: no such file, though text\.json speaks of it", copy, "predict")
    (copy / "vocabulary.txt").write_bytes(b"\xff" + (root / "vocabulary.txt").read_bytes()[1:])
    with pytest.raises(ValueError, match=r"vocabulary\.txt: cannot be read .*; copy it again"):
        module(copy, word_swap=0.1)
    (copy / "vocabulary.txt").write_bytes((root / "vocabulary.txt").read_bytes().replace(b"\n", b"\0", 1))
    with pytest.raises(ValueError, match=r"vocabulary\.txt: not the 14 words of text\.json"):
        module(copy).vocabulary  # noqa: B018
    for old, new, message in (('"train"', '"tr"', "is damaged: its content"), ("{", "", "text.json is damaged")):
        (copy / "text.json").write_text((root / "text.json").read_text().replace(old, new, 1))
        refused(ValueError, message, copy)
    (copy / "text.json").write_text('{"format": 2}')
    refused(ValueError, "text.json has format 2, this version reads 1", copy)


def test_nothing_of_images_is_imported():
    code = (
        "import sys, vmoe_momentum.datasets.text\n"
        "print(sorted(name for name in sys.modules if name.startswith('vmoe_momentum.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "vmoe_momentum.datasets.text" in done.stdout
    for name in ("pictures", "layout", "manifest", "base", "beton"):
        assert f".{name}'" not in done.stdout
