"""`vmoe-momentum completion bash | zsh | tcsh`: a script that completes commands, options and their choices.

Made from what each command's --help says, once; the script itself starts no Python, so completing takes no time.
"""

import contextlib
import io
import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterable

from .names import did_you_mean
from .progress import track

SHELLS = {
    "bash": "~/.local/share/bash-completion/completions/vmoe-momentum",
    "zsh": "a folder of $fpath, as _vmoe-momentum",
    "tcsh": "a file that ~/.tcshrc sources",
}
HELP = f"""usage: vmoe-momentum completion {{{",".join(SHELLS)}}}

Prints a script with which the shell completes commands, options and their choices. Where to:

{chr(10).join(f"  {shell:5}{place}" for shell, place in SHELLS.items())}

example:
  vmoe-momentum completion bash > ~/.local/share/bash-completion/completions/vmoe-momentum
"""
_CHOICES = re.compile(r"\{([\w,.-]+)\}")
_OPTION = re.compile(r"^  (?:-\w, )?(--[\w.]+)[ ,]?(.*)$", re.MULTILINE)
_WORDS = re.compile(r"usage: .* \{([\w,-]+)\}$", re.MULTILINE)  # which a command takes and ends with
_SUBCOMMAND = re.compile(r"^    ([a-z][\w-]*)(?:  |$)", re.MULTILINE)


def run(argv: list[str], command: Callable[[list[str]], None], names: Iterable[str]) -> None:
    """command: runs one command line; names: of all commands. Raises ValueError: no such shell."""
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if argv[0] not in SHELLS or argv[1:]:
        raise ValueError(f"completion {' '.join(argv)}{did_you_mean(argv[0], list(SHELLS))}")
    import shtab  # here, so that --help does without it

    parser = ArgumentParser(prog="vmoe-momentum")
    _fill(parser, [], command, track(sorted(names), "reading every --help"))
    print(shtab.complete(parser, argv[0]))


def _fill(parser: ArgumentParser, path: list[str], command: Callable[[list[str]], None], names: Iterable[str]) -> None:
    """Adds commands of these names, what their help tells of, and their own commands."""
    commands = parser.add_subparsers()
    for name in names:
        told = _help([*path, name], command)
        own = commands.add_parser(name, help=_summary(told))
        for option, rest in dict(_OPTION.findall(told)).items():
            if option != "--help":
                choices = _CHOICES.match(rest)
                own.add_argument(option, choices=choices[1].split(",") if choices else None)
        if words := _WORDS.match(told):
            own.add_argument("word", choices=words[1].split(","))
        _, found, listed = told.partition("Available subcommands:\n")
        if found:
            _fill(own, [*path, name], command, _SUBCOMMAND.findall(listed.split("\n\n\n")[0].split("examples:")[0]))


def _help(path: list[str], command: Callable[[list[str]], None]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as told, contextlib.suppress(SystemExit):
        command([*path, "--help"])
    return told.getvalue()


def _summary(told: str) -> str:
    """The first sentence under the usage."""
    paragraphs = [" ".join(part.split()) for part in told.split("\n\n") if not part.startswith("usage:")]
    return re.split(r"(?<=\.) ", paragraphs[0])[0] if paragraphs else ""
