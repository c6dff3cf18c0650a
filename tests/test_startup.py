"""What needs no network is answered before torch is imported; each case in a process of its own."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI

from vmoe_momentum import cli, lightning_cli
from vmoe_momentum.messages import mistakes
from vmoe_momentum.robustness.asked import ATTACK_NAMES
from vmoe_momentum.robustness.attacks import ATTACKS

HEAVY = ("torch", "lightning", "timm", "torchvision", "matplotlib", "scipy")
CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
LOADED = f"""
import sys
from vmoe_momentum import cli
try:
    cli.main(sys.argv[1:])
except SystemExit as stopped:
    print("code", stopped.code)
print("loaded", [name for name in {HEAVY} if name in sys.modules])
"""


def in_own_process(code: str, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)


HELPS = {(): "[--debug] COMMAND", ("-h",): "[--debug]", ("--debug", "--help"): "[--debug]"} | {
    (command, "--help"): command for command in ("robustness", "data", "export", "classify")
}  # fmt: skip


@pytest.mark.parametrize(("words", "usage"), HELPS.items(), ids=lambda v: " ".join(v) if isinstance(v, tuple) else "")
def test_help_is_there_at_once(words: tuple[str, ...], usage: str) -> None:
    done = in_own_process(LOADED, *words)
    assert f"usage: vmoe-momentum {usage}" in done.stdout
    assert done.stdout.endswith("loaded []\n")


MISTAKES = [
    (("fitt",), "command=fitt; did you mean fit? valid: analyze, classify, completion"),
    (("fit", f"--config={CONFIG}", "--trainr.max_epochs", "3"), "trainr: no such setting; did you mean trainer? valid"),
    (("robustness", "--modle", "x"), "--modle: no such option; --help lists them"),
    (("data", "prepare", "digits", "--ot", "x"), "--ot: no such option; --help lists them"),
    (("export", "--tto", "hf"), "--tto: no such option; --help lists them"),
    (("classify", "a", "b", "--topk=3"), "--topk: no such option; --help lists them"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda v: v[0] if isinstance(v, tuple) else "")
def test_mistypings_are_answered_at_once(words: tuple[str, ...], message: str) -> None:
    done = in_own_process(LOADED, *words)
    assert done.stderr.startswith(f"vmoe-momentum: error: {message}")
    assert done.stdout == "code 2\nloaded []\n"


def test_commands_of_lightning_are_known() -> None:
    assert set(cli.LIGHTNING) == set(LightningCLI.subcommands())
    assert set(mistakes.TOP) == {*lightning_cli.SINGLE, "data", "model", "trainer"}


@pytest.mark.parametrize("command", cli.LIGHTNING)
def test_keys_of_the_parser_are_no_mistypings(command: str, monkeypatch) -> None:
    """Whatever this Lightning's parser takes at the top."""
    seen = []
    monkeypatch.setattr(lightning_cli.VMoECLI, "parse_arguments", lambda cli, parser, args: seen.append(parser))
    with pytest.raises(AttributeError):  # nothing was parsed
        lightning_cli.run_lightning([command])
    actions = seen[0]._subcommands_action.choices[command]._actions
    keys = [
        option.removeprefix("--").partition(".")[0] for a in actions for option in a.option_strings if "--" in option
    ]
    assert "trainer" in keys and "help" in keys
    taken = {key: None for key in keys if key not in ("help", "config")}
    assert mistakes.find_mistyped([taken]) is None


def test_attacks_are_known_by_name() -> None:
    assert set(ATTACK_NAMES) == {
        name for name, attack in ATTACKS.items() if attack.run.__module__.startswith("vmoe_momentum")
    }


@pytest.mark.parametrize("room", ["datasets", "export", "robustness"])
def test_names_of_rooms_are_there_and_no_files(room: str) -> None:
    package = import_module(f"vmoe_momentum.{room}")
    assert all(hasattr(package, name) for name in package.__all__)
    assert set(package.__all__) <= set(dir(package))
    files = {path.stem for path in Path(package.__file__).parent.glob("*.py")}
    assert not files & set(package.__all__)


KNOWN = "; print(timm.is_model('vmoe_small_patch32_224'), 'vmoe_small_patch32_224' in timm.list_models('vmoe*'))"


@pytest.mark.parametrize(
    "imports",
    [
        "import timm, vmoe_momentum",
        *(
            pytest.param(imports, marks=pytest.mark.long)
            for imports in (
                "import vmoe_momentum; from timm.models import create_model; import timm",
                "import vmoe_momentum, timm",
                "import vmoe_momentum; import importlib.util; importlib.util.find_spec('timm'); import timm",
                "import vmoe_momentum.moe, timm",
                "import vmoe_momentum.models; import timm",
            )
        ),
    ],
)
def test_timm_knows_our_networks_in_any_order(imports: str) -> None:
    assert in_own_process(imports + KNOWN).stdout == "True True\n"


def test_names_are_there_when_used() -> None:
    code = (
        "import sys, vmoe_momentum as v; print('torch' in sys.modules, set(v.__all__) <= set(dir(v)));"
        "print(all(getattr(v, name).__name__ == name for name in v.__all__), v.models.create_model is v.create_model)"
    )
    assert in_own_process(code).stdout == "False True\nTrue True\n"
    assert "has no attribute 'HeavyBal'" in in_own_process("import vmoe_momentum; vmoe_momentum.HeavyBal").stderr


LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FAULTS = """
import resource, torch
from vmoe_momentum.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
count = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = count()
torch.zeros(2**25)  # 128 MB
print("FAULTS", count() - before)
"""


@pytest.mark.skipif(not LARGE_PAGES.exists() or "[madvise]" not in LARGE_PAGES.read_text(), reason="not asked for here")
@pytest.mark.parametrize("wanted", [None, "0"])
def test_large_tensors_lie_in_large_pages(wanted: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    if wanted is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = wanted
    refused = refusals()
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, env=environment)
    faults = int(run.stdout.partition("FAULTS ")[2])
    if wanted is None and faults >= 10_000 and refusals() > refused:
        pytest.skip("memory was too full or too scattered: the kernel was asked for large pages, and had none")
    assert faults > 20_000 if wanted == "0" else faults < 10_000


def refusals() -> int:
    """How often the kernel was asked for a large page and gave small ones; 0 where it does not say."""
    found = [
        line.split()[1]
        for line in Path("/proc/vmstat").read_text().splitlines()
        if line.startswith("thp_fault_fallback ")
    ]
    return int(found[0]) if found else 0
