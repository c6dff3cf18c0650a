"""V-MoE vision transformers whose sparse mixture-of-experts layers carry momentum across depth.

net = vmoe_momentum.create_model("vmoe_small_patch32_224", rule=vmoe_momentum.HeavyBall(mu=0.7))

Names are imported when they are first used: torch and timm take seconds, which `vmoe-momentum --help` can do without.
timm knows our networks after `import vmoe_momentum` all the same, before and after its own import (registering.py).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .registering import register_with_timm

if TYPE_CHECKING:
    from .models import PixelModel, UpcycledViT, create_model, from_flax, read_flax
    from .moe import ExpertChoiceRouter, GShardRouter, M6TRouter, SoftRouter, TopKRouter
    from .momentum import SAM, Adam, Complex, HeavyBall, Nesterov, Residual, Robust

__all__ = [
    "SAM",
    "Adam",
    "Complex",
    "ExpertChoiceRouter",
    "GShardRouter",
    "HeavyBall",
    "M6TRouter",
    "Nesterov",
    "PixelModel",
    "Residual",
    "Robust",
    "SoftRouter",
    "TopKRouter",
    "UpcycledViT",
    "create_model",
    "from_flax",
    "read_flax",
]

__version__ = "0.1.0"  # the only place: setup.cfg reads it here, tests hold CITATION.cff and CHANGELOG.md to it

_ROOMS = ("models", "moe", "momentum")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f".{name}", __name__)
    if name in __all__:
        rooms = [import_module(f".{room}", __name__) for room in _ROOMS]
        globals()[name] = next(getattr(room, name) for room in rooms if name in room.__all__)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})


register_with_timm()
