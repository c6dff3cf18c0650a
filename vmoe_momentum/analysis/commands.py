"""The command line `vmoe-momentum analyze ...`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import LightningDataModule
from rich.console import Console
from torch import Tensor

from ..configs import read_config
from ..models.saved import Saved, open_saved
from ..parsers import DEVICE, Parser, new_parser, pick_device
from ..ranges import COUNT, SEED, Range
from .ablate import Fit, ablate, parse_axis
from .compare import TARGET, check_targets, compare
from .load import load
from .norms import norms
from .output import Files
from .pareto import pareto
from .sensitivity import sensitivity
from .spectrum import spectrum
from .subjects import check_classifier, open_subjects
from .trace import sample

_EXAMPLES = """examples:
  vmoe-momentum analyze spectrum --config configs/digits.yaml --model runs/digits/version_0/checkpoints/last.ckpt
  vmoe-momentum analyze spectrum --config configs/digits.yaml --model plain=a.ckpt --model momentum=b.ckpt
  vmoe-momentum analyze load --data FolderDataModule --data.root data/digits --data.image_size 16 --model last.ckpt
  vmoe-momentum analyze compare --run HeavyBall=runs/hb --run Residual=runs/res --target '[0.9,0.95]'
  vmoe-momentum analyze ablate --out runs/grid -- --config configs/digits.yaml --model.net.init_args.rule HeavyBall

How to read what they draw: vmoe_momentum/analysis/README.md"""

MU = "model.net.init_args.rule.mu=0.3,0.5,0.7,0.9"
GAMMA = "model.net.init_args.rule.gamma=0.5,1.0,1.5"
ON_MODELS = {
    "spectrum": "eigenvalues of -du/dx over the stability regions of Residual and of the trained rule",
    "load": "what each expert receives, and how often the expert with the i-th largest output is chosen",
    "norms": "size of residual stream, updates and momentum over depth",
    "sensitivity": "how far logits and expert choices move under input noise",
    "pareto": "the router's combination of experts beside the least-norm point of their outputs",
}


class Looked(NamedTuple):
    """A kind of data that networks are looked at on."""

    data: type[LightningDataModule]  # base of the classes that --data may be
    opened: Callable[[str], Saved]  # a checkpoint of a network for it
    check: Callable[[Saved, Any], None]  # raises ValueError: not one for this data
    batches: Callable[[Any, int], list[Tensor]]  # at most so many pictures, or blocks of text
    instruments: tuple[str, ...]


def run(argv: list[str], looked: list[Looked], fit: Fit, check: Callable[[list[str]], None]) -> None:
    """Runs `analyze INSTRUMENT`; argv is what follows `analyze`.

    looked: kinds of data. fit, check: train, or only try, a command line of `fit` (ablate needs them). Mistakes come
    out as exceptions.
    """
    argv, options = _split(argv)
    configs, argv = _configs(argv)
    settings = _parse(argv, configs, tuple(kind.data for kind in looked))
    command, settings = settings["command"], settings[settings["command"]]
    if options is not None and command != "ablate":
        raise ValueError(f"analyze {command}: nothing can follow --; that is for ablate")
    if command in ON_MODELS:
        _on_models(command, settings, looked)
    elif command == "compare":
        check_targets(settings["target"])
        compare(settings["run"] or _missing("--run", "LABEL=FOLDER"), settings["target"], _files(command, settings))
    else:
        _ablate(settings, options, fit, check)


def _on_models(command: str, settings: dict[str, Any], looked: list[Looked]) -> None:
    if settings.get("noise") == []:
        raise ValueError("--noise=[]: give a standard deviation, such as 8")
    data, device = settings["data"], pick_device(settings["device"])
    kind = next(kind for kind in looked if isinstance(data, kind.data))
    if command not in kind.instruments:
        raise ValueError(f"analyze {command}: not for {kind.data.__name__}; use {', '.join(kind.instruments)}")
    Console(stderr=True).print(f"on {device}", highlight=False)
    subjects = open_subjects(settings["model"], lambda saved: kind.check(saved, data), kind.opened)
    files = _files(command, settings)
    batches = kind.batches(data, settings["images"])
    if command == "spectrum":
        sizes = {"tokens": settings["tokens"], "images": settings["coupled_images"], "count": settings["eigenvalues"]}
        spectrum(subjects, batches, files, **sizes, device=device)
    elif command == "load":
        load(subjects, batches, files, device)
    elif command == "norms":
        norms(subjects, batches, files, settings["logs"], device)
    elif command == "pareto":
        pareto(subjects, batches, files, settings["tokens"], device)
    else:
        sensitivity(subjects, batches, files, settings["noise"], device)


def _ablate(settings: dict[str, Any], options: list[str] | None, fit: Fit, check: Callable[[list[str]], None]) -> None:
    if not options:
        raise ValueError("analyze ablate: say how to train after --, as: -- --config configs/digits.yaml")
    x, y = parse_axis(settings["x"]), parse_axis(settings["y"])
    files = Files(settings["out"], "ablate", keep=True)
    ablate(fit, check, options, x, y, settings["seeds"], files)


def _files(command: str, settings: dict[str, Any]) -> Files:
    return Files(settings["out"], command, settings["overwrite"])


def _missing(option: str, value: str) -> list[str]:
    raise ValueError(f"{option}: none given; use {option} {value}")


def pictures(data_class: type[LightningDataModule]) -> Looked:
    """Image classifiers on the validation pictures of data_class, which has image_size, num_classes, count("val")."""

    def check(saved: Saved, data: Any) -> None:
        check_classifier(saved, data.image_size, data.num_classes)

    def batches(data: Any, images: int) -> list[Tensor]:
        data.setup("test")
        return sample(data.test_dataloader(), images, data.count("val"))

    return Looked(data_class, open_saved, check, batches, tuple(ON_MODELS))


def _split(argv: list[str]) -> tuple[list[str], list[str] | None]:
    """Before and after `--`."""
    where = argv.index("--") if "--" in argv else len(argv)
    return argv[:where], argv[where + 1 :] if where < len(argv) else None


def _configs(argv: list[str]) -> tuple[list[str], list[str]]:
    """The files of `--config`, and the rest of argv. Of a config of fit only its data is of use here."""
    found, rest, words = [], [], iter(argv)
    for word in words:
        if word == "--config":
            found.append(next(words, ""))
        elif word.startswith("--config="):
            found.append(word.partition("=")[2])
        else:
            rest.append(word)
    return found, rest


def _data_of(configs: list[str]) -> dict[str, Any] | None:
    """The last `data` section. Raises FileNotFoundError, ValueError: no such file, no YAML, no data in it."""
    found: dict[str, Any] = {}
    for path in configs:
        if not Path(path).is_file():
            raise FileNotFoundError(f"config={path}: no such file")
        section = read_config(path).get("data")
        found = _merged(found, section) if isinstance(section, dict) else found
    if configs and not found:
        raise ValueError(f"config={', '.join(configs)}: no data section in it; say --data and --data.root")
    return found or None


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Later settings over earlier ones, part by part, as fit merges its configs."""
    found = dict(first)
    for key, value in second.items():
        both = isinstance(value, dict) and isinstance(found.get(key), dict)
        found[key] = _merged(found[key], value) if both else value
    return found


