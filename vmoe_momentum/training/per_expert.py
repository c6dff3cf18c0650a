"""Optimizers that look at a tensor's shape, shown each expert's tensors rather than stacks of experts.

E experts. Their weights are stacked [E, out, in] and their biases [E, out]; an optimizer that takes a norm, a mean, a
product of matrices or a factor of a tensor would take one for all experts, and a stack of biases for a matrix.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..moe import SoftRouter
from ..moe.experts import StackedLinear

View = Callable[[Tensor], Iterable[Tensor]]

# They move each weight by its own gradients alone, so that stacks change nothing (tested against separate experts).
ELEMENTWISE = frozenset({
    "adabelief", "adadelta", "adagrad", "adam", "adamax", "adamc", "adamw", "adamwlegacy", "adan", "adanw", "adopt",
    "adoptc", "adoptw", "laprop", "lapropc", "lion", "lionc", "madgrad", "madgradw", "momentum", "nadam", "nadamc",
    "nadamlegacy", "nadamw", "nesterov", "nesterovw", "radabelief", "radam", "radamlegacy", "radamw", "rmsprop",
    "rmsproptf", "rmsproptfc", "rmsproptfw", "sgd", "sgdc", "sgdw",
})  # fmt: skip


def views_of(net: nn.Module) -> dict[Tensor, View]:
    """How each stacked parameter falls into the tensors that separate layers would have.

    Raises ValueError: a device holds pieces of them only.
    """
    found: dict[Tensor, View] = {}
    whole = True
    for module in net.modules():
        if isinstance(module, StackedLinear):
            found |= {module.weight: torch.unbind, module.bias: torch.unbind}
            whole &= module.weight.ndim == 3 and not isinstance(module.weight, DTensor)
        elif isinstance(module, SoftRouter):
            found[module.mu] = _slots_as_rows  # one matrix, as a router's weight is
    if not whole:
        raise ValueError("it acts on each expert as a whole, and trainer.strategy cuts experts up")
    return found


def _slots_as_rows(mu: Tensor) -> list[Tensor]:
    """[E, P, D] -> [E*P, D]."""
    return [mu.flatten(0, 1)]


class PerExpert(torch.optim.Optimizer):
    """An optimizer over views of the parameters; schedulers, clipping and scalers see the parameters themselves.

    Its state and its state dict are the inner optimizer's: a stack counts as many parameters as it has experts.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        build: Callable[[list[dict[str, Any]]], torch.optim.Optimizer],
        views: dict[Tensor, View],
    ) -> None:
        self._views = {p: views.get(p, _itself) for group in groups for p in group["params"]}
        self._parts = {p: list(view(p.detach())) for p, view in self._views.items()}
        inner = [{**g, "params": [part for p in g["params"] for part in self._parts[p]]} for g in groups]
        self.inner = build(inner)
        super().__init__(groups, {})
        self.state = self.inner.state
        self._take_settings()  # with the defaults of its constructor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for parameter, view in self._views.items():
            grads = None if parameter.grad is None else list(view(parameter.grad))
            for number, (part, now) in enumerate(zip(self._parts[parameter], view(parameter.detach()), strict=True)):
                part.data = now  # where the weights lie may change: a network is moved between devices
                part.grad = None if grads is None else grads[number]
        self._give_settings()
        self.inner.step()
        for parts in self._parts.values():
            for part in parts:
                part.grad = None  # the parameter's own memory, to be freed with it
        self._take_settings()
        return loss

    def state_dict(self) -> dict[str, Any]:
        self._give_settings()
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        self.state = self.inner.state
        self._take_settings()

    def _give_settings(self) -> None:
        """As schedulers left them."""
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs.update({name: value for name, value in ours.items() if name != "params"})

    def _take_settings(self) -> None:
        """Groups also hold what an optimizer counts, such as its steps."""
        for ours, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            ours.update({name: value for name, value in theirs.items() if name != "params"})


def _itself(parameter: Tensor) -> list[Tensor]:
    return [parameter]
