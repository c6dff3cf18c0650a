"""Which flax arrays make up which of our tensors.

D width, F hidden, E experts, P slots, H heads of width Dh, K classes. Flax kernels are (in, out), ours [out, in]; its
query, key and value are separate, (D, H, Dh); its patch kernel is (height, width, channel, D).

The fork of the authors of MomentumSMoE (github.com/rachtsy/vmoe) has a LayerNorm_2 in some blocks, our norm3, and in
sparse blocks subtracts what the experts say: their last layer is negated here, which is the same function.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .placement import PostNorm, has_post_norm


class Shape(NamedTuple):
    """All that the tensors of a V-MoE say about it."""

    patch: tuple[int, int]
    channels: int
    width: int
    depth: int
    num_heads: int
    split_heads: bool  # attention kernels are (D, H, Dh), not (D, D)
    hidden: int
    moe_layers: tuple[int, ...]
    num_experts: int
    slots: int  # of a soft router's expert; 0 for a linear gate
    positions: int  # rows of the learned position embedding; 0 for none
    class_token: bool
    map_head: bool
    qk_norm: bool
    representation: int  # 0 for none
    num_classes: int  # 0 for no head
    post_norm: PostNorm = "none"
    subtracted: bool = False  # experts' output; in no tensor


class Source(NamedTuple):
    arrays: dict[str, tuple[int, ...]]  # flax names and shapes
    build: Callable[..., np.ndarray]  # our tensor from them, in that order


def layout(shape: Shape) -> dict[str, Source]:
    """Our state-dict key -> where it comes from. Every flax array is used once."""
    width, found = shape.width, {}
    found["patch_embed.proj.weight"] = Source(
        {"embedding/kernel": (*shape.patch, shape.channels, width)}, lambda kernel: kernel.transpose(3, 2, 0, 1)
    )
    found["patch_embed.proj.bias"] = _same("embedding/bias", width)
    if shape.class_token:
        found["cls_token"] = _same("cls", 1, 1, width)
    if shape.positions:
        found["pos_embed"] = _same("Encoder/posembed_input/pos_embedding", 1, shape.positions, width)
    for index in range(shape.depth):
        found |= _block(shape, index)
    found |= _norm("norm", "Encoder/encoder_norm", width)
    if shape.map_head:
        found |= _map_head(shape)
    if shape.representation:
        found |= _dense("pre_logits.fc", "pre_logits", width, shape.representation)
    if shape.num_classes:
        found |= _dense("head", "head", shape.representation or width, shape.num_classes)
    return found


def _same(name: str, *size: int) -> Source:
    return Source({name: size}, lambda array: array)


def _negated(source: Source) -> Source:
    return Source(source.arrays, lambda array: -source.build(array))


def _norm(ours: str, theirs: str, width: int) -> dict[str, Source]:
    return {f"{ours}.weight": _same(f"{theirs}/scale", width), f"{ours}.bias": _same(f"{theirs}/bias", width)}


def _dense(ours: str, theirs: str, inputs: int, outputs: int, *stack: int) -> dict[str, Source]:
    """stack: (E,) for the experts' layers."""
    kernel = Source({f"{theirs}/kernel": (*stack, inputs, outputs)}, lambda array: array.swapaxes(-1, -2))
    return {f"{ours}.weight": kernel, f"{ours}.bias": _same(f"{theirs}/bias", *stack, outputs)}


