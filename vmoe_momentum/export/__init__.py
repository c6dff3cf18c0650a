"""Networks as files that other programs run: timm directories, exported programs, ONNX, plain tensors; and back.

B images, K classes, S the side of the square input in pixels. What is exported maps pixels to logits or probabilities,
normalisation inside; every export is compared with the network it comes from before it gets its name.
"""

from .exporting import export
from .formats import FORMATS, Request, Servable
from .serving import Served, open_served
from .weights import Chosen, choose

__all__ = ["FORMATS", "Chosen", "Request", "Servable", "Served", "choose", "export", "open_served"]
