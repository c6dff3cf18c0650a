"""The completion scripts, asked as shells ask them."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
from cli_helpers import fails

from vmoe_momentum import cli


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "vmoe-momentum"
    with path.open("w") as file, contextlib.redirect_stdout(file):
        cli.run(["completion", "bash"])
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("da", {"data"}),
        ("data ''", {"prepare", "verify", "info", "sample"}),
        ("data prepare ''", {"digits", "photos", "idx", "folder", "imagenet", "text", "imagenet-c"}),
        ("data prepare digits --o", {"--out", "--overwrite"}),
        ("analyze spec", {"spectrum"}),
        ("export --to ''", {"hf", "pt2", "onnx", "state-dict"}),
        ("fit --trainer.max_e", {"--trainer.max_epochs"}),
        ("robustness --norm ''", {"Linf", "L2"}),
        ("completion z", {"zsh"}),
    ],
)
def test_bash_completes(words: str, expected: set[str], script: Path) -> None:
    ask = f"""source {script}
COMP_WORDS=(vmoe-momentum {words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
read -ra how <<< "$(complete -p vmoe-momentum)"
for ((i = 0; i < ${{#how[@]}}; i++)); do [[ ${{how[i]}} == -F ]] && work=${{how[i + 1]}}; done
$work vmoe-momentum "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == expected


def test_every_command_is_completed(script: Path) -> None:
    text = script.read_text()
    assert all(f"_vmoe_momentum_{name}_option_strings=" in text for name in (*cli.LIGHTNING, *cli.COMMANDS))


@pytest.mark.skipif(shutil.which("zsh") is None, reason="needs zsh")
def test_zsh_takes_its_script(tmp_path: Path, capsys) -> None:
    cli.run(["completion", "zsh"])
    (tmp_path / "_vmoe-momentum").write_text(capsys.readouterr().out)
    subprocess.run(["zsh", "-n", str(tmp_path / "_vmoe-momentum")], check=True)


def test_what_is_no_shell_is_told(capsys) -> None:
    assert "completion" in fails(["completion", "bas"], capsys)
    cli.main(["completion", "--help"])
    assert "vmoe-momentum completion bash >" in capsys.readouterr().out
