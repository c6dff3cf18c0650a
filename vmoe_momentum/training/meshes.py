"""Weights that lie on several meshes of ranks, as experts and the others do: torch's operations on lists take one."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def by_mesh(weights: Iterable[Tensor]) -> list[list[Tensor]]:
    """Those of each mesh, in their order; plain ones lie on none."""
    found: dict[Any, list[Tensor]] = {}
    for weight in weights:
        found.setdefault(getattr(weight, "device_mesh", None), []).append(weight)
    return list(found.values())


def weights_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


class ByMesh(torch.optim.Optimizer):
    """An optimizer that takes the weights of one mesh at a time, within its groups.

    For schedulers, clipping and checkpoints there are the groups alone, as on any number of ranks.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.state = inner, inner.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.inner.param_groups
        parts = [[{**group, "params": weights} for weights in by_mesh(group["params"])] for group in groups]
        self.inner.param_groups = [part for own in parts for part in own]
        try:
            self.inner.step()
        finally:
            self.inner.param_groups = groups
        for group, own in zip(groups, parts, strict=True):  # groups also hold what some optimizers count
            group.update({name: value for name, value in own[0].items() if name != "params"})
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self.param_groups, self.state = self.inner.param_groups, self.inner.state


def clip_gradients(weights: list[Tensor], value: float, algorithm: str | None) -> None:
    """torch's, with the norm over all meshes. algorithm: "value", else by norm."""
    parts = by_mesh(weight for weight in weights if weight.grad is not None)
    if algorithm == "value":
        for part in parts:
            nn.utils.clip_grad_value_(part, value)
        return
    norms = [nn.utils.get_total_norm([w.grad for w in part if w.grad is not None]) for part in parts]
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    total = torch.linalg.vector_norm(torch.stack(whole))
    for part in parts:
        nn.utils.clip_grads_with_norm_(part, value, total)
