"""V-MoE checkpoints into our networks: what the tensors say is read off, what they cannot say is asked for."""

import math
import re
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import timm
import torch

from ..moe import Router, SoftRouter, TopKRouter
from ..moe.routing import LinearGate
from ..momentum import MomentumRule, Residual
from ..ranges import SIDE, in_range
from ..specs import to_spec
from .flax_layout import Shape, layout
from .flax_shards import some
from .placement import PostNorm, has_post_norm
from .vit import NUMBERS, WIDTH, MomentumVisionTransformer

ExpertOutput = Literal["added", "subtracted"]
Sides = tuple[int, int]  # height and width
BLOCK = re.compile(r"Encoder/encoderblock_(\d+)/")


READ = {
    "num_classes": NUMBERS["num_classes"], "image_size": SIDE.or_(None), "num_heads": replace(WIDTH, low=1).or_(None),
    "native_size": SIDE.or_(None),
}  # fmt: skip


@in_range("", **READ)
def from_flax(
    arrays: dict[str, np.ndarray],
    router: Router | None = None,
    rule: MomentumRule | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    num_heads: int | None = None,
    pos_embed: Literal["sincos2d", "none"] | None = None,
    native_size: tuple[int, int] | None = None,
    expert_output: ExpertOutput | None = None,
) -> MomentumVisionTransformer:
    """The network that these parameters (see read_flax) belong to, its settings as JSON with it.

    Args:
        arrays: Flax parameters by `/`-joined name.
        router: How tokens are routed; needed for a linear gate, whose K, capacity and groups lie in no tensor. A soft
            router's slots are read off.
        rule: Momentum across the sparse blocks; Residual, as trained, where nothing is said.
        image_size: Side, or height and width, 1 to 16384 px. Learned positions of another grid are resampled (bicubic,
            by timm; the reference's fine-tuning interpolates linearly). Needed where there are none.
        num_classes: 0 to 1e9: 0 drops the head, another number than the file's replaces it by a fresh one.
        num_heads: 1 to 65536; needed only where attention kernels are (D, D).
        pos_embed: Needed only where the file has no learned positions.
        native_size: Height and width, 1 to 16384 px, that the learned positions are for; needed where not square.
        expert_output: Whether sparse blocks added or subtracted what their experts say; needed where they have a norm
            behind it (LayerNorm_2), as in the momentum networks of github.com/rachtsy/vmoe, which subtract.

    Raises ValueError: tensors that are missing, unknown or misshapen, by name; a setting that has to be given.
    """
    shape = read_shape(arrays, num_heads)
    shape = shape._replace(subtracted=_is_subtracted(shape, expert_output, rule))
    router = _router(shape, router)
    native, wanted = _image_sizes(shape, image_size, native_size, pos_embed)
    sources = layout(shape)
    _check(arrays, {name: size for source in sources.values() for name, size in source.arrays.items()})
    tensors = {
        key: torch.from_numpy(np.ascontiguousarray(source.build(*(arrays[name] for name in source.arrays))))
        for key, source in sources.items()
    }
    net = timm.create_model(
        "vmoe_custom",
        img_size=native,
        patch_size=shape.patch,
        in_chans=shape.channels,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=shape.num_heads,
        mlp_ratio=_ratio(shape),
        moe_layers=list(shape.moe_layers),
        num_experts=max(shape.num_experts, 1),
        representation_size=shape.representation,
        post_norm=shape.post_norm,
        qk_norm=shape.qk_norm,
        pos_embed=pos_embed or "learn",
        class_token=shape.class_token,
        global_pool="map" if shape.map_head else "token" if shape.class_token else "avg",
        num_classes=shape.num_classes,
        rule=to_spec(rule or Residual()),
        router=to_spec(router),
    )
    assert isinstance(net, MomentumVisionTransformer)  # the name says so
    missing, unexpected = net.load_state_dict(tensors, strict=False)
    learned = [name for name in missing if ".momentum." not in name]  # a rule's own scalars start at its constants
    assert not learned and not unexpected, (learned, unexpected)
    if wanted != native:
        net.set_input_size(img_size=wanted)
    if num_classes is not None and num_classes != shape.num_classes:
        net.reset_classifier(num_classes)
    return net


