"""Parameters without an axis, such as a learned mu or the scale of soft routing: FSDP2 has nothing to cut."""

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


def keep_scalars(model: nn.Module, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Those parameters, which stay whole on every rank: each backward pass leaves the mean of their gradients.

    For fully_shard's ignored_params. Gradients that were there before are the same on all ranks, and so is their mean.
    """
    scalars = {weight for weight in model.parameters() if weight.ndim == 0}
    group = mesh.get_group()

    def average(weight: Tensor) -> None:
        grad = weight.grad
        assert grad is not None  # it has just been accumulated
        dist.all_reduce(grad, group=group)
        grad /= group.size()

    for weight in scalars:
        if weight.requires_grad:
            weight.register_post_accumulate_grad_hook(average)
    return scalars
