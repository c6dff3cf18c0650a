"""What Lightning's own parser makes of Trainer's options, in a process that has imported nothing of ours.

stdin: JSON list of [option, YAML text of a value]; stdout: JSON list of what `parse` gives for each, by flag and file.
"""

import json
import sys
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser


def parse(parser_class: type[LightningArgumentParser], wanted: list[list[str]], folder: Path) -> list[list[str]]:
    """For each option and value the parsed one with its type, or `refused`: as a flag, and in a file."""
    parser = parser_class(exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_lightning_class_args(Trainer, "trainer")
    found = []
    for option, text in wanted:
        file = folder / "one.yaml"
        file.write_text(f"trainer:\n  {option}: {text}\n")
        found.append(
            [_value(parser, words, option) for words in ([f"--trainer.{option}={text}"], [f"--config={file}"])]
        )
    return found


def _value(parser: LightningArgumentParser, words: list[str], option: str) -> str:
    try:
        value: Any = parser.parse_args(words)["trainer"][option]
    except Exception:  # refused is what counts here, not how
        return "refused"
    return f"{type(value).__name__} {value!r}"


if __name__ == "__main__":
    print(json.dumps(parse(LightningArgumentParser, json.load(sys.stdin), Path(sys.argv[1]))))
