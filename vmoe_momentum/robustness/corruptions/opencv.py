"""OpenCV where a corruption was defined by it; an extra, so it is imported when first used."""

from functools import cache
from types import ModuleType


@cache
def cv2() -> ModuleType:
    """Raises ValueError: not installed, or broken."""
    try:
        import cv2 as module
    except ImportError as error:
        raise ValueError(
            f"regenerated corruptions need OpenCV, which is missing or broken here ({error}); "
            "pip install 'vmoe_momentum[corruptions]', or evaluate on the published images"
        ) from error
    module.setNumThreads(0)  # the loaders' processes share the cores already
    return module
