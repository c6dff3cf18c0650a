"""RobustBench's models, by name, as the robustness benchmark wants them. Its package is optional."""

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.hub import get_dir

from ..robustness import View

PREFIX = "robustbench:"
INSTALL = (
    "pip install 'vmoe_momentum[robustbench]', then pip install --no-deps robustbench==1.1.1 (with them it asks for an "
    "old timm)"
)
# its data.PREPROCESSINGS, but for Crop288, which crops without a resize
VIEWS = {
    "Res256Crop224": View(224, 224 / 256, "bilinear"),
    "BicubicRes256Crop224": View(224, 224 / 256, "bicubic"),
    "Res224": View(224, 1.0, "bilinear", squash=True),
}
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class ZooModel(NamedTuple):
    """A model of theirs: pixels in [0, 1] -> logits."""

    module: nn.Module
    view: View
    class_names: list[str] | None  # of CIFAR-10; ImageNet's 1,000 are known by their number
    entry: str  # dataset/threat model/name


def open_zoo_model(source: str) -> ZooModel:
    """source: robustbench:NAME or, where several have the name, robustbench:DATASET/THREAT_MODEL/NAME.

    Weights are fetched once, into torch's hub folder. Raises ValueError: the package is not there, has no such model or
    several, or cannot build it; it crops pictures in a way that models here do not.
    """
    wanted = source.removeprefix(PREFIX)
    with _robustbench(source) as package:
        dataset, threat, name = _find(source, wanted, package.model_dicts)
        view = _view(source, dataset, _settings(package.model_dicts, dataset, threat, name))
        try:
            module = package.load_model(
                model_name=name, dataset=dataset, threat_model=threat, model_dir=Path(get_dir()) / "robustbench"
            )
        except Exception as error:  # of gdown, requests, torch.load or the models' own code
            told = " ".join(str(error).split())
            raise ValueError(
                f"--model={source}: RobustBench cannot load it ({type(error).__name__}: {told}); its weights are "
                f"fetched once into {Path(get_dir()) / 'robustbench' / dataset / threat}, or put there by hand"
            ) from error
    view = view or _own_view(source, getattr(getattr(module, "model", module), "default_cfg", None))
    return ZooModel(module.eval(), view, list(CIFAR10) if dataset == "cifar10" else None, f"{dataset}/{threat}/{name}")


class _Package(NamedTuple):
    load_model: Any
    model_dicts: Mapping[Any, Mapping[Any, Mapping[str, Any]]]


@contextmanager
def _robustbench(source: str) -> Iterator[_Package]:
    """Its wheel asks for pyautoattack and imports it as autoattack: while it is open, that name stands for it."""
    aliased = False
    try:
        if importlib.util.find_spec("autoattack") is None and importlib.util.find_spec("pyautoattack") is not None:
            sys.modules["autoattack"] = importlib.import_module("pyautoattack")
            aliased = True
        try:
            version("robustbench")  # torchattacks brings files of an old one, which do not work
            utils = importlib.import_module("robustbench.utils")
            found = _Package(utils.load_model, importlib.import_module("robustbench.model_zoo").model_dicts)
        except ImportError as error:
            raise ValueError(f"--model={source}: the package robustbench is missing ({error}); {INSTALL}") from error
        yield found
    finally:
        if aliased:
            for name in [name for name in sys.modules if name.partition(".")[0] == "autoattack"]:
                del sys.modules[name]


def _find(source: str, wanted: str, models: Mapping[Any, Any]) -> tuple[str, str, str]:
    """Dataset, threat model, name."""
    everything = [
        (dataset.value, threat.value, name)
        for dataset, by_threat in models.items() for threat, found in by_threat.items() for name in found
    ]  # fmt: skip
    *place, name = wanted.split("/")
    found = [entry for entry in everything if entry[2] == name and list(entry[:2])[: len(place)] == place]
    if len(found) == 1:
        return found[0]
    if found:
        told = " or ".join(f"{PREFIX}{'/'.join(entry)}" for entry in found)
        raise ValueError(f"--model={source}: RobustBench has several of this name; say which: {told}")
    near = [PREFIX + "/".join(entry) for entry in everything if name.lower()[:8] in entry[2].lower()][:3]
    told = f"such as {', '.join(near)}" if near else f"{len(everything)} of them, by the names of robustbench.github.io"
    raise ValueError(f"--model={source}: RobustBench has no such model; use one it has, {told}")


def _settings(models: Mapping[Any, Any], dataset: str, threat: str, name: str) -> Mapping[str, Any]:
    by_threat = next(found for key, found in models.items() if key.value == dataset)
    return next(found for key, found in by_threat.items() if key.value == threat)[name]


def _view(source: str, dataset: str, settings: Mapping[str, Any]) -> View | None:
    """As its data.get_preprocessing shows pictures; None where the network says it, as timm's do."""
    if dataset != "imagenet":
        return View(32, 1.0, "bilinear")
    name = settings.get("preprocessing")
    if name is not None and name not in VIEWS:
        raise ValueError(
            f"--model={source}: it wants pictures prepared as {name}; models here are shown them as one of "
            f"{', '.join(VIEWS)}"
        )
    return None if name is None else VIEWS[name]


def _own_view(source: str, config: Mapping[str, Any] | None) -> View:
    if config is None:
        raise ValueError(f"--model={source}: neither RobustBench nor its network says how it wants pictures")
    return View(config["input_size"][1], float(config["crop_pct"]), config["interpolation"])
