"""Weights, gradients and moments spread over devices (FSDP2), each block gathered only while it computes."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only

from ..models import PixelModel
from ..ranges import COUNT, in_range
from .experts import experts_mesh, shard_experts
from .scalars import keep_scalars


@in_range("trainer.strategy.init_args.", expert_parallel=COUNT)
class FSDP2Strategy(ModelParallelStrategy):
    """Every device holds its share of each tensor: of weights, gradients and the optimizer's moments.

    Checkpoints are the same single files as on one device: any command reads them, and any number of devices goes on
    from them. Weight averaging is sharded, too. To be given as --trainer.strategy=FSDP2Strategy, or by the overlay
    configs/scale/fsdp2.yaml.

    Args:
        reshard_after_forward: Give a block's weights back after the forward pass and gather them again for the backward
            pass: less memory, half as much traffic again. The weights outside the blocks stay until the backward pass.
        process_group_backend: torch.distributed's: nccl, gloo, ...; by default as the device wants it.
        expert_parallel: Ranks that hold one copy of all experts among them, whole ones each, and send each other the
            tokens for them (expert parallelism), 1 to 1e9; a divisor of all ranks and of the number of experts.
            Further copies share each expert's weights among them. 1 treats experts as any other weights.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        process_group_backend: str | None = None,
        expert_parallel: int = 1,
    ) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)
        self.reshard_after_forward, self.expert_parallel = reshard_after_forward, expert_parallel

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        mesh, experts = self.device_mesh["data_parallel"], None
        if self.expert_parallel > 1:
            experts = experts_mesh(self.root_device.type, mesh.size(), self.expert_parallel)
        module = self.lightning_module
        shard(module.model, mesh, self.reshard_after_forward, experts)
        for callback in trainer.callbacks:
            average = getattr(callback, "_average_model", None) if isinstance(callback, WeightAveraging) else None
            if average is not None:
                shard(average.module.model, mesh, self.reshard_after_forward, experts)
        module.configure_model = lambda: None  # Lightning wants one; what it is for is done
        super().setup(trainer)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Without a backward pass nothing else gives the weights back, and averages swap with what is sharded."""
        result = super().validation_step(*args, **kwargs)
        self._reshard()
        return result

    def _reshard(self) -> None:
        for part in self.lightning_module.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As torch numbers parameters, by the optimizer's groups; Lightning's numbers them by the network."""
        inner = getattr(optimizer, "_optimizer", optimizer)
        named = get_optimizer_state_dict(self.model, inner, options=StateDictOptions(**_WHOLE, cpu_offload=True))
        if not named:  # not the first rank
            return named
        numbers = {name: number for number, name in enumerate(_names(named))}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in named["param_groups"]]
        return {"state": {numbers[name]: state for name, state in named["state"].items()}, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """What callbacks put in, such as averaged weights, is gathered as the network is."""
        whole = tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), checkpoint)
        super().save_checkpoint(whole, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Into network and optimizers; the weights in it come back sharded, for the callbacks that load them."""
        self._reshard()
        checkpoint = self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path), weights_only=weights_only)
        strict = self.lightning_module.strict_loading
        set_model_state_dict(self.model, checkpoint["state_dict"], options=StateDictOptions(**_WHOLE, strict=strict))
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            names = _names(get_optimizer_state_dict(self.model, optimizer))
            groups = [{**group, "params": [names[n] for n in group["params"]]} for group in state["param_groups"]]
            named = {"state": {names[n]: value for n, value in state["state"].items()}, "param_groups": groups}
            set_optimizer_state_dict(self.model, optimizer, named, options=StateDictOptions(**_WHOLE))
        for key in ("state_dict", "current_model_state"):
            if key in checkpoint:
                checkpoint[key] = _as_sharded(checkpoint[key], self.lightning_module)
        return checkpoint


_WHOLE = {"full_state_dict": True}


def _names(named: dict[str, Any]) -> list[str]:
    """Parameters in the order of the optimizer's groups."""
    return [name for group in named["param_groups"] for name in group["params"]]


def refuse_unsharded(strategy: Strategy) -> None:
    """Raises ValueError: Lightning's own leaves sharding to the module."""
    if type(strategy) is ModelParallelStrategy:
        raise ValueError(
            "trainer.strategy=ModelParallelStrategy: it spreads nothing by itself; use FSDP2Strategy "
            "(--config configs/scale/fsdp2.yaml)"
        )


def shard(
    model: PixelModel, mesh: DeviceMesh, reshard_after_forward: bool = True, experts: DeviceMesh | None = None
) -> None:
    """In place: the network's blocks, one by one, then what lies around them. experts: the mesh of `shard_experts`."""
    if isinstance(model, FSDPModule):
        return
    if experts is not None:
        shard_experts(model.net, experts, reshard_after_forward=reshard_after_forward)
    how = {
        "mesh": mesh, "ignored_params": keep_scalars(model, mesh),
        "shard_placement_fn": lambda weight: Shard(cut_axis(weight, mesh.size())),
    }  # fmt: skip
    for block in _blocks(model.net):
        fully_shard(block, reshard_after_forward=reshard_after_forward, **how)
    fully_shard(model, **how)
    register_fsdp_forward_method(model, "forward_normalized")  # training enters there, not through forward


def cut_axis(weight: Tensor, ranks: int) -> int:
    """The first axis that divides by the ranks, or 0.

    FSDP2 fills another one up: 8 experts on 64 ranks would be sent, and gathered, as 64.
    """
    return next((axis for axis, size in enumerate(weight.shape) if size % ranks == 0), 0)


def _blocks(net: nn.Module) -> list[nn.Module]:
    """The children of the network's largest list: a transformer's blocks, a convolutional network's stages."""
    lists = [child for child in net.children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    largest = max(lists, key=lambda child: sum(p.numel() for p in child.parameters()), default=None)
    return [] if largest is None else [child for child in largest if any(True for _ in child.parameters())]


def _as_sharded(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    own: dict[str, Tensor] = module.state_dict()

    def one(name: str, value: Any) -> Any:
        like = own.get(name)
        if not isinstance(like, DTensor) or isinstance(value, DTensor):
            return value
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)

    return {name: one(name, value) for name, value in state.items()}
