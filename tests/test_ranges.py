"""Every number in a setting has a range, its docstring or help says it, and nothing outside gets past."""

import inspect
import math
import re
import typing
from collections.abc import Callable
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback
from registered import registered

import vmoe_momentum
from vmoe_momentum import datasets, language, moe, momentum, robustness, training
from vmoe_momentum.analysis.commands import ON_MODELS, _ablate_parser, _compare_parser, _model_parser
from vmoe_momentum.datasets import commands as data_commands
from vmoe_momentum.export.commands import classify_parser, export_parser
from vmoe_momentum.export.exporting import export
from vmoe_momentum.models import commands as import_commands
from vmoe_momentum.models.vit import MomentumVisionTransformer
from vmoe_momentum.ranges import Range, check, in_range
from vmoe_momentum.robustness.commands import parser as robustness_parser
from vmoe_momentum.robustness.settings import RANGES, Settings, check_settings

STRANGE = (math.nan, math.inf, -math.inf, -1, 0, 1e30, -1e30, 1.5, True, 10**30)
PLACES = {  # what to build, by name; whatever else takes a number here is missing from this list
    **registered(momentum.MomentumRule),
    **registered(moe.Router),
    **registered(Callback),
    **registered(datasets.ImageDataModule),
    "TextDataModule": datasets.TextDataModule,
    "prepare_text": datasets.prepare_text,
    "LanguageModule": language.LanguageModule,
    "SparseLanguageModel": language.SparseLanguageModel,
    "create_language_model": language.create_language_model,
    **{f.__name__: f for f in (*data_commands.PREPARE.values(), *data_commands.LOOK.values())},
    **{f.__name__: f for f in (import_commands.import_flax, import_commands.import_timm, export)},
    "ProgressiveResize": datasets.resizing.ProgressiveResize,
    "ImageClassifier": training.ImageClassifier,
    "OptimizerSettings": training.OptimizerSettings,
    "ScheduleSettings": training.ScheduleSettings,
    "AdversarialSettings": training.AdversarialSettings,
    "ConsistencySettings": training.ConsistencySettings,
    "UpcycledViT": vmoe_momentum.UpcycledViT,
    "MomentumVisionTransformer": MomentumVisionTransformer,
    "create_model": vmoe_momentum.create_model,
    "from_flax": vmoe_momentum.from_flax,
}
PLACES = {name: place for name, place in PLACES.items() if place.__module__.startswith("vmoe_momentum.")}
BUDGETS = {("RobustnessCheck", "val_eps"), ("AdversarialSettings", "eps"), ("AdversarialSettings", "step_size")}
HELPS = {"MomentumVisionTransformer"}  # its settings are explained at create_model


