"""The published initialisation of V-MoE (flax defaults and google-research/vmoe, vmoe/nn/vit_moe.py at 942a78b)."""

import math

import torch
from timm.layers import AttentionPoolLatent, lecun_normal_
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..moe import SparseMlp


@torch.no_grad()
def init_vmoe(net: VisionTransformer) -> None:
    """Xavier for attention and MLPs, MLP biases N(0, 1e-6), LeCun for patches and representation, zero head.

    `net.share_expert_init`: all experts of a layer start equal, as in the published recipes (`split_rngs: False`);
    router noise and their tokens tell them apart.
    """
    lecun_normal_(net.patch_embed.proj.weight)
    if net.patch_embed.proj.bias is not None:
        nn.init.zeros_(net.patch_embed.proj.bias)
    if net.pos_embed is not None:
        nn.init.normal_(net.pos_embed, std=0.02)
    if net.cls_token is not None:
        nn.init.zeros_(net.cls_token)
    if net.reg_token is not None:
        nn.init.zeros_(net.reg_token)
    if isinstance(net.attn_pool, AttentionPoolLatent):
        _init_map_head(net.attn_pool)
    for block in net.blocks:
        for weight in block.attn.qkv.weight.chunk(3):  # query, key and value are separate layers in the reference
            nn.init.xavier_uniform_(weight)
        nn.init.xavier_uniform_(block.attn.proj.weight)
        for layer in (block.attn.qkv, block.attn.proj):
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        if isinstance(block.mlp, SparseMlp):
            for layer in (block.mlp.experts.fc1, block.mlp.experts.fc2):
                layer.reset_parameters(share=net.share_expert_init)
        else:
            _init_mlp(block.mlp)
    if isinstance(net.pre_logits, nn.Sequential):
        lecun_normal_(net.pre_logits.fc.weight)
        nn.init.zeros_(net.pre_logits.fc.bias)
    init_head(net.head)


def _init_mlp(mlp: nn.Module) -> None:
    for layer in (mlp.fc1, mlp.fc2):
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.normal_(layer.bias, std=1e-6)


def _init_map_head(pool: AttentionPoolLatent) -> None:
    """Xavier for the probe (as one row of D), the projections and the MLP."""
    bound = math.sqrt(6 / (1 + pool.latent.shape[-1]))
    nn.init.uniform_(pool.latent, -bound, bound)
    for weight in (pool.q.weight, *pool.kv.weight.chunk(2), pool.proj.weight):
        nn.init.xavier_uniform_(weight)
    for layer in (pool.q, pool.kv, pool.proj):
        nn.init.zeros_(layer.bias)
    _init_mlp(pool.mlp)


@torch.no_grad()
def init_head(head: nn.Module) -> None:
    """Zero kernel and bias -log(classes): every class starts at odds 1 : classes - 1, as sigmoid losses want."""
    if isinstance(head, nn.Linear):
        nn.init.zeros_(head.weight)
        nn.init.constant_(head.bias, -math.log(head.out_features))
