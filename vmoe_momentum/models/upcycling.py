"""Sparse upcycling: a dense timm ViT whose MLPs become experts (arXiv:2212.05055)."""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import timm
from timm.layers import Mlp
from timm.models import VisionTransformer, is_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block
from torch import nn

from ..files.checksums import verify_folder
from ..moe import GShardRouter, Router, TopKRouter
from ..momentum import MomentumRule, Residual
from ..names import did_you_mean
from ..ranges import in_range
from ..specs import describe, from_spec, to_spec
from .blocks import DenseBlock, MomentumBlock
from .initialization import draw_seed
from .loading import pixels_per_patch
from .networks import as_classifier
from .placement import PostNorm, block_settings, check_post_norm, moe_indices, momentum_steps
from .vit import NUMBERS, MomentumVisionTransformer, check_patches

ARCHITECTURE = "vmoe_upcycled"


@in_range("", **NUMBERS)
class UpcycledViT(MomentumVisionTransformer):
    """Any dense timm ViT or DeiT with its MLP copied into every expert of the sparse blocks.

    With renormalised gates and dropless routing (the default in evaluation) under the Residual rule the logits are
    those of the dense network: every expert is its MLP, and a token's combine weights sum to one. Raw V-MoE gates
    (renormalize=False) scale a layer's output by the sum of the chosen gates, dropping loses tokens, and another rule
    moves differently: then the network starts elsewhere and has to be trained.

    Args:
        backbone: A timm ViT or DeiT by name, or "local-dir:PATH". Distilled ones (two tokens) are refused.
        pretrained: Start from the backbone's weights (downloads those of a plain name).
        moe_layers: Sparse blocks: "last2" (the last two odd blocks), "every2", or a list of indices, 0 to
            10000.
        num_experts: Experts of a sparse layer, 1 to 65536.
        rule: Momentum rule across the sparse blocks; Residual where nothing is said.
        router: Router of every sparse block; where nothing is said TopKRouter with renormalised gates.
        expert_drop_rate: Dropout inside the experts, in [0, 1); where nothing is said that of the backbone's MLPs.
        num_classes: Classes, 0 to 1e9; another number than the backbone's gives a fresh head. `fit` sets it from the
            data.
        image_size: Side of the square input, 1 to 16384 px; `fit` sets it from the data.
        drop_rate: Dropout before the head, in [0, 1).
        drop_path_rate: Stochastic depth at the last block, in [0, 1), growing linearly from 0.
        momentum_last: Momentum over the last so many sparse blocks only, 1 to 10000; before them plain residual ones.
        momentum_restart: Momentum begins anew every so many sparse blocks, 1 to 10000.
        post_norm: Blocks with a fresh norm behind their MLP's residual. The backbone has been trained without it:
            its features change at once, and it has to be trained again.
        grad_checkpointing: Recompute blocks in the backward pass: less memory, about a third more time.
        backbone_args: Further arguments of the backbone.

    Raises ValueError: a backbone that is no plain ViT, with the reason.
    """

    def __init__(
        self,
        backbone: str = "vit_tiny_patch16_224",
        pretrained: bool = False,
        moe_layers: str | list[int] = "last2",
        num_experts: int = 8,
        rule: MomentumRule | None = None,
        router: Router | None = None,
        expert_drop_rate: float | None = None,
        num_classes: int | None = None,
        image_size: int | None = None,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        momentum_last: int | None = None,
        momentum_restart: int | None = None,
        post_norm: PostNorm = "none",
        grad_checkpointing: bool = False,
        backbone_args: dict[str, Any] | None = None,
    ) -> None:
        check_post_norm(post_norm)
        rule = from_spec(rule or Residual(), MomentumRule, "rule")
        router = from_spec(router or TopKRouter(renormalize=True), Router, "router")
        given = {"num_classes": num_classes, "img_size": image_size, "drop_rate": drop_rate}
        if image_size is not None:
            check_patches(image_size, 1)
        dense = _dense(backbone, pretrained, {**(backbone_args or {}), **given, "drop_path_rate": drop_path_rate})
        if image_size is not None and not dense.dynamic_img_size:
            check_patches(image_size, pixels_per_patch(dense))
        indices = moe_indices(moe_layers, len(dense.blocks))
        steps = momentum_steps(len(indices), momentum_last, momentum_restart)
        parts = cast(Sequence[Block], dense.blocks)  # nothing else, as _dense has checked
        for index in indices:
            _check_block(parts[index], backbone)

        nn.Module.__init__(self)  # not the ViT's: every part and setting is the dense network's
        self.__dict__.update({key: value for key, value in vars(dense).items() if key != "training"})
        self.positions = "learn" if self.pos_embed is not None else "none"
        self._keep_settings(rule, router, post_norm, draw_seed())
        sparse: dict[str, Any] = {"num_experts": num_experts, "router": router, "expert_drop": expert_drop_rate}
        blocks: list[nn.Module] = []
        for index, block in enumerate(parts):
            shared = {"rule": rule, **block_settings(index, indices, steps, post_norm)}
            sparsely = index in indices
            blocks.append(
                MomentumBlock.adopt(block, **sparse, **shared) if sparsely else DenseBlock.adopt(block, **shared)
            )
        self.blocks = nn.Sequential(*blocks)
        self.set_grad_checkpointing(grad_checkpointing)
        config = as_classifier(dense).pretrained_cfg
        self.backbone_cfg = {**config, "architecture": ARCHITECTURE}
        self.pretrained_cfg = self.default_cfg = self.backbone_cfg
        known = cast(dict[str, Any], dense._model_args)  # timm's note of its arguments
        self._model_args = {
            "backbone": config["architecture"],
            "backbone_args": {k: v for k, v in known.items() if k not in given and k != "drop_path_rate"},
            "moe_layers": list(indices),
            "num_experts": num_experts,
            "rule": to_spec(rule),
            "router": to_spec(router),
            "momentum_last": momentum_last,
            "momentum_restart": momentum_restart,
            "post_norm": post_norm,
        }

    @classmethod
    def for_timm(cls, img_size: int | tuple[int, int] | None = None, **settings: Any) -> "UpcycledViT":
        """The same from timm's names for the settings; those that are not ours are the backbone's."""
        ours = set(inspect.signature(cls.__init__).parameters) - {"self", "pretrained", "image_size"}
        theirs = {name: settings.pop(name) for name in list(settings) if name not in ours}
        backbone_args = {**(settings.pop("backbone_args", None) or {}), **theirs}
        size: Any = img_size  # height and width are timm's, and not for the command line
        return cls(**settings, image_size=size, backbone_args=backbone_args)

    def function_settings(self) -> dict[str, Any]:
        """With the backbone, whose options (norms, activation, scale) lie in no tensor either."""
        return {**super().function_settings(), "backbone": self._model_args["backbone"]}


