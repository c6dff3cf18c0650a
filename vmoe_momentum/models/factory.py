"""Building a network from explicit, typed settings: what YAML's `net` calls."""

import json
from pathlib import Path
from typing import Any, Literal

import timm
from safetensors import SafetensorError
from timm.models import is_model, model_entrypoint
from torch import nn

from ..files.checksums import verify_folder
from ..moe import Router
from ..momentum import MomentumRule
from ..names import did_you_mean
from ..ranges import in_range
from ..specs import from_spec, to_spec
from .networks import as_classifier
from .placement import PostNorm
from .vit import BLOCKS, NUMBERS, RATIO, WIDTH

OURS = "*moe*"
SHAPING = ("depth", "moe_layers", "num_experts", "expert_ratio", "representation_size")  # what tensors there are


@in_range("", **NUMBERS, representation_size=WIDTH.or_(None), depth=BLOCKS.or_(None), expert_ratio=RATIO)
def create_model(
    name: str = "vmoe_small_patch32_224",
    rule: MomentumRule | None = None,
    router: Router | None = None,
    depth: int | None = None,
    moe_layers: str | list[int] | None = None,
    num_experts: int | None = None,
    expert_ratio: float | None = None,
    representation_size: int | None = None,
    pos_embed: Literal["learn", "sincos2d", "none"] | None = None,
    expert_drop_rate: float | None = None,
    share_expert_init: bool | None = None,
    momentum_last: int | None = None,
    momentum_restart: int | None = None,
    post_norm: PostNorm | None = None,
    drop_rate: float | None = None,
    drop_path_rate: float | None = None,
    global_pool: Literal["token", "avg", "map"] | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    dynamic_img_size: bool = False,
    pretrained: bool | None = None,
    grad_checkpointing: bool = False,
) -> nn.Module:
    """Any timm classifier by name; for V-MoE names also what is said about experts and momentum.

    None, everywhere, means the named model's own default.

    Args:
        name: A timm model name; `timm.list_models("*moe*")` shows ours. "local-dir:PATH" is what
            `vmoe-momentum import` wrote.
        rule: Momentum rule across the MoE blocks, by class name: Residual (the default), HeavyBall, Nesterov,
            Complex, Adam, Robust, SAM.
        router: Router of every MoE block: TopKRouter, ExpertChoiceRouter, SoftRouter, GShardRouter, M6TRouter.
        depth: Blocks of a V-MoE, 0 to 10000.
        moe_layers: Sparse blocks: a list of indices, 0 to 10000, "last2" (the last two odd blocks), "every2" (every odd
            block) or "none".
        num_experts: Experts of a sparse layer, 1 to 65536.
        expert_ratio: Hidden width of an expert over the network's, in (0, 1024]; that of dense MLPs where nothing is
            said. One expert of K times the ratio, chosen alone (top_k 1), is the dense MLP of equal active FLOPs.
        representation_size: Width of the tanh layer before the head, 0 to 65536; 0 for none.
        pos_embed: Learned positions, fixed sines and cosines, or none.
        expert_drop_rate: Dropout inside the experts, in [0, 1).
        share_expert_init: Start all experts of a layer equal, as the published recipes do.
        momentum_last: Momentum over the last so many sparse blocks only, 1 to 10000; before them plain residual ones.
        momentum_restart: Momentum begins anew every so many sparse blocks, 1 to 10000.
        post_norm: Blocks with a norm behind their MLP's residual (norm3): none, the dense, the sparse, or all. The
            authors' vision code has it in all blocks of its momentum networks, and not in its baseline.
        drop_rate: Dropout before the head, in [0, 1).
        drop_path_rate: Stochastic depth at the last block, in [0, 1), growing linearly from 0.
        global_pool: What the head reads: the class token, the mean over patches, or attention pooling. Only the first
            has a class token in V-MoE.
        num_classes: Classes, 0 to 1e9; `fit` sets it from the data.
        image_size: Side of the square input, 1 to 16384 px, a multiple of the patch; `fit` sets it from the data.
        dynamic_img_size: Take images of any size in whole patches, resampling the positions: for data.progressive and
            data.eval_image_size.
        pretrained: Load weights: a directory's (its default), or timm's (downloads them; V-MoE names have none).
        grad_checkpointing: Recompute blocks in the backward pass: less memory, about a third more time.

    Raises ValueError: an unknown name, or a sparse setting for a network without sparse layers.
    or a directory that is damaged.
    FileNotFoundError: no such directory.
    """
    architecture = _architecture(name)
    if name.startswith("local-dir:"):
        verify_folder(Path(name.partition(":")[2]), "name=local-dir:")
    if architecture == "vmoe_upcycled" == name:
        raise ValueError("name=vmoe_upcycled: use the class UpcycledViT, which takes the backbone")
    is_directory = name.startswith(("local-dir:", "hf-hub:"))
    pretrained = is_directory if pretrained is None else pretrained
    sparse: dict[str, Any] = {
        "rule": rule, "router": router, "depth": depth, "moe_layers": moe_layers, "num_experts": num_experts,
        "expert_ratio": expert_ratio, "representation_size": representation_size, "pos_embed": pos_embed,
        "expert_drop_rate": expert_drop_rate, "share_expert_init": share_expert_init, "momentum_last": momentum_last,
        "momentum_restart": momentum_restart, "post_norm": post_norm,
    }  # fmt: skip
    given = {key: value for key, value in sparse.items() if value is not None}
    for key in ("depth", "expert_ratio", "representation_size", "pos_embed", "share_expert_init"):
        if architecture == "vmoe_upcycled" and key in given:
            raise ValueError(f"{key}={given[key]}: an upcycled network has its backbone's; leave it out")
    if given and not _is_ours(architecture):
        key, value = next(iter(given.items()))
        raise ValueError(f"{key}={value}: {name} has no sparse layers; leave it out, or use one of timm's {OURS} names")
    if pretrained and not is_directory and _is_ours(name):
        raise ValueError(f"pretrained=True: no weights are published for {name}; leave it out")
    for key, base in (("rule", MomentumRule), ("router", Router)):
        if key in given:
            given[key] = to_spec(from_spec(given[key], base, key))  # Python may also give a name or JSON
    if image_size is not None and not is_directory and _is_ours(name):
        given["img_size"] = image_size  # at once: resampling would blur freshly drawn positions
    timm_settings: dict[str, Any] = {
        "num_classes": num_classes,
        "drop_rate": drop_rate,
        "drop_path_rate": drop_path_rate,
        "global_pool": global_pool,
        **({"dynamic_img_size": True} if dynamic_img_size else {}),  # timm's convolutional networks know no such thing
    }
    try:
        net = timm.create_model(name, pretrained=pretrained, **timm_settings, **given)
    except TypeError as error:
        if not dynamic_img_size:
            raise
        raise ValueError(f"dynamic_img_size=True: {name} has no such setting ({error}); leave it out") from error
    except RuntimeError as error:
        shaping = [key for key in SHAPING if key in given]
        if is_directory and pretrained and shaping:
            raise ValueError(
                f"{shaping[0]}={given[shaping[0]]}: the weights in {name} are of a network of another shape; leave it"
                " out, or start anew with pretrained=false"
            ) from error
        if ".norm3." not in str(error):
            raise
        raise ValueError(
            f"post_norm={post_norm}: the weights in {name} were trained with other norms behind the MLPs' residuals, "
            "and a fresh one there makes another network of them; leave post_norm out"
        ) from error
    except SafetensorError as error:
        raise ValueError(f"name={name}: model.safetensors is damaged ({error}); write it again") from error
    resize = getattr(net, "set_input_size", None)  # convolutional networks take any size as they are
    if image_size is not None and "img_size" not in given and resize is not None:
        resize(img_size=(image_size, image_size))
    if grad_checkpointing:
        as_classifier(net).set_grad_checkpointing()
    return net


def _architecture(name: str) -> str:
    """The registered name behind a name or a directory; a hub repository is left as it is."""
    if name.startswith("local-dir:"):
        path = Path(name.partition(":")[2]) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"name={name}: no file {path}; give a directory that `vmoe-momentum import` wrote")
        try:
            return json.loads(path.read_text())["architecture"]
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"name={name}: {path} is damaged, or no timm config (no architecture in it)") from error
    if not name.startswith("hf-hub:") and not is_model(name.partition(".")[0]):
        raise ValueError(f"name={name}: no such timm model{did_you_mean(name, _candidates(name))}")
    return name


def _is_ours(architecture: str) -> bool:
    """Also for a hub repository, of which nothing is known before it is fetched."""
    if architecture.startswith("hf-hub:"):
        return True
    return model_entrypoint(architecture.partition(".")[0]).__module__.startswith(__package__)


def _candidates(name: str) -> list[str]:
    """Names to offer for a typo: ours, and timm's that start alike (it has over a thousand)."""
    return timm.list_models(OURS) + timm.list_models(f"{name[:8]}*")[:20]
