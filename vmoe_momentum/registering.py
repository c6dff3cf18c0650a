"""Our networks among timm's, whichever of the two packages is imported first, without importing timm for it."""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MODELS = f"{__package__}.models"  # importing it registers them


class _AfterTimm:
    """Among Python's finders of modules: finds nothing itself, but imports our models once timm was imported."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "timm":
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(MODELS)

        # of this one loader; to look for timm alone does nothing
        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def register_with_timm() -> None:
    """Now where timm is imported already, else right after it is."""
    if "timm" in sys.modules:
        import_module(MODELS)
    else:
        sys.meta_path.insert(0, _AfterTimm())