def numbers(place: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters that take numbers, alone or in a list."""
    function = place.__init__ if isinstance(place, type) else place
    hints = typing.get_type_hints(inspect.unwrap(function), vars(inspect.getmodule(place)))
    parameters = inspect.signature(function).parameters
    return {name: parameters[name] for name, hint in hints.items() if name != "return" and is_number(hint)}


def is_number(hint: Any) -> bool:
    """int, float, or a union, list or tuple of them."""
    if typing.get_origin(hint) in (dict, typing.Literal) or typing.get_origin(hint) is Callable:
        return False
    return hint in (int, float) or any(is_number(member) for member in typing.get_args(hint))


SETTINGS = [(place, setting) for place in PLACES for setting in numbers(PLACES[place])]


def ranges_of(place: Callable[..., Any]) -> dict[str, Range]:
    return getattr(place.__init__ if isinstance(place, type) else place, "ranges", {})


@pytest.mark.parametrize(("place", "setting"), SETTINGS, ids=lambda value: value)
def test_every_number_has_a_range_that_is_stated_and_kept(place: str, setting: str) -> None:
    """The constructor itself is called: the range is checked before anything that the other arguments would need."""
    target = PLACES[place]
    if (place, setting) == ("RobustnessCheck", "eps"):  # texts such as 1/255: checked once they are numbers
        return outside_raises(lambda value: target(eps=[str(value)]), RANGES["eps"], "eps")
    if (place, setting) in BUDGETS:  # numbers, or such texts
        assert "(0, 1]" in explained(target, setting)
        return outside_raises(lambda value: target(**{setting: value}), Range(0, 1, above=True), setting)
    assert setting in ranges_of(target), f"{place}.{setting} takes a number and states no range"
    allowed = ranges_of(target)[setting]
    function = target.__init__ if isinstance(target, type) else target
    ranges = ranges_of(target)
    required = {
        name: ranges[name].high if name in ranges else "x"
        for name, parameter in inspect.signature(target).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    default = inspect.signature(function).parameters[setting].default
    assert default is inspect.Parameter.empty or default in allowed
    outside_raises(lambda value: target(**{**required, setting: value}), allowed, setting, many=True)
    if place not in HELPS:
        said = " ".join(explained(target, setting).split())
        assert allowed.interval in said, f"{place}: the docstring of {setting} does not say {allowed.interval}"


def explained(target: Callable[..., Any], setting: str) -> str:
    """What the docstring says of one argument."""
    text = inspect.getdoc(target)
    entries = re.split(r"^    (\w+): ", text.partition("Args:")[2], flags=re.MULTILINE)
    return dict(zip(entries[1::2], entries[2::2], strict=True)).get(setting, text if "Args:" not in text else "")


def outside_raises(build: Callable[[Any], Any], allowed: Range, setting: str, many: bool = False) -> None:
    assert not {math.nan, math.inf, 1e30, -1e30, True} & {value for value in STRANGE if value in allowed}
    for value in STRANGE:
        for told in (value, [value, value]) if many else (value,):
            if told not in allowed:
                with pytest.raises(ValueError, match=setting) as error:
                    build(told)
                assert str(value) in str(error.value) or str(float(value)) in str(error.value)
                assert "\n" not in str(error.value)


def command_parsers() -> dict[str, ArgumentParser]:
    found = {"robustness": robustness_parser(), "export": export_parser(), "classify": classify_parser()}
    found |= {f"analyze {n}": _model_parser(n, t, None, datasets.ImageDataModule) for n, t in ON_MODELS.items()}
    return {**found, "analyze compare": _compare_parser("x"), "analyze ablate": _ablate_parser("x")}


def test_every_number_of_a_command_has_a_range_that_its_help_states() -> None:
    for command, parser in command_parsers().items():
        for action in parser._actions:
            hint = getattr(action, "_typehint", None)
            if not is_number(hint) or action.dest.startswith("data."):
                continue
            if (command, action.dest) == ("robustness", "eps"):  # texts such as 1/255, see check_settings
                continue
            assert action.dest in parser.ranges, f"{command} --{action.dest} takes a number and states no range"
            allowed = parser.ranges[action.dest]
            assert allowed.interval in action.help
            assert action.default in allowed
            for value in STRANGE:
                wanted = [value] if "list" in str(hint) else value
                if wanted not in allowed:
                    values = {name: parser.get_defaults()[name] for name in parser.ranges} | {action.dest: wanted}
                    with pytest.raises(ValueError, match=f"--{action.dest}="):
                        parser._check_numbers(values)


def test_numbers_of_the_robustness_report_have_ranges() -> None:
    hints = typing.get_type_hints(Settings)
    for setting in (name for name, hint in hints.items() if is_number(hint) and hint is not bool):
        many = "tuple" in str(hints[setting])
        outside_raises(
            lambda value, setting=setting, many=many: check_settings(
                Settings(**{setting: tuple(value) if isinstance(value, list) else (value,) if many else value})
            ),
            RANGES[setting],
            setting,
        )
    assert robustness.corruptions.SEVERITY.interval == "1 to 5"


def test_a_range_says_what_it_takes() -> None:
    assert str(Range(0, 1, below=True)) == "a number in [0, 1)"
    assert str(Range(1, 10**9, whole=True).or_(None, "image")) == "a whole number from 1 to 1e9 or null or image"
    assert [value in Range(0, 1, above=True) for value in (0, 1e-9, 1, math.nan, "1", None)] == [
        False, True, True, False, False, False,
    ]  # fmt: skip
    check("x", [0, 1], Range(0, 1))
    with pytest.raises(ValueError, match=r"x=\[0, 2\]: use a number in \[0, 1\]; why not"):
        check("x", [0, 2], Range(0, 1).because("why not"))


def test_a_range_for_no_argument_is_a_mistake() -> None:
    with pytest.raises(TypeError, match="no argument b"):
        in_range("", b=Range(0, 1))(lambda a: a)
