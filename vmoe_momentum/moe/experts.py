"""The experts' MLPs, weights stacked [E, ...]. Legend of axes: this folder's __init__.

Stacked, every rank touches every expert: no unused-parameter error under DDP, no hang under FSDP, and one checkpoint
layout however the experts are spread.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .exchange import exchanged, local_part
from .paths import bias_by_product, grouped_on_device, weight_first
from .routing import autocast_dtype


class StackedLinear(nn.Module):
    """E linear layers of which each row goes through one. weight: [E, out, in] as in nn.Linear; bias: [E, out]."""

    gradient_factor: float = 1.0  # where the experts are spread over ranks, see exchange.spread

    def __init__(self, num_experts: int, in_features: int, out_features: int, draw: bool = True) -> None:
        """draw: False leaves the memory as it is, for weights that come from elsewhere."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features))
        if draw:
            self.reset_parameters()

    def reset_parameters(self, share: bool = False) -> None:
        """Xavier uniform for each expert, biases N(0, 1e-6) (V-MoE); `share` starts all experts equal."""
        drawn = 1 if share else self.weight.shape[0]
        for weight in self.weight[:drawn]:
            nn.init.xavier_uniform_(weight)
        nn.init.normal_(self.bias[:drawn], std=1e-6)
        with torch.no_grad():
            self.weight[drawn:] = self.weight[:1]
            self.bias[drawn:] = self.bias[:1]

    def forward(self, rows: Tensor, groups: "Groups | None") -> Tensor:
        """rows: [R, in], sorted by expert, or [E, R/E, in] -> [R, out] or [E, R/E, out]."""
        weight, bias = (local_part(p, self.gradient_factor).to(rows.dtype) for p in (self.weight, self.bias))
        if rows.dim() == 3 and weight_first(weight):
            return torch.baddbmm(bias.unsqueeze(2), weight, rows.transpose(1, 2)).transpose(1, 2)
        weight = weight.transpose(1, 2)
        if rows.dim() == 3:
            return torch.baddbmm(bias.unsqueeze(1), rows, weight)
        assert groups is not None  # of rows that lie flat
        outputs = grouped_mm(rows, weight, groups)
        if groups.member is None:
            return outputs.add_(F.embedding(groups.expert, bias))
        # The bias as a product: its gradient is one small matrix product, where gathering would scatter-add rows.
        return outputs.addmm_(groups.member, bias)


class Groups(NamedTuple):
    """Whose row is whose, in the forms that the products want."""

    ends: Tensor  # [E] int32, rows up to and with each expert
    expert: Tensor  # [R] int64
    member: Tensor | None  # [R, E] one-hot, in the rows' type; None where biases are looked up

    @classmethod
    def of(cls, rows: Tensor, ends: Tensor) -> "Groups":
        num_experts = ends.shape[0]
        row = torch.arange(rows.shape[0], device=rows.device, dtype=torch.int32)
        expert = torch.searchsorted(ends, row, right=True)
        if not bias_by_product(num_experts, rows.device):
            return cls(ends, expert, None)
        experts = torch.arange(num_experts, device=rows.device)
        return cls(ends, expert, (expert.unsqueeze(1) == experts).to(rows.dtype))


@torch.compiler.disable(reason="a loop on the host, which torch 2.11 cannot trace")
def _grouped_mm_by_host(rows: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight, offs=offs)


def grouped_mm(rows: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Each row times its own expert's matrix. rows: [R, in]; weight: [E, in, out]; -> [R, out].

    torch's grouped product wants a CPU or CUDA device, 16-byte aligned rows and no float64; anything else goes through
    a loop over the experts, all rows each, which costs E times as much: for tests and odd widths, not for training.
    """
    if rows.device.type == "meta":  # one expert's product has the shape and the cost; torch 2.11 wants bfloat16 here
        return rows @ weight[0]
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    known = rows.device.type in ("cpu", "cuda") and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if aligned and known:
        by_device = grouped_on_device(rows.dtype, rows.device)
        return (F.grouped_mm if by_device else _grouped_mm_by_host)(rows, weight, offs=groups.ends)
    own = [(groups.expert == e).unsqueeze(1).to(rows.dtype) for e in range(weight.shape[0])]
    return reduce(torch.add, ((rows * mine) @ weight[e] for e, mine in enumerate(own)))


class Experts(nn.Module):
    """fc2(act(fc1(x))) per expert, dropout after each as in V-MoE's MlpBlock, or after the first only.

    Under autocast the rows and weights are cast to its dtype (torch's grouped product is not on autocast's list).
    Weights that are spread over ranks bring their mesh along: then rows are exchanged.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        act_layer: Callable[[], nn.Module],
        drop: float,
        draw: bool = True,
        drop_outputs: bool = True,
    ) -> None:
        super().__init__()
        self.fc1 = StackedLinear(num_experts, width, hidden, draw)
        self.act = act_layer()
        self.fc2 = StackedLinear(num_experts, hidden, width, draw)
        self.drop, self.drop_outputs = nn.Dropout(drop), drop_outputs

    def forward(self, rows: Tensor, ends: Tensor | None, even: bool = False) -> Tensor:
        """rows: [R, D], sorted by expert, and their ends, as Plan.dispatch gives them -> [R, D].

        even: all ranks have as many rows, for every expert as many, and all know it (for experts spread over ranks).
        """
        rows = rows.to(autocast_dtype(rows.device) or rows.dtype)
        mesh = getattr(self.fc1.weight, "device_mesh", None)
        if mesh is None:
            return self._compute(rows, ends)
        return exchanged(self._compute, rows, ends, self.fc1.weight.shape[0], mesh.get_group(), even)

    def _compute(self, rows: Tensor, ends: Tensor | None) -> Tensor:
        shape, num_experts = rows.shape, local_part(self.fc1.weight).shape[0]
        if ends is None:
            rows = rows.reshape(num_experts, shape[0] // num_experts, shape[1])
        groups = None if ends is None else Groups.of(rows, ends)
        rows = self.drop(self.act(self.fc1(rows, groups)))
        outputs = self.fc2(rows, groups)
        return (self.drop(outputs) if self.drop_outputs else outputs).reshape(shape)
