"""What needs no network is answered before torch is imported; each case in a process of its own."""

import subprocess
import sys

import pytest
from lightning.pytorch.cli import LightningCLI

from vmoe_momentum import cli

HEAVY = ("torch", "lightning", "timm", "torchvision", "matplotlib", "scipy")
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


@pytest.mark.parametrize("words", [(), ("-h",), ("--help",), ("--debug", "--help")], ids=" ".join)
def test_help_is_there_at_once(words: tuple[str, ...]) -> None:
    done = in_own_process(LOADED, *words)
    assert "usage: vmoe-momentum [--debug] COMMAND" in done.stdout
    assert done.stdout.endswith("loaded []\n")


MISTAKES = [
    (("fitt",), "command=fitt; did you mean fit? valid: analyze, classify, data"),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=lambda value: " ".join(value[:3]))
def test_mistypings_are_answered_at_once(words: tuple[str, ...], message: str) -> None:
    done = in_own_process(LOADED, *words)
    assert done.stderr.startswith(f"vmoe-momentum: error: {message}")
    assert done.stdout == "code 2\nloaded []\n"


def test_commands_of_lightning_are_known() -> None:
    assert set(cli.LIGHTNING) == set(LightningCLI.subcommands())


KNOWN = "; print(timm.is_model('vmoe_small_patch32_224'), 'vmoe_small_patch32_224' in timm.list_models('vmoe*'))"


@pytest.mark.parametrize(
    "imports",
    [
        "import timm, vmoe_momentum",
        "import vmoe_momentum, timm",
        "import vmoe_momentum; from timm.models import create_model; import timm",
        "import vmoe_momentum; import importlib.util; importlib.util.find_spec('timm'); import timm",
        "import vmoe_momentum.moe, timm",
        "import vmoe_momentum.models; import timm",
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