def _block(shape: Shape, index: int) -> dict[str, Source]:
    ours, theirs = f"blocks.{index}", f"Encoder/encoderblock_{index}"
    found = _norm(f"{ours}.norm1", f"{theirs}/LayerNorm_0", shape.width)
    found |= _norm(f"{ours}.norm2", f"{theirs}/LayerNorm_1", shape.width)
    if has_post_norm(index, shape.moe_layers, shape.post_norm):
        found |= _norm(f"{ours}.norm3", f"{theirs}/LayerNorm_2", shape.width)
    attention = f"{theirs}/SelfAttention"
    found |= _heads(shape, f"{ours}.attn.qkv", attention, "query", "key", "value")
    found |= _output(shape, f"{ours}.attn.proj", attention)
    found |= _head_norms(shape, f"{ours}.attn", attention)
    if index not in shape.moe_layers:
        found |= _dense(f"{ours}.mlp.fc1", f"{theirs}/Mlp/Dense_0", shape.width, shape.hidden)
        return found | _dense(f"{ours}.mlp.fc2", f"{theirs}/Mlp/Dense_1", shape.hidden, shape.width)
    experts, router = shape.num_experts, f"{theirs}/Moe/Router"
    found |= _dense(f"{ours}.mlp.experts.fc1", f"{theirs}/Moe/Mlp/Dense_0", shape.width, shape.hidden, experts)
    last = _dense(f"{ours}.mlp.experts.fc2", f"{theirs}/Moe/Mlp/Dense_1", shape.hidden, shape.width, experts)
    found |= {key: _negated(source) for key, source in last.items()} if shape.subtracted else last
    if not shape.slots:
        gate = Source({f"{router}/dense/kernel": (shape.width, experts)}, lambda array: array.T)
        return found | {f"{ours}.mlp.router.weight": gate}
    mu = Source({f"{router}/mu": (shape.width, experts, shape.slots)}, lambda array: array.transpose(1, 2, 0))
    return found | {f"{ours}.mlp.router.mu": mu, f"{ours}.mlp.router.scale": _same(f"{router}/scale")}


def _heads(shape: Shape, ours: str, theirs: str, *names: str) -> dict[str, Source]:
    """Several projections into heads as one layer: [len(names) * D, D]."""
    width = shape.width
    heads = (shape.num_heads, width // shape.num_heads) if shape.split_heads else (width,)

    def kernel(*arrays: np.ndarray) -> np.ndarray:
        return np.concatenate([array.reshape(width, width).T for array in arrays])

    def bias(*arrays: np.ndarray) -> np.ndarray:
        return np.concatenate([array.reshape(width) for array in arrays])

    return {
        f"{ours}.weight": Source({f"{theirs}/{name}/kernel": (width, *heads) for name in names}, kernel),
        f"{ours}.bias": Source({f"{theirs}/{name}/bias": heads for name in names}, bias),
    }


def _output(shape: Shape, ours: str, theirs: str) -> dict[str, Source]:
    width = shape.width
    heads = (shape.num_heads, width // shape.num_heads) if shape.split_heads else (width,)
    kernel = Source({f"{theirs}/out/kernel": (*heads, width)}, lambda array: array.reshape(width, width).T)
    return {f"{ours}.weight": kernel, f"{ours}.bias": _same(f"{theirs}/out/bias", width)}


def _head_norms(shape: Shape, ours: str, theirs: str) -> dict[str, Source]:
    if not shape.qk_norm:
        return {}
    size = shape.width // shape.num_heads
    return {
        f"{ours}.q_norm.weight": _same(f"{theirs}/query_ln/scale", size),
        f"{ours}.k_norm.weight": _same(f"{theirs}/key_ln/scale", size),
    }


def _map_head(shape: Shape) -> dict[str, Source]:
    attention, width = "MapHead/MultiHeadDotProductAttention", shape.width
    return {
        "attn_pool.latent": _same("MapHead/probe", 1, 1, width),
        **_heads(shape, "attn_pool.q", attention, "query"),
        **_heads(shape, "attn_pool.kv", attention, "key", "value"),
        **_output(shape, "attn_pool.proj", attention),
        **_head_norms(shape, "attn_pool", attention),
        **_norm("attn_pool.norm", "MapHead/LayerNorm", width),
        **_dense("attn_pool.mlp.fc1", "MapHead/Mlp/Dense_0", width, shape.hidden),
        **_dense("attn_pool.mlp.fc2", "MapHead/Mlp/Dense_1", shape.hidden, width),
    }
