"""The parser of the commands that are not Lightning's."""

from argparse import RawDescriptionHelpFormatter

import torch
from jsonargparse import ArgumentParser, DefaultHelpFormatter


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the line breaks of the examples."""


def new_parser(description: str, examples: str, **options: str) -> ArgumentParser:
    """Mistakes are raised, a cut-off name is one; `examples` end the help."""
    return ArgumentParser(
        description=description,
        epilog=examples,
        formatter_class=_Formatter,
        exit_on_error=False,
        allow_abbrev=False,
        **options,
    )


def check_device(device: str) -> None:
    """Raises ValueError: this machine has no such device."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device={device}: not on this machine; use cpu") from error
