"""The parser of the commands that are not Lightning's."""

from argparse import RawDescriptionHelpFormatter

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
