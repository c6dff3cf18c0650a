"""The published initialisation of V-MoE (flax defaults and google-research/vmoe, vmoe/nn/vit_moe.py at 942a78b)."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from timm.layers import AttentionPoolLatent, Mlp, lecun_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..moe import SparseMlp
from .blocks import DenseBlock, MomentumBlock
from .networks import Drawn


def init_vmoe(net: VisionTransformer) -> None:
    """Xavier for attention and MLPs, MLP biases N(0, 1e-6), LeCun for patches and representation, zero head.

    `net.share_expert_init`: all experts of a layer start equal, as in the published recipes (`split_rngs: False`);
    router noise and their tokens tell them apart. `net.initial_seed` alone decides what is drawn on a CPU, whole or
    (`training.materializing`) piece by piece; torch's generator stays where it was.
    """
    with seeded(cast(Drawn, net).initial_seed):
        for _, draw in initializers(net):
            draw()


def draw_seed() -> int:
    """For a network: a step of torch's generator, the same on every device."""
    return int(torch.randint(2**62, (), device="cpu"))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn on a CPU follows from the seed; the generator is put back."""
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)


def initializers(net: VisionTransformer) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
    """Every module with parameters of its own, in order, and what sets these parameters, and no others.

    Raises ValueError: one that has no way to begin anew, in an upcycled network.
    """
    blocks, share = cast(Iterable[DenseBlock | MomentumBlock], net.blocks), cast(Drawn, net).share_expert_init
    published = {**_of_ends(net), **{part: draw for block in blocks for part, draw in _of_block(block, share)}}
    for module in net.modules():
        if not module._parameters:
            continue
        draw = published.get(module) or getattr(module, "reset_parameters", None)
        if draw is None:
            raise ValueError(f"{type(module).__name__}: cannot be drawn anew (it has no reset_parameters)")
        yield module, torch.no_grad()(draw)


def _of_ends(net: VisionTransformer) -> dict[nn.Module, Callable[[], None]]:
    """What lies before and behind the blocks."""
    found: dict[nn.Module, Callable[[], None]] = {net: partial(_init_tokens, net)}
    found[net.patch_embed.proj] = partial(_init_lecun, net.patch_embed.proj)
    pool = net.attn_pool
    if isinstance(pool, AttentionPoolLatent):
        found[pool] = partial(_init_probe, pool)
        found |= {pool.kv: partial(_init_projections, pool.kv, 2)}
        ends = [layer for layer in (pool.q, pool.proj) if isinstance(layer, nn.Linear)]
        found |= {layer: partial(_init_projections, layer, 1) for layer in ends}
        found |= {layer: partial(_init_mlp, layer) for layer in (pool.mlp.fc1, pool.mlp.fc2)}
    if isinstance(pre_logits := cast(Drawn, net).pre_logits, nn.Sequential):
        layer = cast(nn.Linear, pre_logits.fc)
        found[layer] = partial(_init_lecun, layer)
    return {**found, net.head: partial(init_head, net.head)}


def _of_block(block: DenseBlock | MomentumBlock, share: bool) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
    # query, key and value are separate layers in the reference
    yield block.attn.qkv, partial(_init_projections, block.attn.qkv, 3)
    yield block.attn.proj, partial(_init_projections, block.attn.proj, 1)
    if isinstance(block.mlp, SparseMlp):
        for stacked in (block.mlp.experts.fc1, block.mlp.experts.fc2):
            yield stacked, partial(stacked.reset_parameters, share=share)
    else:
        dense = cast(Mlp, block.mlp)
        for layer in (dense.fc1, dense.fc2):
            yield layer, partial(_init_mlp, layer)


def _init_tokens(net: VisionTransformer) -> None:
    if net.pos_embed is not None:
        nn.init.normal_(net.pos_embed, std=0.02)
    for token in (net.cls_token, net.reg_token):
        if token is not None:
            nn.init.zeros_(token)


def _init_lecun(layer: nn.Linear | nn.Conv2d) -> None:
    lecun_normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _init_projections(layer: nn.Linear, parts: int) -> None:
    """Xavier for each of so many layers in one."""
    for weight in layer.weight.chunk(parts):
        nn.init.xavier_uniform_(weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _init_mlp(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.normal_(layer.bias, std=1e-6)


def _init_probe(pool: AttentionPoolLatent) -> None:
    """Xavier as of one row of D."""
    bound = math.sqrt(6 / (1 + pool.latent.shape[-1]))
    nn.init.uniform_(pool.latent, -bound, bound)
    if pool.pos_embed is not None:
        nn.init.trunc_normal_(pool.pos_embed, std=pool.pos_embed.shape[1] ** -0.5)  # timm's


@torch.no_grad()
def init_head(head: nn.Module) -> None:
    """Zero kernel and bias -log(classes): every class starts at odds 1 : classes - 1, as sigmoid losses want."""
    if isinstance(head, nn.Linear):
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, -math.log(head.out_features))
