"""Which packages a number was made with."""

from functools import cache
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "vmoe_momentum", "torch", "torchvision", "timm", "torchattacks", "pyautoattack", "numpy", "scipy", "scikit-learn",
    "opencv-python", "pillow", "robustbench",
)  # fmt: skip


@cache
def versions() -> dict[str, str]:
    """Of those installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
