"""Where tokens go: capacity, slots, and the dispatch plan. Legend of axes: this folder's __init__.

A plan has `dispatch(x) -> rows, ends` and `combine(rows) -> x`: rows [R, D] lie expert by expert, those of expert e
being rows[ends[e-1]:ends[e]]. Dispatch is by index: nothing of shape [S, E, C] is ever made.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .paths import Fill, sum_by_product, wasteful


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
    queue = expert.transpose(1, 2).reshape(num_groups, 1, top_k * group_size)
    ahead = _is_of_expert(queue, num_experts).cumsum(dim=-1)  # and itself
    places = ahead.gather(1, queue).squeeze(1) - 1
    return places.reshape(num_groups, top_k, group_size).transpose(1, 2)


def _is_of_expert(expert: Tensor, num_experts: int) -> Tensor:
    """[..., 1, A] the experts of assignments -> [..., E, A] bool."""
    return expert == torch.arange(num_experts, device=expert.device).unsqueeze(-1)


class Rows(NamedTuple):
    """Which token lies where. expert, below: [T, K], each token's; E of assignments that go nowhere."""

    token: Tensor  # [R] that lies in each row
    row: Tensor  # [T, K] of each assignment, any where it went nowhere
    ends: Tensor | None  # [E] int32 of each expert's rows; None where all have R / E

    @classmethod
    def packed(cls, expert: Tensor, num_experts: int, rows: int) -> "Rows":
        """Only what is assigned, but for the last expert's: to its rows are added what went nowhere, up to R = rows."""
        top_k = expert.shape[1]
        by_expert, order = expert.reshape(-1).sort(stable=True)
        experts = torch.arange(num_experts - 1, device=expert.device)
        ends = torch.searchsorted(by_expert, experts, right=True, out_int32=True)
        ends = torch.cat([ends, ends.new_full((1,), rows)])
        # Gathering back by the inverse permutation sums in a fixed order; scattering would not, on a GPU.
        row = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=expert.device))
        return cls(order[:rows] // top_k, row.reshape(-1, top_k), ends)

    @classmethod
    def padded(cls, expert: Tensor, num_experts: int, most: int | None, worth: int) -> "Rows | None":
        """`most` rows for every expert, None for as many as the fullest has. A free row holds token 0.

        None where these would be wasteful beside `worth` rows.
        """
        num_tokens, top_k = expert.shape
        queue = expert.reshape(1, -1)
        if most is None:
            most = max(1, *queue[0].bincount(minlength=num_experts + 1)[:-1].tolist())
            if wasteful(num_experts * most, worth):
                return None
        ahead = _is_of_expert(queue, num_experts + 1).cumsum(dim=-1)  # and itself
        free = num_experts * most  # the row of those that went nowhere
        row = torch.add(ahead.gather(0, queue), queue, alpha=most).squeeze(0).sub_(1).clamp_max_(free)
        own = torch.arange(num_tokens * top_k, device=expert.device) // top_k
        token = own.new_zeros(free + 1).scatter_(0, row, own)[:free]
        return cls(token, row.reshape(-1, top_k), None)


class TopKPlan(NamedTuple):
    """Every token goes to K experts, fewer where a full expert dropped it."""

    gates: Tensor  # [G, S, E] softmax the choice was made on
    expert: Tensor  # [G, S, K] chosen experts, best first
    weight: Tensor  # [G, S, K] combine weights, 0 where dropped
    kept: Tensor  # [G, S, K] bool
    rows: Rows
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
        fill: Fill = "packed",
    ) -> "TopKPlan":
        """Plan for `slots` per expert and group, or without dropping when None.

        wanted: [G, S, K] bool; assignments that are not go nowhere and take no slot. A token's choices are different
        experts. A dropped assignment has weight 0.

        Packed with slots, R = G * min(S*K, E*slots): never more rows than the padded buffers of the reference, and a
        shape that does not depend on the data (no host sync). Filled to the slots, R = G*E*slots, as in the reference.
        """
        num_groups, group_size, num_experts = gates.shape
        top_k = expert.shape[2]
        # E stands for nowhere: a queue of its own, and last in the order of rows
        queue = expert if wanted is None else torch.where(wanted, expert, num_experts)
        kept = torch.ones_like(expert, dtype=torch.bool) if wanted is None else wanted
        num_rows = group_size * top_k
        if slots is not None:
            # the largest gate, that of the first choice, also for later choices (not the sum, not the rank's own)
            priority = gates.gather(-1, expert[..., :1]).squeeze(-1) if batch_priority else None
            kept = kept & (buffer_index(queue, num_experts + 1, priority) < slots)
            num_rows = min(num_rows, num_experts * slots)
        may_drop = slots is not None or wanted is not None
        if may_drop:
            queue, weight = torch.where(kept, expert, num_experts), torch.where(kept, weight, 0.0)
        queue, num_rows = queue.reshape(-1, top_k), num_groups * num_rows
        rows = None
        if fill == "slots" and slots is not None:
            rows = Rows.padded(queue, num_experts, num_groups * slots, num_rows)
        elif fill == "fullest" and queue.numel():
            rows = Rows.padded(queue, num_experts, None, num_rows)
        rows = rows or Rows.packed(queue, num_experts, num_rows)
        return cls(gates, expert, weight, kept, rows, may_drop)

    def dispatch(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x: [T, D] -> rows [R, D] and their ends, see Rows."""
        return x.index_select(0, self.rows.token), self.rows.ends

    def combine(self, rows: Tensor) -> Tensor:
        """rows: [R, D], the experts' outputs -> [T, D], weighted sums over the kept choices; 0 where there is none."""
        row, top_k, width = self.rows.row, self.rows.row.shape[1], rows.shape[-1]
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
        kept = self.kept.reshape(self.rows.row.shape)
        some = torch.where(kept, self.rows.row, -1).amax(dim=-1, keepdim=True)
        return torch.where(kept, self.rows.row, some.clamp_min(0)), some < 0

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
