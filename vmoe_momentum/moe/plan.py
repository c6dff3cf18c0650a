"""Where tokens go: capacity, slots, and the dispatch plan. Legend of axes: this folder's __init__.

A plan has `dispatch(x) -> rows, layout` and `combine(rows) -> x`: rows [R, D] lie expert by expert, those of expert e
being rows[layout.ends[e-1]:layout.ends[e]]. Dispatch is by index: nothing of shape [S, E, C] is ever made.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .paths import sum_by_product
from .routing import Layout


def capacity(
    num_tokens: int,
    num_experts: int,
    factor: float,
    rounding: Literal["ceil", "round"] = "ceil",
    multiple_of: int = 4,
    setting: str = "capacity_factor",
) -> int:
    """Slots of one expert in one group: (num_tokens * factor) / E, rounded, then up to the next multiple.

    num_tokens counts assignments, S*K for top-k routing. In double precision and in this order, as the reference has
    it (100 tokens, factor 1.1, 10 experts: 12, not 11); `round` is Python's, half to even. Source: google-research/vmoe
    vmoe/moe.py, compute_capacity. setting: the name to blame. Raises ValueError: less than one slot.
    """
    slots = num_tokens * factor / num_experts
    slots = math.ceil(slots) if rounding == "ceil" else round(slots)
    if slots < 1:
        raise ValueError(
            f"router.{setting}={factor} leaves no slot for {num_tokens} assignments to {num_experts} experts; "
            f"use at least {num_experts / num_tokens:.3g}"
        )
    return math.ceil(slots / multiple_of) * multiple_of


def buffer_index(expert: Tensor, num_experts: int, priority: Tensor | None = None) -> Tensor:
    """Each assignment's place in its expert's queue: [G, S, K] -> [G, S, K] int64. Those at or past C are dropped.

    expert: [G, S, K] chosen experts, best first. All first choices queue before all second choices; within a choice
    tokens queue in their order or, given `priority` [G, S], by decreasing priority, earlier tokens first on a tie
    (batch-priority routing, arXiv:2106.05974 section 4.1). Dropped assignments keep their place.
    """
    num_groups, group_size, top_k = expert.shape
    if priority is not None:
        order = priority.argsort(dim=1, descending=True, stable=True)
        order = order.unsqueeze(-1).expand_as(expert)
        sorted_places = buffer_index(expert.gather(1, order), num_experts)
        return torch.empty_like(expert).scatter(1, order, sorted_places)
    queue = expert.transpose(1, 2).reshape(num_groups, top_k * group_size)
    by_expert, order = queue.sort(dim=1, stable=True)
    experts = torch.arange(num_experts, device=expert.device).expand(num_groups, -1).contiguous()
    starts = torch.searchsorted(by_expert, experts)
    places = torch.arange(top_k * group_size, device=expert.device) - starts.gather(1, by_expert)
    places = torch.empty_like(queue).scatter(1, order, places)
    return places.reshape(num_groups, top_k, group_size).transpose(1, 2)


class TopKPlan(NamedTuple):
    """Every token goes to K experts, fewer where a full expert dropped it."""

    gates: Tensor  # [G, S, E] softmax the choice was made on
    expert: Tensor  # [G, S, K] chosen experts, best first
    weight: Tensor  # [G, S, K] combine weights, 0 where dropped
    kept: Tensor  # [G, S, K] bool
    token: Tensor  # [R] that lies in each row
    row: Tensor  # [T, K] of each choice, any where it was dropped
    layout: Layout
    may_drop: bool  # is any weight 0 because its assignment went nowhere?

    @classmethod
    def build(
        cls,
        gates: Tensor,
        expert: Tensor,
        weight: Tensor,
        slots: int | None,
        batch_priority: bool = False,
        wanted: Tensor | None = None,
        padded: bool = False,
    ) -> "TopKPlan":
        """Plan for `slots` per expert and group, or without dropping when None.

        wanted: [G, S, K] bool; assignments that are not go nowhere and take no slot. A token's choices are different
        experts. A dropped assignment has weight 0.

        With slots, R = G * min(S*K, E*slots): never more rows than the padded buffers of the reference, and a shape
        that does not depend on the data (no host sync). Rows left over by experts with free slots hold dropped
        assignments and count for nothing. Padded, R = G*E*slots, as many rows for every expert, as in the reference;
        a free slot holds any token.
        """
        num_groups, group_size, num_experts = gates.shape
        top_k = expert.shape[2]
        rows_per_group = group_size * top_k
        # E stands for nowhere: a queue of its own, and last in the order of rows
        queue = expert if wanted is None else torch.where(wanted, expert, num_experts)
        kept = torch.ones_like(expert, dtype=torch.bool) if wanted is None else wanted
        if slots is not None:
            # the largest gate, that of the first choice, also for later choices (not the sum, not the rank's own)
            priority = gates.gather(-1, expert[..., :1]).squeeze(-1) if batch_priority else None
            kept = kept & (buffer_index(queue, num_experts + 1, priority) < slots)
            rows_per_group = min(rows_per_group, num_experts * slots)
        key = expert
        if slots is not None or wanted is not None:
            key, weight = torch.where(kept, expert, num_experts), torch.where(kept, weight, 0.0)
        by_expert, order = key.reshape(-1).sort(stable=True)
        may_drop = slots is not None or wanted is not None
        experts = torch.arange(num_experts, device=gates.device)
        ends = torch.searchsorted(by_expert, experts, right=True)
        row = torch.arange(order.shape[0], device=gates.device)  # of each assignment in its order
        if padded and slots is not None:
            most = num_groups * slots
            starts = torch.nn.functional.pad(ends, (1, 0))  # with those that went nowhere
            row = row + (torch.arange(num_experts + 1, device=gates.device) * most - starts)[by_expert]
            source = starts[:-1, None] + torch.arange(most, device=gates.device)
            order_of_rows = order[source.clamp_max_(order.shape[0] - 1).flatten()]
            ends = (experts + 1) * most
        else:
            rows = num_groups * rows_per_group
            order_of_rows = order[:rows]
            if may_drop:  # left-over rows lie with the last expert
                ends = torch.where(experts == num_experts - 1, rows, ends)
        # Gathering back by the inverse permutation sums in a fixed order; scattering would not, on a GPU.
        row = torch.empty_like(order).scatter_(0, order, row).reshape(-1, top_k)
        layout = Layout(ends.int(), equal=padded and slots is not None)
        return cls(gates, expert, weight, kept, order_of_rows // top_k, row, layout, may_drop)

    def dispatch(self, x: Tensor) -> tuple[Tensor, Layout]:
        """x: [T, D] -> rows [R, D], where each expert's end."""
        return x.index_select(0, self.token), self.layout

    def combine(self, rows: Tensor) -> Tensor:
        """rows: [R, D], the experts' outputs -> [T, D], weighted sums over the kept choices; 0 where there is none."""
        row, top_k, width = self.row, self.row.shape[1], rows.shape[-1]
        if self.may_drop:
            row, lost = self._own_rows()
        chosen = rows.index_select(0, row.reshape(-1))
        if sum_by_product(top_k, width, rows.device):
            weight = self.weight.reshape(-1, 1, top_k).to(rows.dtype)
            tokens = (weight @ chosen.reshape(-1, top_k, width)).squeeze(1)
        else:
            weighted = chosen * self.weight.reshape(-1, 1).to(rows.dtype)
            tokens = weighted if top_k == 1 else weighted.reshape(-1, top_k, width).sum(dim=1)
        return tokens.masked_fill_(lost, 0.0) if self.may_drop else tokens

    def _own_rows(self) -> tuple[Tensor, Tensor]:
        """[T, K] row of each choice, with a kept row of the same token in place of those of dropped ones, and [T, 1]
        whether none was kept.

        A dropped choice has weight 0, but 0 times another token's NaN is NaN: no token may read another one's row.
        """
        kept = self.kept.reshape(self.row.shape)
        some = torch.where(kept, self.row, -1).amax(dim=-1, keepdim=True)
        return torch.where(kept, self.row, some.clamp_min(0)), some < 0

    def assigned(self) -> Tensor:
        """[G, S, E] bool: does this token reach this expert?"""
        reached = torch.zeros_like(self.gates, dtype=torch.bool)
        return reached.scatter(-1, self.expert, self.kept)

    def load(self) -> Tensor:
        """[E] assignments kept."""
        return self.assigned().sum(dim=(0, 1))

    def dropped(self) -> Tensor:
        """[] share of assignments dropped; 0 of none."""
        return 1.0 - self.kept.float().mean() if self.kept.numel() else self.gates.new_zeros(())
