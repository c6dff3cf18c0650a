"""Names of a package that are imported when they are first used, so that its light files come without its heavy ones.

`__getattr__, __dir__ = lazily(__name__, {"attacks": ("ATTACKS", "Budget")})` in its `__init__.py`. No name may be that
of a file in the package: importing the file would put it in the name's place.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, tuple[str, ...]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """homes: file of the package -> names in it."""
    files = {name: file for file, names in homes.items() for name in names}
    found = vars(sys.modules[package])

    def __getattr__(name: str) -> Any:
        if name not in files:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found[name] = getattr(import_module(f"{package}.{files[name]}"), name)
        return found[name]

    def __dir__() -> list[str]:
        return sorted({*found, *files})

    return __getattr__, __dir__
