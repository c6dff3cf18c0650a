"""Experts spread over ranks as whole experts, and over further ranks by FSDP2.

Two axes of ranks: `expert_parallel`, P ranks that hold one copy of the experts among them and exchange rows (moe/
exchange.py), and `expert_data_parallel`, ranks that hold the same experts and each a share of every weight of theirs.
Weights outside the experts lie on one axis, of all ranks.
"""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from ..moe import SparseMlp
from ..moe.exchange import check_divides, spread

AXES = ("expert_data_parallel", "expert_parallel")
SETTING = "trainer.strategy.init_args.expert_parallel"


def experts_mesh(device_type: str, ranks: int, expert_parallel: int) -> DeviceMesh:
    """Neighbouring ranks exchange rows: those of one node, where P is at most its number of devices."""
    mesh = init_device_mesh(device_type, (ranks // expert_parallel, expert_parallel), mesh_dim_names=AXES)
    mesh._flatten()  # norms are summed over both axes at once, in one order for all ranks
    return mesh


def check_experts(net: nn.Module, ranks: int, expert_parallel: int) -> None:
    """Raises ValueError: these experts cannot be spread so."""
    told = f"{SETTING}={expert_parallel}"
    if expert_parallel == 1:
        return
    if ranks % expert_parallel:
        fitting = [str(n) for n in range(1, ranks + 1) if ranks % n == 0]
        raise ValueError(
            f"{told}: it does not divide the run's {ranks} rank{'s' if ranks > 1 else ''} (trainer.devices times "
            f"trainer.num_nodes); use {' or '.join(fitting)}"
        )
    layers = [layer for layer in net.modules() if isinstance(layer, SparseMlp)]
    if not layers:
        raise ValueError(f"{told}: {type(net).__name__} has no experts as built; use 1, or a network with moe_layers")
    copies = ranks // expert_parallel
    for layer in layers:
        check_divides(layer.experts.fc1.weight.shape[0], expert_parallel, SETTING)
        for width in (part.weight.shape[1] for part in (layer.experts.fc1, layer.experts.fc2)):
            if width % copies:
                raise ValueError(
                    f"{told} on {ranks} ranks: {copies} of them share each weight of an expert, and its {width} rows "
                    f"do not divide by that; use {ranks}, or another number of ranks"
                )


def shard_experts(net: nn.Module, mesh: DeviceMesh, **options: Any) -> None:
    """In place, before the blocks around them. mesh: of both axes; options: those of fully_shard."""
    for layer in net.modules():
        if not isinstance(layer, SparseMlp):
            continue
        # P ranks' rows add to these gradients, of losses whose mean is wanted; FSDP2 takes the mean over copies.
        spread(layer.experts, mesh[AXES[1]], gradient_factor=1 / mesh[AXES[1]].size())
        layer.router.even = True
        # The second axis, whose ranks share: which experts a rank has is settled.
        fully_shard(layer.experts, mesh=mesh[AXES[0]], shard_placement_fn=lambda weight: Shard(1), **options)
