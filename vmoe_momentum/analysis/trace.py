"""What passes through the MoE blocks, read through forward hooks that are removed again.

B images, N tokens, D width, T = B*N, E experts.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..models.groups import images_together
from ..models.pixels import Wrapped
from ..moe import Plan, SparseMlp
from ..momentum import Carry, ThreadsCarry
from ..progress import track


class Visit(NamedTuple):
    """One batch at one MoE block."""

    block: int  # index among all blocks
    x: Tensor  # [B, N, D] residual stream after the sparse step
    point: Tensor  # [B, N, D] where u was evaluated (last, for rules that do it twice)
    shift: Tensor  # [B, N, D] what was added behind the norm there, for rules that look ahead so
    moved: Tensor  # [B, N, D] where the step led; x is that, or its norm where the block has one behind it
    update: Tensor  # [B, N, D] u(point)
    momentum: Tensor | None  # [B, N, D] first buffer after the step; None without momentum
    tokens: Tensor  # [B, N, D] what router and experts saw
    plan: Plan


def sparse_blocks(net: nn.Module) -> dict[int, ThreadsCarry]:
    """Index among all blocks -> block."""
    blocks = cast(Iterable[nn.Module], net.blocks)
    return {index: block for index, block in enumerate(blocks) if isinstance(block, ThreadsCarry)}


def sparse_mlp(block: ThreadsCarry) -> SparseMlp:
    """Its experts and their router."""
    assert isinstance(block.mlp, SparseMlp)  # ThreadsCarry asks for one, and its room does not know the class
    return block.mlp


@contextmanager
def record(net: nn.Module) -> Iterator[list[Visit]]:
    """The visits of the latest forward pass, in the order of blocks. Hooks are gone afterwards."""
    visits: list[Visit] = []
    handles = []
    for index, block in sparse_blocks(net).items():
        handles += _watch(index, block, visits)
    handles.append(net.register_forward_pre_hook(lambda *_: visits.clear()))
    try:
        yield visits
    finally:
        for handle in handles:
            handle.remove()


def _watch(index: int, block: ThreadsCarry, visits: list[Visit]) -> list[Any]:
    seen: dict[str, Any] = {}

    def keep(name: str, pick: Callable[[tuple[Any, ...], Any], Any]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen[name] = pick(inputs, output)

        return hook

    def finish(module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Carry]) -> None:
        x, carry = output
        momentum = carry.momentum[0] if block.step and carry.momentum else None
        shift = seen["routed"][0] - seen["normed"]
        visits.append(Visit(index, x, seen["point"], shift, seen["moved"], seen["update"], momentum, *seen["routed"]))
        seen.clear()

    return [
        block.norm2.register_forward_hook(keep("point", lambda inputs, output: inputs[0])),
        block.norm2.register_forward_hook(keep("normed", lambda inputs, output: output)),
        block.norm3.register_forward_hook(keep("moved", lambda inputs, output: inputs[0])),
        block.ls2.register_forward_hook(keep("update", lambda inputs, output: output)),
        sparse_mlp(block).router.register_forward_hook(keep("routed", lambda inputs, output: (inputs[0], output[0]))),
        block.register_forward_hook(finish),
    ]


def sample(loader: Iterable[tuple[Tensor, Tensor]], images: int, count: int) -> list[Tensor]:
    """At most `images` of the loader's `count` pictures, evenly over all of them: they lie class by class."""
    wanted = torch.arange(min(images, count)) * count // min(images, count)
    found, start = [], 0
    for batch, _ in track(loader, "pictures"):
        own = wanted[(wanted >= start) & (wanted < start + len(batch))] - start
        start += len(batch)
        if len(own):
            found.append(batch[own])
    return found


@torch.no_grad()
def walk(model: Wrapped, batches: list[Tensor], what: str) -> Iterator[tuple[Tensor, list[Visit]]]:
    """Logits and visits, batch by batch, behind a progress bar.

    Where routers group tokens of several images, whole groups only. Raises ValueError: there is none.
    """
    device, together = next(model.parameters()).device, images_together(model.net, batches[0].shape[-1])
    with record(model.net) as visits:
        for images in track(whole_groups(batches, together), what):
            yield model(images.to(device)), visits


def whole_groups(batches: list[Tensor], together: int) -> list[Tensor]:
    """The same images in batches of a multiple of `together`, without the few that are left in the end."""
    if all(len(images) % together == 0 for images in batches):
        return batches
    images = torch.cat(batches)
    count, size = len(images) - len(images) % together, max(together, len(batches[0]) // together * together)
    if not count:
        raise ValueError(
            f"--images={len(images)}: the network routes the tokens of {together} images together; use as many"
        )
    return list(images[:count].split(size))
