"""Watching routers and momentum through forward hooks that are removed again.

B images, N tokens, D width; E experts; a network is watched while it runs on evaluation batches.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..momentum import ThreadsCarry

Hook = Callable[[nn.Module, tuple[Any, ...], Any], None]


class BlockStats(NamedTuple):
    """Means over all tokens watched, of one MoE block."""

    load: list[float]  # E shares of what the experts received, summing to 1
    dropped: float  # share lost: of assignments to full experts, or (expert choice) of tokens that no expert took
    entropy: float  # of the gates, in nats; log(E) when undecided
    token_norm: float  # mean Euclidean norms: of the residual stream after the block
    update_norm: float  # of u
    momentum_norm: float | None  # of the first momentum buffer; None for rules without one


class RouterWatch:
    """Sums up what passes; `result()` reads it (one host sync for all)."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def add(self, block: str, name: str, value: Tensor) -> None:
        value = value.detach()
        known = self.sums[block]
        known[name] = known[name] + value if name in known else value

    def result(self) -> dict[str, BlockStats]:
        found = {}
        for block, sums in self.sums.items():
            values = {name: value.cpu().double() for name, value in sums.items()}
            tokens, steps = float(values["tokens"]), float(values["steps"])
            found[block] = BlockStats(
                load=(values["load"] / values["load"].sum().clamp_min(1e-12)).tolist(),
                dropped=float(values["dropped"]) / tokens,
                entropy=float(values["entropy"]) / tokens,
                token_norm=float(values["token_norm"]) / steps,
                update_norm=float(values["update_norm"]) / steps,
                momentum_norm=float(values["momentum_norm"]) / steps if "momentum_norm" in values else None,
            )
        return found


@contextmanager
def watch_routers(net: nn.Module) -> Iterator[RouterWatch]:
    """Everything `net` runs inside is counted, block by block (`block5`). Hooks are gone afterwards."""
    watch, handles = RouterWatch(), []
    for name, block in net.named_modules():
        if isinstance(block, ThreadsCarry):
            label = "block" + name.rpartition(".")[2]
            handles.append(block.mlp.get_submodule("router").register_forward_hook(_router_hook(watch, label)))
            updates: list[Tensor] = []  # of one step; a rule may evaluate u twice, and the last makes the step
            handles.append(block.ls2.register_forward_hook(_update_hook(updates)))
            handles.append(block.register_forward_hook(_block_hook(watch, label, updates)))
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_choices(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Block by block, which experts the tokens of the latest forward pass reached: [B, N, E] bool.

    Nothing of blocks where all reach all, as under soft routing.
    """
    chosen: dict[str, Tensor] = {}
    handles = []

    def hook_of(label: str) -> Hook:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            reached = output[0].assigned()
            if not bool(reached.all()):
                chosen[label] = reached.reshape(*inputs[0].shape[:2], -1)

        return hook

    for name, block in net.named_modules():
        if isinstance(block, ThreadsCarry):
            label = "block" + name.rpartition(".")[2]
            handles.append(block.mlp.get_submodule("router").register_forward_hook(hook_of(label)))
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()


def _router_hook(watch: RouterWatch, label: str) -> Hook:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        plan, _ = output
        gates = plan.gates.flatten(0, 1)  # [T, E]
        watch.add(label, "load", plan.load())
        watch.add(label, "dropped", plan.dropped() * gates.shape[0])
        watch.add(label, "tokens", torch.tensor(gates.shape[0]))
        watch.add(label, "entropy", torch.special.entr(gates).sum())

    return hook


def _update_hook(updates: list[Tensor]) -> Hook:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        updates.append(output)

    return hook


def _block_hook(watch: RouterWatch, label: str, updates: list[Tensor]) -> Hook:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, carry = output
        if module.step and carry.momentum:
            watch.add(label, "momentum_norm", carry.momentum[0].float().norm(dim=-1).sum())
        watch.add(label, "update_norm", updates[-1].float().norm(dim=-1).sum())
        updates.clear()
        watch.add(label, "token_norm", x.float().norm(dim=-1).sum())
        watch.add(label, "steps", torch.tensor(x.shape[0] * x.shape[1]))

    return hook