def read_shape(arrays: dict[str, np.ndarray], num_heads: int | None) -> Shape:
    """What the tensors say. Raises ValueError: they are not those of a V-MoE, or the heads have to be given."""

    def size(name: str, ndim: int) -> tuple[int, ...]:
        if name not in arrays:
            raise ValueError(f"{name} is missing: not the parameters of a V-MoE vision transformer")
        if arrays[name].ndim != ndim:
            raise ValueError(f"{name} has shape {arrays[name].shape} where {ndim} axes belong")
        return arrays[name].shape

    height, width_px, channels, width = size("embedding/kernel", 4)
    blocks = {int(match[1]) for name in arrays if (match := BLOCK.match(name))}
    if not blocks:
        raise ValueError("Encoder/encoderblock_0 is missing: not the parameters of a V-MoE vision transformer")
    if gone := sorted(set(range(len(blocks))) - blocks):
        raise ValueError(f"missing: {some([f'Encoder/encoderblock_{i}' for i in gone])}, where others follow")
    moe = sorted(i for i in blocks if any(name.startswith(f"Encoder/encoderblock_{i}/Moe/") for name in arrays))
    first = f"Encoder/encoderblock_{moe[0]}/Moe" if moe else ""
    dense = next((f"Encoder/encoderblock_{i}/Mlp" for i in sorted(blocks) if i not in moe), None)
    hidden = size(f"{dense}/Dense_0/kernel", 2)[1] if dense else size(f"{first}/Mlp/Dense_0/kernel", 3)[2]
    heads, split = _heads(arrays, num_heads, width)
    positions = "Encoder/posembed_input/pos_embedding"
    return Shape(
        patch=(height, width_px),
        channels=channels,
        width=width,
        depth=len(blocks),
        num_heads=heads,
        split_heads=split,
        hidden=hidden,
        moe_layers=tuple(moe),
        num_experts=size(f"{first}/Mlp/Dense_0/kernel", 3)[0] if moe else 0,
        slots=size(f"{first}/Router/mu", 3)[2] if f"{first}/Router/mu" in arrays else 0,
        positions=size(positions, 3)[1] if positions in arrays else 0,
        class_token="cls" in arrays,
        map_head=any(name.startswith("MapHead/") for name in arrays),
        qk_norm=any(name.endswith("/SelfAttention/query_ln/scale") for name in arrays),
        representation=size("pre_logits/kernel", 2)[1] if "pre_logits/kernel" in arrays else 0,
        num_classes=size("head/kernel", 2)[1] if "head/kernel" in arrays else 0,
        post_norm=_post_norm(arrays, len(blocks), tuple(moe)),
    )


def _post_norm(arrays: dict[str, np.ndarray], depth: int, moe: tuple[int, ...]) -> PostNorm:
    """Raises ValueError: LayerNorm_2 stands in some blocks of a kind only."""
    normed = [i for i in range(depth) if any(n.startswith(f"Encoder/encoderblock_{i}/LayerNorm_2/") for n in arrays)]
    for place in ("none", "all", "sparse", "dense"):  # of places that are the same here the first
        if normed == [i for i in range(depth) if has_post_norm(i, moe, place)]:
            return place
    raise ValueError(
        f"LayerNorm_2 stands in blocks {normed} of {depth}, whose sparse ones are {list(moe)}: it belongs into all, "
        "all sparse, all dense blocks or none; the file is damaged, or of another network"
    )


def _is_subtracted(shape: Shape, told: ExpertOutput | None, rule: MomentumRule | None) -> bool:
    """Raises ValueError: a sign that has to be said, or that the norms contradict."""
    if shape.moe_layers and shape.post_norm in ("sparse", "all"):
        if told is None or rule is None:
            raise ValueError(
                f"{'expert_output' if told is None else 'rule'}: sparse blocks have LayerNorm_2, so the network was "
                "trained with momentum by github.com/rachtsy/vmoe, and the rule and the sign lie in no tensor; say, "
                "for example, --expert_output subtracted and --rule HeavyBall --rule.mu 0.9 (its commit 3696965), or "
                "--rule Robust --rule.L 1 --rule.m 0.8 --rule.r 0.2 --rule.look_ahead after_norm (adb1a70)"
            )
    elif told == "subtracted":
        where = f"LayerNorm_2 stands in {shape.post_norm} blocks" if shape.post_norm != "none" else "no LayerNorm_2"
        raise ValueError(
            f"expert_output={told}: networks that subtract have LayerNorm_2 in their sparse blocks, and this file has "
            f"not ({where}): it was trained without momentum; leave expert_output out"
        )
    return told == "subtracted"


def _heads(arrays: dict[str, np.ndarray], num_heads: int | None, width: int) -> tuple[int, bool]:
    """Number of heads, and whether the kernels are split by them."""
    kernel = arrays.get("Encoder/encoderblock_0/SelfAttention/query/kernel")
    if kernel is not None and kernel.ndim == 3:
        if num_heads not in (None, kernel.shape[1]):
            raise ValueError(f"num_heads={num_heads}: the tensors have {kernel.shape[1]}; leave it out")
        num_heads, split = kernel.shape[1], True
    elif num_heads is None:
        raise ValueError(
            "num_heads: the shape of Encoder/encoderblock_0/SelfAttention/query/kernel does not say it; V-MoE-S has 8, "
            "B 12, L and H 16"
        )
    else:
        split = False
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads={num_heads} does not divide the width {width}")
    return num_heads, split


