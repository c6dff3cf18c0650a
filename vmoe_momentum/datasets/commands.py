"""The command line `vmoe-momentum data ...`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from ..parsers import new_parser, summary_of
from ..ranges import check_all
from ..resources import usable_cores
from .idx import prepare_idx
from .imagenet import prepare_imagenet
from .info import info, sample
from .photos import prepare_photos
from .prepare import Prepared, prepare_digits, prepare_folder
from .text_files import holds_text, text_info, verify_text
from .text_prepare import prepare_text
from .verify import verify

_EXAMPLES = """examples:
  vmoe-momentum data prepare digits --out data/digits
  vmoe-momentum data prepare photos --out data/photos
  vmoe-momentum data prepare idx --out data/fashion
  vmoe-momentum data prepare folder --source pictures --out data/pictures --images hardlink
  vmoe-momentum data prepare imagenet --source /data/ILSVRC2012 --out data/imagenet
  vmoe-momentum data prepare imagenet-c --source data/imagenet/val --out data/imagenet-c
  vmoe-momentum data prepare text --source /path/to/wikitext-103 --out data/wikitext-103
  vmoe-momentum data verify data/digits
  vmoe-momentum data info data/digits
  vmoe-momentum data sample data/photos --out sheet.png --augment"""

PREPARE: dict[str, Callable[..., Prepared]] = {
    "digits": prepare_digits, "photos": prepare_photos, "idx": prepare_idx, "folder": prepare_folder,
    "imagenet": prepare_imagenet,
}  # fmt: skip
LOOK: dict[str, Callable[..., Any]] = {"verify": verify, "info": info, "sample": sample}

_FLAGS = {
    "overwrite": "Replace a dataset prepared earlier.",
    "exist_ok": "Succeed at once where OUT was already prepared with the same settings.",
}


class Other(NamedTuple):
    """Something that `data prepare` makes, and is no dataset of pictures to train on."""

    prepare: Callable[..., object]  # gives what to print
    holds: Callable[[Path], bool]  # whether a folder is one
    verify: Callable[[str, int | None, int], str]  # root, sample and num_workers as `verify` has them
    info: Callable[[str], object] | None = None  # gives what to print of a root
    what: str = "pictures to test on, not a dataset to train on"


TEXT = Other(prepare_text, holds_text, verify_text, text_info, "a prepared text, not pictures")


def run(argv: list[str], others: dict[str, Other] | None = None) -> None:
    """Runs `data prepare DATASET` or `data verify|info|sample ROOT`; argv is what follows `data`.

    others: of other rooms, by name. Mistakes come out as ValueError, FileNotFoundError or the parser's ArgumentError.
    """
    others = {"text": TEXT, **(others or {})}
    arguments = _parser(others).parse_args(argv)
    if arguments.command != "prepare":
        root = arguments[arguments.command].root
        other = next((each for each in others.values() if each.holds(Path(root))), None)
        if other is not None:
            _look_at_other(arguments, other)
            return
    if arguments.command == "info":
        Console().print(info(**arguments.info.as_dict()))
        return
    if arguments.command == "sample":
        print(sample(**arguments.sample.as_dict()))
        return
    if arguments.command == "verify":
        report = verify(**arguments.verify.as_dict())
        print(
            f"{report.root}: sound ({report.classes} classes, {report.train} training and {report.val} validation"
            f" images, {report.betons} betons, {report.decoded} images decoded, checksums of {report.compared} files)"
        )
        if report.uncovered:
            print(f"not covered: {report.uncovered}, of which this older manifest says nothing; prepare it again")
        return
    what = arguments.prepare.dataset
    if what in others:
        print(others[what].prepare(**arguments.prepare[what].as_dict()))
        return
    done = PREPARE[what](**arguments.prepare[what].as_dict())
    backends = "FFCVDataModule or FolderDataModule" if done.betons else "FolderDataModule (no betons: ffcv is missing)"
    print(f"{done.root}: {done.classes} classes, {done.train} training and {done.val} validation images")
    print(f"use it with --data {backends} --data.root {done.root}")


def _look_at_other(arguments: Namespace, other: Other) -> None:
    """Raises ValueError: there is nothing to describe, or no pictures to draw."""
    if arguments.command == "info" and other.info is not None:
        Console().print(other.info(arguments.info.root))
        return
    if arguments.command != "verify":
        raise ValueError(f"root={arguments[arguments.command].root}: {other.what}; `data verify` checks it")
    wanted = arguments.verify
    check_all("--", {"sample": wanted.sample, "num_workers": wanted.num_workers}, vars(verify)["ranges"])
    workers = usable_cores() if wanted.num_workers < 0 else wanted.num_workers
    print(other.verify(wanted.root, wanted.sample, workers))


def _parser(others: dict[str, Other]) -> ArgumentParser:
    parser = new_parser("Prepare pictures or text and check them.", _EXAMPLES, prog="vmoe-momentum data")
    commands = parser.add_subcommands(dest="command")
    prepare = new_parser("Turn pictures or text into a prepared dataset.", _EXAMPLES)
    commands.add_subcommand("prepare", prepare, help="turn pictures or text into a prepared dataset")
    helps = {
        "verify": "check a prepared dataset against its manifest",
        "info": "counts, sizes and storage of a prepared dataset",
        "sample": "a sheet of pictures with their labels",
    }
    for name, function in LOOK.items():
        look = new_parser(summary_of(function), _EXAMPLES)
        look.add_function_arguments(function, as_group=False, as_positional=True, skip={"augment"})
        if function is sample:
            look.add_argument("--augment", action="store_true", help="Random crops and flips, as in training.")
        commands.add_subcommand(name, look, help=helps[name])
    datasets = prepare.add_subcommands(dest="dataset")
    for name, function in (PREPARE | {name: other.prepare for name, other in others.items()}).items():
        dataset = new_parser(summary_of(function), _EXAMPLES)
        dataset.add_function_arguments(function, as_group=False, as_positional=False, skip=set(_FLAGS))
        for flag, text in _FLAGS.items():
            dataset.add_argument(f"--{flag}", action="store_true", help=text)
        datasets.add_subcommand(name, dataset, help=summary_of(function).partition("\n")[0])
    return parser
