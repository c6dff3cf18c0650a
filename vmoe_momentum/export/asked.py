"""What can be asked for: what the command line has to know before torch is imported."""

from typing import Literal, NamedTuple

Weights = Literal["auto", "averaged", "raw"]
Pick = Literal["best", "last"]


class Request(NamedTuple):
    """What an exported network takes and gives."""

    input: Literal["float32", "uint8"] = "float32"  # pixels in [0, 1], or 0 to 255
    output: Literal["logits", "probabilities"] = "logits"
    precision: Literal["fp32", "fp16", "int8"] = "fp32"  # of the weights; ONNX only