def _router(shape: Shape, router: Router | None) -> Router:
    if not shape.moe_layers:
        if router is not None:
            raise ValueError(f"router={type(router).__name__}: the file has no sparse blocks; leave it out")
        return TopKRouter()
    if shape.slots:
        if router is not None and not isinstance(router, SoftRouter):
            raise ValueError(f"router={type(router).__name__}: the file's routers are soft; leave it out")
        if router is not None and router.slots_per_expert not in (1, shape.slots):
            raise ValueError(
                f"router.slots_per_expert={router.slots_per_expert}: the file has {shape.slots}; leave it out"
            )
        settings = {**to_spec(router or SoftRouter())["init_args"], "slots_per_expert": shape.slots}
        return SoftRouter(**settings)
    if router is None:
        raise ValueError(
            "router: how many experts a token takes, capacity and groups lie in no tensor; say, for example, "
            "--router TopKRouter --router.top_k 2 (the published V-MoE models take 2)"
        )
    if not isinstance(router, LinearGate):
        raise ValueError(f"router={type(router).__name__}: the file's routers are linear gates; use TopKRouter")
    return router


def _image_sizes(
    shape: Shape,
    image_size: int | tuple[int, int] | None,
    native_size: Sides | None,
    pos_embed: str | None,
) -> tuple[Sides, Sides]:
    """The size that the positions are for, and the one that is wanted."""
    asked = (image_size, image_size) if isinstance(image_size, int) else image_size and cast(Sides, tuple(image_size))
    native = native_size and cast(Sides, tuple(native_size))
    for name, size in (("image_size", asked), ("native_size", native)):
        if size and any(side % patch or side < patch for side, patch in zip(size, shape.patch, strict=True)):
            raise ValueError(f"{name}={list(size)} is not a multiple of the patch size {list(shape.patch)}")
    if not shape.positions:
        if pos_embed is None:
            raise ValueError("pos_embed: the file has no learned positions; say sincos2d or none")
        if asked is None:
            raise ValueError(
                "image_size: without learned positions the file does not say it; the published size is 224"
            )
        return asked, asked
    if pos_embed is not None:
        raise ValueError(f"pos_embed={pos_embed}: the file has learned positions; leave it out")
    patches = shape.positions - shape.class_token
    if native is None:
        side = math.isqrt(patches)
        native = (side * shape.patch[0], side * shape.patch[1])
    if math.prod(side // patch for side, patch in zip(native, shape.patch, strict=True)) != patches:
        raise ValueError(
            f"native_size={native_size}: the file has positions for {patches} patches of {list(shape.patch)} pixels; "
            "give the height and width the network was trained with (or is the class token, cls, missing?)"
        )
    return native, asked or native


def _check(arrays: dict[str, np.ndarray], expected: dict[str, tuple[int, ...]]) -> None:
    """Every name and shape, or all that differ."""
    shared = sorted(arrays.keys() & expected.keys())
    shapes = [f"{n} {arrays[n].shape} for {expected[n]}" for n in shared if arrays[n].shape != expected[n]]
    faults = {
        "missing": sorted(expected.keys() - arrays.keys()),
        "unknown": sorted(arrays.keys() - expected.keys()),
        "misshapen": shapes,
    }
    told = [f"{len(names)} {fault}: {some(names, 20)}" for fault, names in faults.items() if names]
    if told:
        raise ValueError(f"the tensors do not fit a V-MoE of {len(expected)} tensors; {'; '.join(told)}")


def _ratio(shape: Shape) -> float:
    """F / D such that int(D * ratio) is F again."""
    ratio = shape.hidden / shape.width
    return ratio if int(shape.width * ratio) == shape.hidden else (shape.hidden + 0.5) / shape.width


def describe_import(net: MomentumVisionTransformer) -> dict[str, Any]:
    """What was read off, for people."""
    sparse, embed = [block.mlp for block in net.sparse_blocks], net.patch_embed
    heads = net.function_settings()["num_heads"]
    return {
        "blocks": f"{len(net.blocks)} of width {net.embed_dim}, {heads} heads",
        "experts": f"{sparse[0].experts.fc1.weight.shape[0]} in blocks {list(net.moe_layers)}" if sparse else "none",
        "image": f"{embed.img_size[0]} x {embed.img_size[1]} pixels, patches {embed.patch_size}",
        "head": f"{net.num_classes} classes from {net.global_pool}" if net.num_classes else "none",
        "norm3": f"behind the MLP's residual of {net.post_norm} blocks" if net.post_norm != "none" else "none",
    }


def doubts(net: MomentumVisionTransformer, expert_output: ExpertOutput | None) -> str | None:
    """What to know of a sign that no known code writes so, and before momentum is trained into weights that were
    trained without."""
    if expert_output == "added" and net.post_norm in ("sparse", "all"):
        return (
            "expert_output=added: LayerNorm_2 in sparse blocks is known of github.com/rachtsy/vmoe only, which "
            "subtracts; with the wrong sign every logit is wrong, so say subtracted unless this network adds"
        )
    if isinstance(net.rule, Residual) or net.post_norm in ("sparse", "all") or not net.moe_layers:
        return None
    return (
        f"rule={type(net.rule).__name__}: these weights were trained without momentum, so the network is another one "
        "until it is fine-tuned. The experts' output is added here and no norm comes in; the authors' fork "
        "(github.com/rachtsy/vmoe) subtracts it and puts a fresh norm behind every block when it fine-tunes so"
    )