def _dense(backbone: str, pretrained: bool, arguments: dict[str, Any]) -> VisionTransformer:
    """The dense network. Raises ValueError: not a plain ViT."""
    is_path = backbone.startswith(("local-dir:", "hf-hub:"))
    if not is_path and not is_model(backbone.partition(".")[0]):
        candidates = timm.list_models(f"{backbone[:8]}*")[:20] + timm.list_models("deit*_224")
        raise ValueError(f"backbone={backbone}: no such timm model{did_you_mean(backbone, candidates)}")
    arguments = {key: value for key, value in arguments.items() if value is not None}
    place = Path(backbone.partition(":")[2])
    if backbone.startswith("local-dir:") and place.is_dir():
        verify_folder(place, "backbone=local-dir:")
    try:
        net = timm.create_model(backbone, pretrained=pretrained, **arguments)
    except TypeError as error:
        raise ValueError(f"backbone_args={arguments}: {backbone} does not take them ({error})") from error
    except AssertionError as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items()).replace("img_size", "image_size")
        reason = f" ({error})" if str(error) else ""
        raise ValueError(
            f"{given or 'arguments'}: timm cannot build {backbone} so{reason}; an image is a whole number of patches"
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"backbone={backbone} with pretrained=true: its weights could not be had ({str(error).splitlines()[0]}); "
            "use pretrained=false for random ones, or local-dir:PATH with weights on this machine"
        ) from error
    if isinstance(net, MomentumVisionTransformer):
        raise ValueError(f"backbone={backbone}: it has experts already; create it by name instead")
    if isinstance(net, VisionTransformerDistilled):
        raise ValueError(
            f"backbone={backbone}: distilled networks read two tokens with two heads, which the sparse network has "
            f"not; use {backbone.replace('_distilled', '')}"
        )
    if not isinstance(net, VisionTransformer):
        raise ValueError(f"backbone={backbone}: a {type(net).__name__}; only timm's VisionTransformer can be upcycled")
    for block in net.blocks:
        if type(block) is not Block:
            raise ValueError(f"backbone={backbone}: its blocks are {type(block).__name__}; only plain ones fit")
    return net


def _check_block(block: Block, backbone: str) -> None:
    mlp = block.mlp
    plain = type(mlp) is Mlp and isinstance(mlp.norm, nn.Identity) and isinstance(mlp.fc1, nn.Linear)
    if not plain:
        raise ValueError(
            f"backbone={backbone}: its MLP is a {type(mlp).__name__} with more than two layers and an activation, "
            "which the experts have not; use a plain ViT"
        )


def differences(net: UpcycledViT) -> list[str]:
    """Why its features in evaluation are not those of the dense network; empty where they are."""
    if not net.moe_layers:
        return []
    layer = net.sparse_blocks[0].mlp
    rule, router, found = to_spec(net.rule), layer.router, []
    num_experts = layer.experts.fc1.weight.shape[0]
    tokens = net.patch_embed.num_patches + net.num_prefix_tokens
    group_size = tokens if router.group_size == "image" else router.group_size
    if net.post_norm != "none":
        found.append(f"post_norm={net.post_norm} normalises the residual stream")
    if rule != to_spec(Residual()):
        found.append(f"rule={describe(rule)} moves the residual stream otherwise than x + u(x)")
    if not isinstance(router, TopKRouter | GShardRouter):
        name = type(router).__name__
        found.append(f"router={name}: a token's combine weights do not sum to one over single experts")
        return found
    if isinstance(router, TopKRouter) and not router.renormalize and router.top_k < num_experts:
        found.append("router.renormalize=False scales a layer's output by the sum of the chosen gates, below one")
    router = copy.deepcopy(router).eval()
    if router.slots(group_size, num_experts) is not None:
        found.append("router.eval_capacity_factor or capacity: full experts drop tokens")
    if router.bfloat16_dispatch:
        found.append("router.bfloat16_dispatch rounds tokens on their way")
    return found
