"""Experts that lie on several ranks: rows go to where their expert is, and their outputs come back.

Each of P ranks holds E / P neighbouring experts, stacked weights being DTensors sharded over their first axis, and
routes the tokens of its own images. What a rank sends lies expert by expert, so rank by rank, too; what it receives
lies (rank, expert, row) and is computed (expert, rank, row). All ranks enter each exchange, also with no rows at all.
Legend of axes: this folder's __init__.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh  # not there where torch was built without distributed

Compute = Callable[[Tensor, Tensor | None], Tensor]  # rows [R, D] and their ends, as Plan.dispatch gives them -> [R, D]


@torch.compiler.disable  # of what is compiled around it: experts on other ranks are no part of one rank's graph
def exchanged(
    compute: Compute, rows: Tensor, ends: Tensor | None, num_experts: int, group: dist.ProcessGroup, even: bool
) -> Tensor:
    """What `compute` of each row's own rank makes of it. rows, ends: as Plan.dispatch gives them -> [R, D].

    even: all ranks have so many rows for every expert (ends is None), and each knows that of the others; else ranks
    tell each other their numbers first, for which the host waits.
    """
    trip: Trip = EvenTrip.of(num_experts, group) if even else CountedTrip.of(rows, ends, num_experts, group)
    return trip.back(compute(trip.there(rows), trip.ends))


class Trip(Protocol):
    """One exchange: the way there and back, and where each own expert's rows end there."""

    @property
    def ends(self) -> Tensor | None:
        """[E/P]"""

    def there(self, rows: Tensor) -> Tensor:
        """[R, D] by expert -> the rows of all ranks for the own experts, by expert."""

    def back(self, rows: Tensor) -> Tensor:
        """Their outputs -> those of the own rows [R, D]."""


class EvenTrip(NamedTuple):
    """As many rows from every rank for every expert: shapes say all, and nobody waits for numbers."""

    group: dist.ProcessGroup
    ranks: int
    own: int  # E/P
    ends: None = None

    @classmethod
    def of(cls, num_experts: int, group: dist.ProcessGroup) -> "EvenTrip":
        return cls(group, group.size(), num_experts // group.size())

    def there(self, rows: Tensor) -> Tensor:
        rows = _all_to_all(rows, None, None, self.group)
        return rows.reshape(self.ranks, self.own, -1, rows.shape[-1]).transpose(0, 1).reshape(rows.shape)

    def back(self, rows: Tensor) -> Tensor:
        by_rank = rows.reshape(self.own, self.ranks, -1, rows.shape[-1]).transpose(0, 1)
        return _all_to_all(by_rank.reshape(rows.shape), None, None, self.group)


class CountedTrip(NamedTuple):
    """Any number of rows from any rank for any expert."""

    group: dist.ProcessGroup
    sent: list[int]  # rows to each rank
    received: list[int]  # and from each
    order: Tensor  # [R'] which received row is computed where
    ends: Tensor

    @classmethod
    def of(cls, rows: Tensor, ends: Tensor | None, num_experts: int, group: dist.ProcessGroup) -> "CountedTrip":
        ranks = group.size()
        if ends is None:
            counts = rows.new_full((num_experts,), rows.shape[0] // num_experts, dtype=torch.int64)
        else:
            counts = ends.diff(prepend=ends.new_zeros(1)).to(torch.int64)
        arrived = _all_to_all(counts, None, None, group).reshape(ranks, -1)  # [P, E/P]
        sent, received = torch.stack([counts.reshape(ranks, -1).sum(dim=1), arrived.sum(dim=1)]).tolist()
        own = torch.arange(arrived.shape[1], device=rows.device).repeat(ranks)
        expert = own.repeat_interleave(arrived.reshape(-1), output_size=sum(received))
        order = expert.argsort(stable=True)
        return cls(group, sent, received, order, arrived.sum(dim=0).cumsum(dim=0, dtype=torch.int32))

    def there(self, rows: Tensor) -> Tensor:
        return _all_to_all(rows, self.received, self.sent, self.group).index_select(0, self.order)

    def back(self, rows: Tensor) -> Tensor:
        places = torch.arange(self.order.shape[0], device=self.order.device)
        place = torch.empty_like(self.order).scatter_(0, self.order, places)
        return _all_to_all(rows.index_select(0, place), self.sent, self.received, self.group)


def _all_to_all(rows: Tensor, received: list[int] | None, sent: list[int] | None, group: dist.ProcessGroup) -> Tensor:
    """With a gradient, which goes the other way. None: as many to and from each rank."""
    # Imported here: it takes as long as the whole of --help, and most programs have one rank.
    from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor

    return wait_tensor(all_to_all_single_autograd(rows.contiguous(), received, sent, group))


def local_part(weight: Tensor, gradient_factor: float = 1.0) -> Tensor:
    """Of a sharded weight what this rank holds, with its gradient, times a factor; a plain one is whole."""
    to_local = getattr(weight, "to_local", None)
    if to_local is None:
        return weight
    local: Tensor = to_local()
    return local if gradient_factor == 1 else _ScaledGradient.apply(local, gradient_factor)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def spread(experts: nn.Module, mesh: "DeviceMesh", gradient_factor: float = 1.0) -> None:
    """In place: each rank of a mesh of one axis keeps its own E / P of the stacked experts.

    gradient_factor: on what a backward pass adds to their gradients, which the rows of all P ranks add to: 1 / P where
    the mean of the ranks' losses is minimised, rather than their sum. Raises ValueError: P does not divide E.
    """
    from torch.distributed.tensor import Shard, distribute_tensor

    for layer in experts.modules():
        for name, weight in list(layer.named_parameters(recurse=False)):
            layer.gradient_factor = gradient_factor  # type: ignore[assignment]  # a StackedLinear's
            check_divides(weight.shape[0], mesh.size())
            shard = distribute_tensor(weight.detach(), mesh, [Shard(0)], src_data_rank=None)
            setattr(layer, name, nn.Parameter(shard, requires_grad=weight.requires_grad))


def check_divides(num_experts: int, ranks: int, setting: str = "expert_parallel") -> None:
    """Raises ValueError: experts cannot be spread evenly. setting: the name to blame."""
    if num_experts % ranks:
        fitting = [n for n in range(2, num_experts + 1) if num_experts % n == 0]
        raise ValueError(
            f"{setting}={ranks}: it does not divide a layer's num_experts={num_experts}; use "
            + (f"one of {', '.join(map(str, fitting))}" if fitting else "1, or more experts")
        )
