"""The formats: how each is written, and how each is opened again.

To add one: a `Format` in a file of this folder, entered in FORMATS below.
"""

from . import hugging_face, onnx, program, state_dict
from .asked import Request
from .base import Format, Servable

FORMATS: dict[str, Format] = {
    "hf": hugging_face.FORMAT,
    "pt2": program.FORMAT,
    "onnx": onnx.FORMAT,
    "state-dict": state_dict.FORMAT,
}

__all__ = ["FORMATS", "Format", "Request", "Servable"]
