"""The command line `vmoe-momentum data ...`."""

from __future__ import annotations

import inspect

from jsonargparse import ArgumentParser
from rich.console import Console

from ..parsers import new_parser
from .idx import prepare_idx
from .imagenet import prepare_imagenet
from .info import info, sample
from .photos import prepare_photos
from .prepare import prepare_digits, prepare_folder
from .verify import verify

_EXAMPLES = """examples:
  vmoe-momentum data prepare digits --out data/digits
  vmoe-momentum data prepare photos --out data/photos
  vmoe-momentum data prepare idx --out data/fashion
  vmoe-momentum data prepare folder --source pictures --out data/pictures --images hardlink
  vmoe-momentum data prepare imagenet --source /data/ILSVRC2012 --out data/imagenet
  vmoe-momentum data verify data/digits
  vmoe-momentum data info data/digits
  vmoe-momentum data sample data/photos --out sheet.png --augment"""

PREPARE = {
    "digits": prepare_digits, "photos": prepare_photos, "idx": prepare_idx, "folder": prepare_folder,
    "imagenet": prepare_imagenet,
}  # fmt: skip
LOOK = {"verify": verify, "info": info, "sample": sample}

_FLAGS = {
    "overwrite": "Replace a dataset prepared earlier.",
    "exist_ok": "Succeed at once where OUT was already prepared with the same settings.",
}


def run(argv: list[str]) -> None:
    """Runs `data prepare DATASET` or `data verify|info|sample ROOT`; argv is what follows `data`.

    Mistakes come out as ValueError, FileNotFoundError or the parser's ArgumentError.
    """
    arguments = _parser().parse_args(argv)
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
    done = PREPARE[what](**arguments.prepare[what].as_dict())
    backends = "FFCVDataModule or FolderDataModule" if done.betons else "FolderDataModule (no betons: ffcv is missing)"
    print(f"{done.root}: {done.classes} classes, {done.train} training and {done.val} validation images")
    print(f"use it with --data {backends} --data.root {done.root}")


def _parser() -> ArgumentParser:
    parser = new_parser("Prepare image data and check it.", _EXAMPLES, prog="vmoe-momentum data")
    commands = parser.add_subcommands(dest="command")
    prepare = new_parser("Turn pictures into a prepared dataset.", _EXAMPLES)
    commands.add_subcommand("prepare", prepare, help="turn pictures into a prepared dataset")
    helps = {
        "verify": "check a prepared dataset against its manifest",
        "info": "counts, sizes and storage of a prepared dataset",
        "sample": "a sheet of pictures with their labels",
    }
    for name, function in LOOK.items():
        look = new_parser(inspect.getdoc(function).split("Args:")[0].rstrip(), _EXAMPLES)
        look.add_function_arguments(function, as_group=False, as_positional=True, skip={"augment"})
        if function is sample:
            look.add_argument("--augment", action="store_true", help="Random crops and flips, as in training.")
        commands.add_subcommand(name, look, help=helps[name])
    datasets = prepare.add_subcommands(dest="dataset")
    for name, function in PREPARE.items():
        dataset = new_parser(inspect.getdoc(function).split("Args:")[0].rstrip(), _EXAMPLES)
        dataset.add_function_arguments(function, as_group=False, as_positional=False, skip=set(_FLAGS))
        for flag, text in _FLAGS.items():
            dataset.add_argument(f"--{flag}", action="store_true", help=text)
        datasets.add_subcommand(name, dataset, help=function.__doc__.splitlines()[0])
    return parser