def _parse(argv: list[str], configs: list[str], data_classes: tuple[type, ...]) -> dict[str, Any]:
    parser = new_parser(
        "Look into trained networks: a CSV and a picture each.", _EXAMPLES, prog="vmoe-momentum analyze"
    )
    commands = parser.add_subcommands(dest="command")
    data = _data_of(configs)
    for name, text in ON_MODELS.items():
        commands.add_subcommand(name, _model_parser(name, text, data, data_classes), help=text)
    text = "epochs and seconds that runs took to reach an accuracy, or a perplexity"
    commands.add_subcommand("compare", _compare_parser(text), help=text)
    text = "train over a grid of two settings and several seeds; resumable, one row a run"
    commands.add_subcommand("ablate", _ablate_parser(text), help=text)
    arguments = parser.parse_args(argv)
    return parser.instantiate(arguments).as_dict()


def _model_parser(name: str, text: str, data: dict[str, Any] | None, data_classes: tuple[type, ...]) -> Parser:
    parser = new_parser(_sentence(text), _EXAMPLES)
    parser.add_argument("--config", help="A config of fit, for its data section; may be given several times.")
    parser.add_subclass_arguments(data_classes, "data", required=True, help="Where images or text come from.")
    if data is not None:
        parser.set_defaults({"data": data})
    parser.add_argument(
        "--model", action="append", type=str, default=None,
        help="[LABEL=]PATH: a checkpoint of fit, a folder of them (one an epoch), or local-dir:PATH; several times. "
        "The label is the rule's name where none is given.",
    )  # fmt: skip
    text = "At most so many images, or blocks of text, evenly over the validation split."
    parser.add_number("--images", int, COUNT, text, default=360)
    if name in ("spectrum", "pareto"):
        text, tokens = "At most so many tokens, sampled from the images.", {"spectrum": 128, "pareto": 2048}[name]
        parser.add_number("--tokens", int, COUNT, text, default=tokens)
    if name == "spectrum":
        text = "Whole images, where routing couples their tokens (soft)."
        parser.add_number("--coupled_images", int, COUNT, text, default=2)
        parser.add_number("--eigenvalues", int, COUNT, "Largest eigenvalues of each of those images.", default=24)
    if name == "norms":
        parser.add_argument(
            "--logs", type=list[str] | None, help="[[LABEL=]FOLDER,...] of fit, for the same norms over training."
        )
    if name == "sensitivity":
        noise = [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
        text = "Standard deviations in pixel units, of 255."
        parser.add_number("--noise", list[float], Range(0, 1e4), text, default=noise)
    parser.add_argument("--device", type=str | None, default=None, help=DEVICE)
    return _with_output(parser)


def _compare_parser(text: str) -> Parser:
    parser = new_parser(_sentence(text), _EXAMPLES)
    parser.add_argument(
        "--run", action="append", type=str, default=None,
        help="[LABEL=]FOLDER with the metrics.csv of a fit; several times, one label again for further seeds.",
    )  # fmt: skip
    parser.add_number(
        "--target", list[float], TARGET, "Accuracies to reach, as shares; or perplexities, above 1.", default=[0.95]
    )
    return _with_output(parser)


def _ablate_parser(text: str) -> Parser:
    parser = new_parser(
        f"{_sentence(text)} What follows -- are options of fit. Each run takes what a fit takes.", _EXAMPLES
    )
    parser.add_argument("--x", type=str, default=MU, help="KEY=VALUES: a setting of fit and its values.")
    parser.add_argument("--y", type=str, default=GAMMA, help="KEY=VALUES: another.")
    parser.add_number("--seeds", list[int], SEED, "Seeds of each pair of values.", default=[0, 1, 2])
    parser.add_argument("--out", type=str, required=True, help="Folder for ablate.csv, ablate.png and the logs.")
    return parser


def _with_output(parser: Parser) -> Parser:
    parser.add_argument("--out", type=str, default="runs/analysis", help="Folder for the CSV and the picture.")
    parser.add_argument("--overwrite", action="store_true", help="Replace what this instrument left there before.")
    return parser


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
