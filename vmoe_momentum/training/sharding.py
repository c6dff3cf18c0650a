"""Weights, gradients and moments spread over devices (FSDP2), each block gathered only while it computes."""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, cast

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
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._pytree import tree_map_only

from ..models import PixelModel
from ..models.sharded import is_sharded, read_into, write_sharded
from ..moe import Router
from ..moe.experts import Experts
from ..ranges import COUNT, in_range
from .experts import experts_mesh, shard_experts
from .later import Later
from .materializing import materialize
from .module import ImageClassifier, forward_normalized, forward_with_gates
from .scalars import keep_scalars
from .trainers import callbacks_of


@in_range("trainer.strategy.init_args.", expert_parallel=COUNT)
class FSDP2Strategy(ModelParallelStrategy):
    """Every device holds its share of each tensor: of weights, gradients and the optimizer's moments.

    Checkpoints are the same single files as on one device: any command reads them, and any number of devices goes on
    from them. Weight averaging is sharded, too. To be given by the overlay
    configs/scale/fsdp2.yaml.

    Fresh networks of create_model, and those of its local-dir:, are never whole in any device's memory. Under
    trainer.precision=bf16-mixed matrices are gathered in bfloat16, as autocast would round them; norms, routers and
    coefficients of momentum stay float32, and gradients are averaged in it. model.compile compiles block by block.

    Args:
        reshard_after_forward: Give a block's weights back after the forward pass and gather them again for the backward
            pass: less memory, half as much traffic again. The weights outside the blocks stay until the backward pass.
        process_group_backend: torch.distributed's: nccl, gloo, ...; by default as the device wants it.
        checkpoints: whole ones, which the first device gathers in its memory; or sharded ones, folders that all devices
            write at once, with the same guarantees. Any number of devices goes on from either, and all commands read
            both; `vmoe-momentum consolidate` makes the one of the other. sharded_async ones are written while
            training goes on, from a copy of each share in its machine's memory; what they replace stays until then.
        expert_parallel: Ranks that hold one copy of all experts among them, whole ones each, and send each other the
            tokens for them (expert parallelism), 1 to 1e9; a divisor of all ranks and of the number of experts.
            Further copies share each expert's weights among them. 1 treats experts as any other weights.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        process_group_backend: str | None = None,
        checkpoints: Literal["whole", "sharded", "sharded_async"] = "whole",
        expert_parallel: int = 1,
    ) -> None:
        sharded = checkpoints != "whole"
        super().__init__(save_distributed_checkpoint=sharded, process_group_backend=process_group_backend)
        self._later = Later() if checkpoints == "sharded_async" else None
        self.reshard_after_forward, self.expert_parallel = reshard_after_forward, expert_parallel

    @property
    def _trained(self) -> ImageClassifier:
        """What is trained, once the trainer knows it; no other kind of module is taken."""
        return cast(ImageClassifier, self.lightning_module)

    @property
    def _set_up(self) -> nn.Module:
        """What torch's state dicts are of: the same, as `setup` has left it."""
        assert self.model is not None
        return self.model

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        mesh, experts = self.device_mesh["data_parallel"], None
        if self.expert_parallel > 1:
            experts = experts_mesh(self.root_device.type, mesh.size(), self.expert_parallel)
        module = self._trained
        models = [module.model]
        for callback in callbacks_of(trainer):
            average = getattr(callback, "_average_model", None) if isinstance(callback, WeightAveraging) else None
            if average is not None:
                models.append(average.module.model)
        matrices = torch.bfloat16 if trainer.precision == "bf16-mixed" else None
        if module.compiled:
            _compile_blocks(module)
        for model in models:
            shard(model, mesh, self.reshard_after_forward, matrices, experts)
            materialize(model.net, self.root_device)
        module.configure_model = lambda: None  # type: ignore[method-assign]  # Lightning wants one; it is done
        super().setup(trainer)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """Without a backward pass nothing else gives the weights back, and averages swap with what is sharded."""
        result = super().validation_step(*args, **kwargs)
        self.reshard()
        return result

    def reshard(self) -> None:
        """Gives back all weights that were gathered."""
        for part in self._trained.modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """As torch numbers parameters, by the optimizer's groups; Lightning's numbers them by the network."""
        inner = getattr(optimizer, "_optimizer", optimizer)
        options = StateDictOptions(full_state_dict=not self._save_distributed_checkpoint, cpu_offload=True)
        named: dict[str, Any] = get_optimizer_state_dict(self._set_up, inner, options=options)
        if not named:  # not the first rank
            return named
        return self._numbered(named)

    def _numbered(self, named: dict[str, Any]) -> dict[str, Any]:
        numbers = {name: number for number, name in enumerate(_names(named))}
        groups = [{**group, "params": [numbers[name] for name in group["params"]]} for group in named["param_groups"]]
        return {"state": {numbers[name]: state for name, state in named["state"].items()}, "param_groups": groups}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """What callbacks put in, such as averaged weights, is gathered or written as the network is."""
        if self._save_distributed_checkpoint:
            path, writing = Path(self.broadcast(filepath)), getattr(self.checkpoint_io, "writing", nullcontext())
            if self._later is not None:
                return self._later.write(checkpoint, path, writing)
            with writing:
                return write_sharded(checkpoint, path)
        whole = tree_map_only(DTensor, lambda tensor: tensor.full_tensor().cpu(), checkpoint)
        super().save_checkpoint(whole, filepath, storage_options)

    def remove_checkpoint(self, filepath: Any) -> None:
        """Once what takes its place is whole."""
        if self._later is None:
            return super().remove_checkpoint(filepath)
        self._later.then(lambda: super(FSDP2Strategy, self).remove_checkpoint(filepath))

    def finish_saving(self) -> None:
        """Until all that was saved lies whole on the disk. Raises OSError: it could not be written."""
        if self._later is not None:
            self._later.finish()

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        if self._later is not None:
            self._later.check()
        super().on_train_batch_start(*args, **kwargs)

    def on_train_end(self) -> None:
        self.finish_saving()
        super().on_train_end()

    def teardown(self) -> None:
        if self._later is not None:
            self._later.close()
        super().teardown()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Into network and optimizers; the weights in it come back sharded, for the callbacks that load them."""
        self.reshard()
        self.finish_saving()
        path = Path(self.broadcast(checkpoint_path))
        ours: list[dict[str, Any]] = [get_optimizer_state_dict(self._set_up, each) for each in self.optimizers]
        weights = self._trained.state_dict()
        if is_sharded(path):
            checkpoint = read_into(path, self._places(weights, ours))
        else:
            checkpoint = self.checkpoint_io.load_checkpoint(path, weights_only=weights_only)
        for key in _STATES & checkpoint.keys():
            checkpoint[key] = _as_sharded(checkpoint[key], weights)
        strict = self._trained.strict_loading
        set_model_state_dict(self._set_up, checkpoint["state_dict"], options=StateDictOptions(strict=strict))
        for optimizer, own, state in zip(self.optimizers, ours, checkpoint.get("optimizer_states", ()), strict=False):
            names = _names(own)
            groups = [{**group, "params": [names[n] for n in group["params"]]} for group in state["param_groups"]]
            moments = {names[n]: value for n, value in state["state"].items()}
            moments = {n: _as_sharded(value, own["state"].get(n, {})) for n, value in moments.items()}
            named: dict[str, Any] = {"state": moments, "param_groups": groups}
            set_optimizer_state_dict(self._set_up, optimizer, named)
        return checkpoint

    def _places(self, weights: Mapping[str, Any], optimizers: list[dict[str, Any]]) -> dict[str, Any]:
        """A checkpoint of this network and these optimizers with tensors to read into; nothing is read over."""

        def like(value: Any) -> Any:
            return tree_map_only(DTensor, torch.empty_like, value)

        states = [like(self._numbered(optimizer)) for optimizer in optimizers]
        return {**{key: like(dict(weights)) for key in _STATES}, "optimizer_states": states}


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
    model: PixelModel,
    mesh: DeviceMesh,
    reshard_after_forward: bool = True,
    matrices: torch.dtype | None = None,
    experts: DeviceMesh | None = None,
) -> None:
    """In place: the network's blocks, one by one, then what lies around them.

    matrices: The type that the blocks' matrices are gathered in, None for their own; gradients are averaged in float32.
    Then what is no matrix of a block is a group of its own, in float32, gathered once a step. experts: The mesh of
    `shard_experts`.
    """
    if isinstance(model, FSDPModule):
        return
    for weight in model.parameters():  # FSDP2 cuts no others, so model.channels_last has no effect here
        weight.data = weight.data.contiguous()
    policy = MixedPrecisionPolicy()
    if matrices is not None:
        policy = MixedPrecisionPolicy(matrices, torch.float32, cast_forward_inputs=False)  # the carry is float32
    if experts is not None:
        shard_experts(model.net, experts, reshard_after_forward=reshard_after_forward, mp_policy=policy)
    how: dict[str, Any] = {
        "mesh": mesh, "ignored_params": keep_scalars(model, mesh),
        "shard_placement_fn": lambda weight: Shard(cut_axis(weight, mesh.size())),
    }  # fmt: skip
    for block in blocks(model.net):
        small = list(_not_matrices(block)) if matrices is not None else []
        if small:
            fully_shard(small, reshard_after_forward=False, **how)
        fully_shard(block, reshard_after_forward=reshard_after_forward, mp_policy=policy, **how)
    fully_shard(model, **how)
    for entry in ("forward_normalized", "forward_normalized_with_gates"):  # training's, not forward
        register_fsdp_forward_method(model, entry)


def cut_axis(weight: Tensor, ranks: int) -> int:
    """The first axis that divides by the ranks, or 0.

    FSDP2 fills another one up: 8 experts on 64 ranks would be sent, and gathered, as 64.
    """
    return next((axis for axis, size in enumerate(weight.shape) if size % ranks == 0), 0)


def _compile_blocks(module: ImageClassifier) -> None:
    """In place of the network as a whole, as gathering weights between blocks breaks its graph."""
    module.model._compiled_call_impl = None
    module.forward_in_training, module.forward_with_gates = forward_normalized, forward_with_gates
    for block in blocks(module.model.net):
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


def blocks(net: nn.Module) -> list[nn.Module]:
    """The children of the network's largest list: a transformer's blocks, a convolutional network's stages."""
    lists = [child for child in net.children() if isinstance(child, nn.ModuleList | nn.Sequential)]
    largest = max(lists, key=lambda child: sum(p.numel() for p in child.parameters()), default=None)
    return [] if largest is None else [child for child in largest if any(True for _ in child.parameters())]


def _as_sharded(state: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Spread as the tensors of the same names in `like` are; what they are not, or is so already, stays."""

    def one(name: str, value: Any) -> Any:
        model = like.get(name)
        if not isinstance(model, DTensor) or isinstance(value, DTensor):
            return value
        return distribute_tensor(value.to(model.device), model.device_mesh, model.placements, src_data_rank=None)

    return {name: one(name, value) for name, value in state.items()}
