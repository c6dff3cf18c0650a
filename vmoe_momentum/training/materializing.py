"""Networks that no device could hold: built without memory, then drawn layer by layer, each device keeping a share."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..models import create_model
from ..models.initialization import initializers, seeded
from ..models.loading import LEARNED
from ..models.vit import MomentumVisionTransformer


def build_on_meta(make: Callable[..., nn.Module], **settings: Any) -> nn.Module:
    """What `make` makes, its parameters on the meta device, or mapped from a directory's file; `materialize` gives them
    memory.

    Networks of other makers come as they are: what draws their weights is not known.
    """
    with torch.device("meta"):
        net = make(**settings)
    fresh = all(p.is_meta for p in net.parameters())
    left = [name for name, p in net.named_parameters() if p.is_meta and LEARNED not in name]
    loaded = all(name.startswith("head.") for name in left)  # of other classes than the file's
    known = isinstance(net, MomentumVisionTransformer) and not any(b.is_meta for b in net.buffers())
    if not (known and (fresh or loaded)):
        return make(**settings)
    materialize(net, torch.device("cpu"), scalars=True)  # which are not spread: FSDP2 is to find them as they stay
    return net


@wraps(create_model)
def create_on_meta(**settings: Any) -> nn.Module:
    """create_model by `build_on_meta`: what FSDP2Strategy has in its place."""
    return build_on_meta(create_model, **settings)


create_on_meta.__module__, create_on_meta.__qualname__ = __name__, "create_on_meta"  # where parsers find it


@torch.no_grad()
def materialize(net: nn.Module, device: torch.device, scalars: bool = False) -> None:
    """In place: parameters on the meta device, or of them scalars alone, become those that the network would have been
    built with.

    One module at a time is drawn as a whole, in memory that is free again at once. Positions that were resampled
    between are drawn at their new size.
    """
    if not any(p.is_meta for p in net.parameters()):
        return
    assert isinstance(net, MomentumVisionTransformer)  # no others are built on the meta device
    with seeded(net.initial_seed):
        for module, draw in initializers(net):
            held = {name: p for name, p in module._parameters.items() if p is not None and p.is_meta}
            absent = [name for name, p in held.items() if p.ndim == 0 or not scalars]
            if absent:
                _materialize_one(module, absent, draw, device)


def _materialize_one(module: nn.Module, absent: list[str], draw: Callable[[], None], device: torch.device) -> None:
    wanted = {id(module._parameters[name]) for name in absent}
    module._apply(lambda t: torch.empty_like(t, device=device) if id(t) in wanted else t, recurse=False)
    own = dict(module._parameters)
    whole = {name: None if p is None else nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for name, p in own.items()}
    module._parameters.update(whole)
    try:
        draw()
    finally:
        module._parameters.update(own)
    for name in absent:
        parameter, drawn = own[name], whole[name]
        assert parameter is not None and drawn is not None  # the absent ones are on the meta device
        keep_share(parameter, drawn)


@torch.no_grad()
def keep_share(parameter: Tensor, whole: Tensor) -> None:
    """In place: of `whole`, which every rank has, what is this rank's."""
    if isinstance(parameter, DTensor):
        spread = distribute_tensor(whole.detach(), parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter, whole = parameter.to_local(), spread.to_local()
    parameter.copy_(whole)
