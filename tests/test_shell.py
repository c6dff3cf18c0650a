"""Commands in help and documentation can be pasted into a shell, where brackets are patterns of file names."""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAMS = "vmoe-momentum|python|make|torchrun|srun|pip|git|ffmpeg"
COMMAND = re.compile(rf"(?:^|`|\$ )\s*(?:\.venv/bin/)?((?:{PROGRAMS})\s[^`]*)")
FOLDERS = ("vmoe_momentum", "benchmarks", "configs", "data", "docs", "scripts", "tests")


def texts() -> list[tuple[str, str]]:
    """Where, and a text that a reader copies from: documentation, docstrings and strings of code, heads of configs."""
    found = []
    for path in [*ROOT.glob("*.md"), *(p for f in FOLDERS for p in (ROOT / f).rglob("*"))]:
        name = str(path.relative_to(ROOT))
        if path.suffix == ".md" or path.suffix in (".yaml", ".sh"):
            found.append((name, re.sub(r"^# ?", "", path.read_text(), flags=re.MULTILINE)))
        elif path.suffix == ".py" and not name.startswith("tests"):
            nodes = ast.walk(ast.parse(path.read_text()))
            strings = [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            found += [(name, text) for text in strings if "\n" in text]
    return found


@cache
def lines() -> dict[str, list[str]]:
    """File -> its commands."""
    found: dict[str, list[str]] = {}
    for name, text in texts():
        found.setdefault(name, []).extend(commands(text))
    return {name: those for name, those in found.items() if those}


def commands(text: str) -> list[str]:
    """Lines that begin as a command does, continued lines joined."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [match[1].split("  #")[0].split("   ")[0].strip() for line in lines if (match := COMMAND.search(line))]


def bare_patterns(command: str) -> list[str]:
    """Words with a glob outside of quotes; `*.jpg` is meant as one."""
    bare = re.sub(r"'[^']*'|\"[^\"]*\"", "", command)
    return [word for word in bare.split() if re.search(r"[\[\]?{}]|=.*\*", word) and word[0] != "("]


def test_patterns_are_found() -> None:
    assert bare_patterns("vmoe-momentum robustness --eps [1/255] '--a=[x]'") == ["[1/255]"]
    assert commands("text\n    vmoe-momentum fit \\\n      --a=[1]   # why\n") == ["vmoe-momentum fit  --a=[1]"]


@pytest.mark.parametrize("name", sorted(lines()))
def test_commands_have_no_bare_patterns(name: str) -> None:
    wrong = [line for line in lines()[name] if bare_patterns(line)]
    assert not wrong
    for line in lines()[name]:
        shlex.split(line)


def test_there_is_something_to_look_at() -> None:
    found = [line for those in lines().values() for line in those]
    assert len(found) > 40 and sum("'--" in line or "'[" in line for line in found) >= 5
