"""The experts' MLPs, weights stacked [E, ...]. Legend of axes: this folder's __init__.

Stacked, every rank touches every expert: no unused-parameter error under DDP, no hang under FSDP, and one checkpoint
layout however the experts are spread.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .routing import autocast_dtype


class StackedLinear(nn.Module):
    """E linear layers of which each row goes through one. weight: [E, out, in] as in nn.Linear; bias: [E, out]."""

    def __init__(self, num_experts: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features))
        self.reset_parameters()

    def reset_parameters(self, share: bool = False) -> None:
        """Xavier uniform for each expert, biases N(0, 1e-6) (V-MoE); `share` starts all experts equal."""
        for weight in self.weight:
            nn.init.xavier_uniform_(weight)
        nn.init.normal_(self.bias, std=1e-6)
        if share:
            with torch.no_grad():
                self.weight.copy_(self.weight[:1].clone().expand_as(self.weight))
                self.bias.copy_(self.bias[:1].clone().expand_as(self.bias))

    def forward(self, rows: Tensor, ends: Tensor, member: Tensor) -> Tensor:
        """rows: [R, in], sorted by expert; ends: [E]; member: [R, E] one-hot of each row's expert -> [R, out]."""
        weight, bias = self.weight.to(rows.dtype), self.bias.to(rows.dtype)
        # The bias as a product: its gradient is one small matrix product, where gathering would scatter-add rows.
        return grouped_mm(rows, weight.transpose(1, 2), ends, member).addmm_(member, bias)


def grouped_mm(rows: Tensor, weight: Tensor, ends: Tensor, member: Tensor) -> Tensor:
    """Each row times its own expert's matrix. rows: [R, in]; weight: [E, in, out]; -> [R, out].

    torch's grouped product wants a CPU or CUDA device, 16-byte aligned rows and no float64; anything else goes through
    a loop over the experts, all rows each, which costs E times as much: for tests and odd widths, not for training.
    """
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    known = rows.device.type in ("cpu", "cuda", "meta") and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if aligned and known:
        return F.grouped_mm(rows, weight, offs=ends)
    return sum((rows * member[:, e : e + 1]) @ weight[e] for e in range(weight.shape[0]))


class Experts(nn.Module):
    """fc2(act(fc1(x))) per expert, dropout after each as in V-MoE's MlpBlock.

    Under autocast the rows and weights are cast to its dtype (torch's grouped product is not on autocast's list).
    """

    def __init__(self, num_experts: int, width: int, hidden: int, act_layer: type[nn.Module], drop: float) -> None:
        super().__init__()
        self.fc1 = StackedLinear(num_experts, width, hidden)
        self.act = act_layer()
        self.fc2 = StackedLinear(num_experts, hidden, width)
        self.drop = nn.Dropout(drop)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows: [R, D], sorted by expert; ends: [E] int32 -> [R, D]."""
        rows = rows.to(autocast_dtype(rows.device) or rows.dtype)
        row = torch.arange(rows.shape[0], device=rows.device).unsqueeze(1)
        starts = F.pad(ends[:-1], (1, 0))
        member = ((row >= starts) & (row < ends)).to(rows.dtype)
        rows = self.drop(self.act(self.fc1(rows, ends, member)))
        return self.drop(self.fc2(rows, ends, member))
