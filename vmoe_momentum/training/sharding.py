"""Weights, gradients and moments spread over devices (FSDP2), each block gathered only while it computes."""

from collections.abc import Iterator, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
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
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only

from ..models import PixelModel
from ..moe import Router
from ..moe.experts import Experts
from .materializing import materialize
from .module import ImageClassifier, forward_normalized


class FSDP2Strategy(ModelParallelStrategy):
    """Every device holds its share of each tensor: of weights, gradients and the optimizer's moments.

    Checkpoints are the same single files as on one device: any command reads them, and any number of devices goes on
    from them. Weight averaging is sharded, too. To be given as --trainer.strategy=FSDP2Strategy, or by the overlay
    configs/scale/fsdp2.yaml.

    Fresh networks of create_model, and those of its local-dir:, are never whole in any device's memory. Under
    trainer.precision=bf16-mixed matrices are gathered in bfloat16, as autocast would round them; norms, routers and
    coefficients of momentum stay float32, and gradients are averaged in it. model.compile compiles block by block.

    Args:
        reshard_after_forward: Give a block's weights back after the forward pass and gather them again for the backward
            pass: less memory, half as much traffic again. The weights outside the blocks stay until the backward pass.
        process_group_backend: torch.distributed's: nccl, gloo, ...; by default as the device wants it.
    """

    def __init__(self, reshard_after_forward: bool = True, process_group_backend: str | None = None) -> None:
        super().__init__(save_distributed_checkpoint=False, process_group_backend=process_group_backend)
        self.reshard_after_forward = reshard_after_forward
        self._scalars: set[str] = set()  # names of what has one axis more here than in checkpoints

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        mesh = self.device_mesh["data_parallel"]
        module = self.lightning_module
        models = [module.model]
        for callback in trainer.callbacks:
            average = getattr(callback, "_average_model", None) if isinstance(callback, WeightAveraging) else None
            if average is not None:
                models.append(average.module.model)
        self._scalars = {name for name, p in module.named_parameters() if p.ndim == 0}
        matrices = torch.bfloat16 if trainer.precision == "bf16-mixed" else None
        if module.compiled:
            _compile_blocks(module)
        for model in models:
            shard(model, mesh, self.reshard_after_forward, matrices)
            materialize(model.net, self.root_device)
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
        named["state"] = self._with_scalars(named["state"], ())
        numbers = {name: number for number, name in enumerate(_names(named))}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in named["param_groups"]]
        return {"state": {numbers[name]: state for name, state in named["state"].items()}, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """What callbacks put in, such as averaged weights, is gathered as the network is."""
        whole = tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), checkpoint)
        for key in _STATES & whole.keys():
            whole[key] = self._with_scalars(whole[key], ())
        super().save_checkpoint(whole, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Into network and optimizers; the weights in it come back sharded, for the callbacks that load them."""
        self._reshard()
        checkpoint = self.checkpoint_io.load_checkpoint(self.broadcast(checkpoint_path), weights_only=weights_only)
        for key in _STATES & checkpoint.keys():
            checkpoint[key] = self._with_scalars(checkpoint[key], (1,))
        strict = self.lightning_module.strict_loading
        set_model_state_dict(self.model, checkpoint["state_dict"], options=StateDictOptions(**_WHOLE, strict=strict))
        for optimizer, state in zip(self.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            names = _names(get_optimizer_state_dict(self.model, optimizer))
            groups = [{**group, "params": [names[n] for n in group["params"]]} for group in state["param_groups"]]
            moments = self._with_scalars({names[n]: value for n, value in state["state"].items()}, (1,))
            named = {"state": moments, "param_groups": groups}
            set_optimizer_state_dict(self.model, optimizer, named, options=StateDictOptions(**_WHOLE))
        for key in _STATES & checkpoint.keys():
            checkpoint[key] = _as_sharded(checkpoint[key], self.lightning_module)
        return checkpoint

    def _with_scalars(self, named: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
        """Scalars, and what the optimizer knows of them but for its own count of steps, in that shape."""
        found = dict(named)
        for name in self._scalars & found.keys():
            value = found[name]
            if isinstance(value, Tensor):
                found[name] = value.reshape(shape)
            else:
                found[name] = {k: v.reshape(shape) if k != "step" and v.numel() == 1 else v for k, v in value.items()}
        return found


_WHOLE = {"full_state_dict": True}
_STATES = {"state_dict", "current_model_state"}  # of a checkpoint: weights, averaged or raw


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
    model: PixelModel, mesh: DeviceMesh, reshard_after_forward: bool = True, matrices: torch.dtype | None = None
) -> None:
    """In place: the network's blocks, one by one, then what lies around them. Scalars get an axis.

    matrices: The type that the blocks' matrices are gathered in, None for their own; gradients are averaged in float32.
    Then what is no matrix of a block is a group of its own, in float32, gathered once a step.
    """
    if isinstance(model, FSDPModule):
        return
    for module in model.modules():  # FSDP2 takes no scalars
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 0:
                module._parameters[name] = nn.Parameter(parameter.detach().reshape(1))
    policy = MixedPrecisionPolicy()
    if matrices is not None:
        policy = MixedPrecisionPolicy(matrices, torch.float32, cast_forward_inputs=False)  # the carry is float32
    for block in _blocks(model.net):
        small = list(_not_matrices(block)) if matrices is not None else []
        if small:
            fully_shard(small, mesh=mesh, reshard_after_forward=False)
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "forward_normalized")  # training enters there, not through forward


def _compile_blocks(module: ImageClassifier) -> None:
    """In place of the network as a whole, as gathering weights between blocks breaks its graph."""
    module.model._compiled_call_impl, module.forward_in_training = None, forward_normalized
    for block in _blocks(module.model.net):
        block.compile()


def _not_matrices(block: nn.Module) -> Iterator[nn.Module]:
    """The block's norms, scales, routers and coefficients: modules that autocast leaves in float32."""
    for child in block.children():
        if isinstance(child, nn.Linear | nn.Conv2d | Experts):
            continue
        if child._parameters or isinstance(child, Router):
            yield child
        else:
            yield from _not_matrices(child)


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
