"""Which of several ways to the same result is taken, by shape, device and type: every such choice of this folder.

The results differ by rounding only. Measured by `python benchmarks/moe_layer.py`; figures: benchmarks/results.
Legend of axes: this folder's __init__.
"""

from typing import Literal

import torch
from torch import Tensor

from .routing import autocast_dtype

Fill = Literal["packed", "slots", "fullest"]


def fill(x: Tensor, even: bool = False) -> Fill:
    """How many rows has each expert? x: what is routed.

    even: slots wherever capacity is finite: experts are on other ranks, which then know how many rows are to come.

    - packed: as many as it was assigned, one expert's after another's; torch's grouped product takes them.
    - slots: where capacity is finite, all its slots, full or not; a batched product of a shape that the host knows. On
      CUDA torch's grouped product does without the host only in bfloat16 on compute capability 9 and 10; elsewhere it
      copies the ends to the host, waits, and loops over the experts.
    - fullest: as many as the fullest expert has (`wasteful`: packed after all). On a CPU the host knows the numbers,
      and a batched product gives each thread whole experts: 0.7 of the grouped product's time at the digits' shape and
      at E 64, D 384, as much at E 8. Not where a graph is made, whose shapes are fixed.
    """
    if even:
        return "slots"
    if x.device.type == "cpu":
        return "packed" if torch.compiler.is_compiling() else "fullest"
    by_device = grouped_on_device(autocast_dtype(x.device) or x.dtype, x.device)
    return "slots" if x.device.type == "cuda" and not by_device else "packed"


def wasteful(rows: int, assignments: int) -> bool:
    """Do free rows cost more than the batched product saves?"""
    return 4 * rows > 5 * assignments


def grouped_on_device(dtype: torch.dtype, device: torch.device) -> bool:
    """Does torch's grouped product read the ends where they are? On a CPU there is nowhere else."""
    if device.type != "cuda":
        return True
    return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device)[0] in (9, 10)


def weight_first(weight: Tensor) -> bool:
    """Is a batched product [E, out, in] x [E, in, R], or [E, R, in] x [E, in, out] of the transposed weight?

    The gradient of a transposed weight is copied into the weight's own layout. On a CPU that is a tenth of a step of
    soft and expert choice at D 384, E 8, and half of it at E 64; at the digits' size it is nothing, and this is 3 %
    slower. Without gradients it is up to a tenth slower, for the rows are turned back at the end.
    """
    wanted = torch.is_grad_enabled() and weight.requires_grad
    return wanted and weight.device.type == "cpu" and weight.numel() >= 2**20


def bias_by_product(num_experts: int, device: torch.device) -> bool:
    """Is each row's bias a product with the one-hot expert, or looked up? The product's gradient is a product, too.

    Looked up on a CPU where experts are many: the product takes E / D of the experts' own time, 10 % of a layer at
    E 64, D 384. Never on CUDA, where the gradient of a look-up sorts its indices.
    """
    return num_experts <= 16 or device.type != "cpu"


def sum_by_product(top_k: int, width: int, device: torch.device) -> bool:
    """Are a token's K rows summed by a batched product [1, K] x [K, D], or multiplied and added?

    The product never makes the weighted rows; its cost a token is the larger where the rows are short.
    """
    return device.type != "cpu" or top_k * width > 256
