"""Options of Lightning's Trainer mean here what they mean to Lightning, whatever was imported before."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Literal, Optional, Union, get_args

import pytest
from lightning.pytorch import Trainer
from plain_trainer import parse
from test_cli import arguments

from vmoe_momentum import lightning_cli
from vmoe_momentum.parsers import new_parser, whole_first

VALUES = ["0", "1", "2", "1.0", "0.5", "1e3", "-1", "true", "null", "auto", "word", "'1'", "[0, 1]", "{hours: 1}"]
OPTIONS = list(inspect.signature(Trainer).parameters)
NUMBERS = [
    name
    for name, parameter in inspect.signature(Trainer).parameters.items()
    if {int, float} <= set(get_args(parameter.annotation))
]


def same_as_lightning(wanted: list[list[str]], folder: Path) -> None:
    script = str(Path(__file__).parent / "plain_trainer.py")
    words = [sys.executable, script, str(folder)]
    plain = subprocess.run(words, input=json.dumps(wanted), capture_output=True, text=True, check=True)
    theirs, ours = json.loads(plain.stdout), parse(lightning_cli.FitParser, wanted, folder)
    different = [(*what, a, b) for what, a, b in zip(wanted, theirs, ours, strict=True) if a != b]
    assert not different
    assert sum(answer != ["refused", "refused"] for answer in theirs) > len(wanted) / 5


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    """The part of the comparison below that went wrong, without the other process."""
    assert {"limit_train_batches", "overfit_batches", "val_check_interval", "gradient_clip_val"} <= set(NUMBERS)
    found = parse(lightning_cli.FitParser, [[option, text] for option in NUMBERS for text in ("1", "0.5")], tmp_path)
    assert found == [["int 1"] * 2, ["float 0.5"] * 2] * len(NUMBERS)


@pytest.mark.long
def test_every_option_is_read_as_lightning_reads_it(tmp_path: Path) -> None:
    same_as_lightning([[option, text] for option in OPTIONS for text in VALUES], tmp_path)


@pytest.mark.parametrize("way", ["flag", "file"])
def test_one_batch_is_one_batch(way: str, digits: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text("trainer: {limit_train_batches: 1}")
    words = ["--trainer.limit_train_batches=1"] if way == "flag" else ["--config=one.yaml"]
    trainer = lightning_cli.run_lightning([*arguments(digits), *words], start=False).trainer
    assert type(trainer.limit_train_batches) is int
    assert trainer.limit_train_batches == 1


def test_whole_numbers_come_first_wherever_they_are() -> None:
    hint = whole_first(Optional[list[Union[float, int, str]]])  # noqa: UP007, UP045  (typing's own, which it caches)
    assert str(hint) == "typing.Optional[list[typing.Union[int, float, str]]]"
    assert str(whole_first(float | int | None)) == "int | float | None"
    literal = Literal["a", 1]
    assert whole_first(literal) is literal
    parser = new_parser("", "")
    parser.add_argument("--x", type=float | int)
    parser.add_argument_group("group").add_argument("--y", type=list[float | int])
    found = parser.parse_args(["--x=1", "--y=[1,0.5]"])
    assert [type(found.x), *map(type, found.y)] == [int, int, float]
