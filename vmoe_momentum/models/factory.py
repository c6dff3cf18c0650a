"""Building a network from explicit, typed settings: what YAML's `net` calls."""

from typing import Any, Literal

import timm
from timm.models import is_model, model_entrypoint
from torch import nn

from ..moe import Router
from ..momentum import MomentumRule
from .settings import did_you_mean, to_spec

OURS = "vmoe*"


def create_model(
    name: str = "vmoe_small_patch32_224",
    rule: MomentumRule | None = None,
    router: Router | None = None,
    moe_layers: str | list[int] | None = None,
    num_experts: int | None = None,
    representation_size: int | None = None,
    expert_drop_rate: float | None = None,
    share_expert_init: bool | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    global_pool: Literal["token", "avg", "map"] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    pretrained: bool = False,
    grad_checkpointing: bool = False,
) -> nn.Module:
    """Any timm classifier by name; for V-MoE names also what is said about experts and momentum.

    None, everywhere, means the named model's own default.

    Args:
        name: A timm model name; `timm.list_models("vmoe*")` shows ours.
        rule: Momentum rule across the MoE blocks, by class name: Residual (the default), HeavyBall.
        router: Router of every MoE block: TopKRouter.
        moe_layers: Sparse blocks: a list of indices from 0, "last2" (the last two odd blocks), "every2" (every odd
            block) or "none".
        num_experts: Experts of a sparse layer.
        representation_size: Width of the tanh layer before the head; 0 for none.
        expert_drop_rate: Dropout inside the experts.
        share_expert_init: Start all experts of a layer equal, as the published recipes do.
        drop_rate: Dropout before the head.
        drop_path_rate: Stochastic depth at the last block, growing linearly from 0.
        global_pool: What the head reads: the class token, the mean over patches, or attention pooling.
        num_classes: Classes; `fit` sets it from the data.
        image_size: Side of the square input, a multiple of the patch; `fit` sets it from the data.
        pretrained: Load timm's weights (downloads them; V-MoE names have none).
        grad_checkpointing: Recompute blocks in the backward pass: less memory, about a third more time.

    Raises ValueError: an unknown name, or a sparse setting for a network without sparse layers.
    """
    if not name.startswith(("hf-hub:", "local-dir:")) and not is_model(name.partition(".")[0]):
        raise ValueError(f"name={name}: no such timm model{did_you_mean(name, _candidates(name))}")
    sparse: dict[str, Any] = {
        "rule": rule, "router": router, "moe_layers": moe_layers, "num_experts": num_experts,
        "representation_size": representation_size, "expert_drop_rate": expert_drop_rate,
        "share_expert_init": share_expert_init,
    }  # fmt: skip
    given = {key: value for key, value in sparse.items() if value is not None}
    if given and is_model(name) and not _is_ours(name):
        key, value = next(iter(given.items()))
        raise ValueError(f"{key}={value}: {name} has no sparse layers; leave it out, or use one of timm's {OURS} names")
    if pretrained and is_model(name) and _is_ours(name):
        raise ValueError(f"pretrained=True: no weights are published for {name}; leave it out")
    for key in ("rule", "router"):
        if key in given:
            given[key] = to_spec(given[key])
    if image_size is not None and is_model(name) and _is_ours(name):
        given["img_size"] = image_size  # at once: resampling would blur freshly drawn positions
    net = timm.create_model(
        name,
        pretrained=pretrained,
        num_classes=num_classes,
        drop_rate=drop_rate,
        drop_path_rate=drop_path_rate,
        global_pool=global_pool,
        **given,
    )
    if image_size is not None and "img_size" not in given and hasattr(net, "set_input_size"):
        net.set_input_size(img_size=(image_size, image_size))  # convolutional networks take any size as they are
    if grad_checkpointing:
        net.set_grad_checkpointing()
    return net


def _is_ours(name: str) -> bool:
    return model_entrypoint(name.partition(".")[0]).__module__.startswith(__package__)


def _candidates(name: str) -> list[str]:
    """Names to offer for a typo: ours, and timm's that start alike (it has over a thousand)."""
    return timm.list_models(OURS) + timm.list_models(f"{name[:8]}*")[:20]
