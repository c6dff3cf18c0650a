"""No option is without effect on what was asked, and none is taken for more than it is."""

import pytest

from vmoe_momentum.robustness.commands import _settings, parser
from vmoe_momentum.robustness.effects import ALWAYS, NEEDS, check_effects, named_in
from vmoe_momentum.robustness.sets import SETS

OPTIONS = sorted({action.dest for action in parser()._actions})
SQUARE, PGD = "--attacks=[square]", "--attacks=[pgd]"
GIVEN = [f"--{name}=x" for name in SETS if name != "imagenet_o"]
# option -> command lines where it has nothing to act on, and where it has
CASES = {
    "attacks": ([[PGD], *[[one, PGD] for one in GIVEN]], [["--data=x", PGD], ["--attacks=[]", *GIVEN]]),
    "transfer": ([["--transfer=[pgd]", *GIVEN]], [["--data=x", "--transfer=[pgd]"], ["--transfer=[]", *GIVEN]]),
    "eps": (
        [["--eps=[1/255]", *GIVEN], ["--data=x", "--attacks=[]", "--eps=[1/255]"]], [["--data=x", "--eps=[1/255]"]],
    ),
    "norm": ([["--norm=L2", *GIVEN], ["--data=x", "--attacks=[]", "--norm", "L2"]], [["--data=x", "--norm=L2"]]),
    "steps": (
        [["--steps=3", *GIVEN], ["--data=x", SQUARE, "--steps=3"], ["--data=x", "--attacks=[fgsm]", "--steps=3"]],
        [["--data=x", PGD, "--steps=3"], ["--data=x", "--attacks=[]", "--transfer=[pgd]", "--steps=3"],
         ["--data=x", "--steps=20"]],
    ),
    "queries": (
        [["--queries=9", *GIVEN], ["--data=x", PGD, "--queries=9"], ["--data=x", "--attacks=[]", "--queries=9"]],
        [["--data=x", SQUARE, "--queries=9"], ["--data=x", "--queries=5000"]],
    ),
    "query_images": (
        [["--query_images=9", *GIVEN], ["--data=x", PGD, "--query_images=9"]],
        [["--data=x", SQUARE, "--query_images=9"]],
    ),
    "ids": ([["--ids=x", "--imagenet_a=x"]], [["--ids=x", "--data=x"], ["--ids=x", "--imagenet_c=x"]]),
    "random_start": (
        [["--random_start", *GIVEN], ["--data=x", SQUARE, "--random_start"],
         ["--data=x", "--attacks=[autoattack,apgd]", "--random_start"]],
        [["--data=x", PGD, "--random_start"], ["--data=x", "--attacks=[fab,square]", "--random_start"]],
    ),
    "restarts": (
        [["--restarts=3", *GIVEN], ["--data=x", "--attacks=[autoattack]", "--restarts=3"]],
        [["--data=x", SQUARE, "--restarts=3"], ["--data=x", "--attacks=[fgsm]", "--restarts=3"]],
    ),
    "eot": (
        [["--eot=3", *GIVEN], ["--data=x", "--attacks=[autoattack]", "--eot=3"]],
        [["--data=x", SQUARE, "--eot=3"], ["--data=x", PGD, "--eot=3"]],
    ),
    "router_aware": ([["--router_aware", *GIVEN]], [["--data=x", "--router_aware"]]),
    "corruptions": (
        [["--imagenet_a=x", "--corruptions=[fog]"], ["--data=x", "--regenerate=false", "--corruptions=[fog]"]],
        [["--data=x", "--corruptions=[fog]"], ["--imagenet_c=x", "--corruptions=[fog]"],
         ["--imagenet_a=x", "--corruptions=[none]"]],
    ),
    "severities": (
        [["--imagenet_a=x", "--severities=[1]"], ["--data=x", "--corruptions=[none]", "--severities=[1]"],
         ["--data=x", "--regenerate=false", "--severities=[1]"]],
        [["--data=x", "--severities=[1]"], ["--imagenet_c=x", "--severities=[1]"]],
    ),
    "regenerate": (
        [["--imagenet_c=x", "--regenerate=true"], ["--data=x", "--corruptions=[]", "--regenerate=true"]],
        [["--data=x", "--imagenet_c=x", "--regenerate=true"], ["--imagenet_c=x", "--regenerate=false"]],
    ),
    **{
        name: ([[f"--{name}=x", "--corruptions=[none]"]], [[f"--{name}=x"]])
        for name, each in SETS.items() if each.corruptions
    },
    "seed": (
        [["--seed=3", *GIVEN], ["--data=x", "--attacks=[]", "--regenerate=false", "--seed=3"],
         ["--data=x", "--imagenet_c=x", "--attacks=[]", "--seed=3"]],
        [["--seed=3", "--imagenet_a=x", "--limit=9"], ["--data=x", "--attacks=[]", "--seed=3"],
         ["--data=x", "--regenerate=false", "--seed=3"]],
    ),
}  # fmt: skip


def check(argv: list[str]) -> None:
    check_effects(named_in(argv), _settings(parser().parse_args(argv).as_dict()))


def test_every_option_says_what_it_acts_on() -> None:
    """A new one has to; and whatever does not always act has its cases here."""
    assert set(OPTIONS) <= set(NEEDS), set(OPTIONS) - set(NEEDS)
    assert {name for name in OPTIONS if NEEDS[name] is not ALWAYS} == set(CASES)


@pytest.mark.parametrize("option", CASES)
def test_options_without_effect_are_refused(option: str) -> None:
    without, acting = CASES[option]
    for argv in without:
        with pytest.raises(ValueError, match=r"--\w+: has no effect here; it needs .*\. Or leave it out") as told:
            check(["--model=a", *argv])
        assert str(told.value).startswith((f"--{option}:", "--attacks:")), argv
    for argv in acting:
        check(["--model=a", *argv])
