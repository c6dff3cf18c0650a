"""Networks as files that other programs run: timm directories, exported programs, ONNX, plain tensors; and back.

B images, K classes, S the side of the square input in pixels. What is exported maps pixels to logits or probabilities,
normalisation inside; every export is compared with the network it comes from before it gets its name.
"""

from typing import TYPE_CHECKING

from ..lazily import lazily

if TYPE_CHECKING:
    from .exporting import export
    from .formats import FORMATS, Request, Servable
    from .serving import Served, open_served
    from .weights import Chosen, choose

__all__ = ["FORMATS", "Chosen", "Request", "Servable", "Served", "choose", "export", "open_served"]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "exporting": ("export",),
        "formats": ("FORMATS", "Request", "Servable"),
        "serving": ("Served", "open_served"),
        "weights": ("Chosen", "choose"),
    },
)
