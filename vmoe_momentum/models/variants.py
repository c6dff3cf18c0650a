"""Registered networks: `timm.create_model("vmoe_small_patch32_224", rule="HeavyBall")`.

"small" in vmoe_small_* is V-MoE's S (width 512, 8 blocks), in soft_moe_small_* and deep_vmoe_small_* that of everybody
else (width 384, 12 blocks or more). To add a size: one function here.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ..moe import Router, SoftRouter
from ..momentum import MomentumRule
from .blocks import QkNormAttention
from .positions import fit_positions
from .settings import from_spec, to_spec
from .upcycling import UpcycledViT
from .vit import MomentumVisionTransformer

# V-MoE's sizes (arXiv:2106.05974, appendix; vmoe/configs/vmoe_paper/common.py at 942a78b)
SMALL = {"embed_dim": 512, "depth": 8, "num_heads": 8}
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}
LARGE = {"embed_dim": 1024, "depth": 24, "num_heads": 16}
HUGE = {"embed_dim": 1280, "depth": 32, "num_heads": 16}
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2.0, "representation_size": 0}


def _cfg(size: int = 224) -> dict[str, Any]:
    """No weights are published; pixels are scaled to [-1, 1] as in the reference."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, size, size),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
    }


NAMES = (
    "vmoe_custom", "vmoe_tiny_patch4_16", "deep_vmoe_tiny_patch4_16",
    "vmoe_small_patch32_224", "vmoe_small_every2_patch32_224", "vmoe_small_patch16_224",
    "vmoe_base_last2_patch32_224", "vmoe_base_every2_patch32_224",
    "vmoe_base_patch16_224", "vmoe_base_last2_patch16_224",
    "vmoe_large_last2_patch32_224", "vmoe_large_every2_patch32_224",
    "vmoe_large_last2_patch16_224", "vmoe_large_every2_patch16_224",
    "vmoe_huge_last5_patch14_224", "vmoe_huge_every2_patch14_224",
    "soft_moe_small_patch16_224", "soft_moe_small_patch14_224", "soft_moe_base_patch16_224",
    "soft_moe_large_patch16_224", "soft_moe_huge_patch14_224",
    "deep_vmoe_small_patch16_224", "vmoe_upcycled",
)  # fmt: skip

default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _cfg(16 if name.endswith("_16") or name == "vmoe_custom" else 224) for name in NAMES}
)


def _create(variant: str, pretrained: bool, given: dict[str, Any], **size: Any) -> MomentumVisionTransformer:
    # layernorm: timm's, eps 1e-6; the final norm stays before the pooling, as in the reference
    fixed = {"norm_layer": "layernorm", "act_layer": "gelu_tanh", "fc_norm": False, "attn_layer": QkNormAttention}
    settings = {**fixed, **size, **given}
    for name, base in (("rule", MomentumRule), ("router", Router)):
        if name in settings:  # timm records JSON only
            settings[name] = to_spec(from_spec(settings[name], base, name))
    # as in the reference, only the classifier that reads a class token has one
    settings.setdefault("class_token", settings.get("global_pool", "token") == "token")
    feature_cfg = {"out_indices": settings.pop("out_indices", 3), "feature_cls": "getter"}
    options = {"feature_cfg": feature_cfg, "pretrained_filter_fn": fit_positions}
    return build_model_with_cfg(MomentumVisionTransformer, variant, pretrained, **options, **settings)


@register_model
def vmoe_custom(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """Any shape: say it in the arguments (imported checkpoints do). Without them that of vmoe_tiny_patch4_16."""
    return _create("vmoe_custom", pretrained, kwargs, depth=8, moe_layers="every2", num_experts=4, **TINY)


@register_model
def vmoe_tiny_patch4_16(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """For 16-pixel images; ours: width 64, 8 blocks, MLP 128, 4 experts in every odd block, K 2, no tanh layer."""
    return _create("vmoe_tiny_patch4_16", pretrained, kwargs, depth=8, moe_layers="every2", num_experts=4, **TINY)


@register_model
def deep_vmoe_tiny_patch4_16(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """vmoe_tiny_patch4_16 with 56 blocks, 28 of them sparse: what does momentum do over many steps? Ours."""
    return _create("deep_vmoe_tiny_patch4_16", pretrained, kwargs, depth=56, moe_layers="every2", num_experts=4, **TINY)


def _vmoe(name: str, given: dict[str, Any], pretrained: bool, **size: Any) -> MomentumVisionTransformer:
    """K 2 and, where nothing else is said, the tanh layer before the head."""
    return _create(name, pretrained, given, **{"representation_size": size["embed_dim"], **size})


@register_model
def vmoe_small_patch32_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-S/32, last 2, as released for ImageNet: 8 experts in blocks 5 and 7."""
    return _vmoe(
        "vmoe_small_patch32_224", kwargs, pretrained, **SMALL, patch_size=32, moe_layers="last2", num_experts=8
    )


@register_model
def vmoe_small_every2_patch32_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-S/32, every 2: 32 experts in each odd block."""
    name = "vmoe_small_every2_patch32_224"
    return _vmoe(name, kwargs, pretrained, **SMALL, patch_size=32, moe_layers="every2", num_experts=32)


@register_model
def vmoe_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """S/32's network on patches of 16; ours, not in the paper."""
    return _vmoe(
        "vmoe_small_patch16_224", kwargs, pretrained, **SMALL, patch_size=16, moe_layers="last2", num_experts=8
    )


@register_model
def vmoe_base_last2_patch32_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-B/32, last 2: 32 experts in blocks 9 and 11."""
    name = "vmoe_base_last2_patch32_224"
    return _vmoe(name, kwargs, pretrained, **BASE, patch_size=32, moe_layers="last2", num_experts=32)


@register_model
def vmoe_base_every2_patch32_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-B/32, every 2: 32 experts in each odd block."""
    name = "vmoe_base_every2_patch32_224"
    return _vmoe(name, kwargs, pretrained, **BASE, patch_size=32, moe_layers="every2", num_experts=32)


@register_model
def vmoe_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-B/16, every 2, as released (ImageNet-21k): 8 experts in each odd block, no tanh layer."""
    size = {**BASE, "patch_size": 16, "representation_size": 0}
    return _vmoe("vmoe_base_patch16_224", kwargs, pretrained, **size, moe_layers="every2", num_experts=8)


@register_model
def vmoe_base_last2_patch16_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-B/16, last 2: 32 experts in blocks 9 and 11."""
    name = "vmoe_base_last2_patch16_224"
    return _vmoe(name, kwargs, pretrained, **BASE, patch_size=16, moe_layers="last2", num_experts=32)


@register_model
def vmoe_large_last2_patch32_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-L/32, last 2: 32 experts in blocks 21 and 23."""
    name = "vmoe_large_last2_patch32_224"
    return _vmoe(name, kwargs, pretrained, **LARGE, patch_size=32, moe_layers="last2", num_experts=32)


@register_model
def vmoe_large_every2_patch32_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-L/32, every 2: 32 experts in each odd block."""
    name = "vmoe_large_every2_patch32_224"
    return _vmoe(name, kwargs, pretrained, **LARGE, patch_size=32, moe_layers="every2", num_experts=32)


@register_model
def vmoe_large_last2_patch16_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-L/16, last 2: 32 experts in blocks 21 and 23."""
    name = "vmoe_large_last2_patch16_224"
    return _vmoe(name, kwargs, pretrained, **LARGE, patch_size=16, moe_layers="last2", num_experts=32)


@register_model
def vmoe_large_every2_patch16_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-L/16, every 2: 32 experts in each odd block."""
    name = "vmoe_large_every2_patch16_224"
    return _vmoe(name, kwargs, pretrained, **LARGE, patch_size=16, moe_layers="every2", num_experts=32)


@register_model
def vmoe_huge_last5_patch14_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-H/14, last 5: 32 experts in the last five odd blocks."""
    name = "vmoe_huge_last5_patch14_224"
    return _vmoe(name, kwargs, pretrained, **HUGE, patch_size=14, moe_layers="last5", num_experts=32)


@register_model
def vmoe_huge_every2_patch14_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-H/14, every 2: 32 experts in each odd block."""
    name = "vmoe_huge_every2_patch14_224"
    return _vmoe(name, kwargs, pretrained, **HUGE, patch_size=14, moe_layers="every2", num_experts=32)


def _soft_moe(name: str, given: dict[str, Any], pretrained: bool, last: int, **size: Any) -> MomentumVisionTransformer:
    """Soft MoE in the last half of the blocks, one slot an expert, queries and keys normalised, mean of the patches.

    Source: arXiv:2308.00951, table 1; vmoe/projects/soft_moe/configs at 942a78b.
    """
    sparse = {"moe_layers": list(range(size["depth"] - last, size["depth"])), "router": to_spec(SoftRouter())}
    return _create(name, pretrained, given, qk_norm=True, global_pool="avg", **sparse, **size)


@register_model
def soft_moe_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """Soft MoE S/16: width 384, 128 experts of one slot in the last 6 of 12 blocks."""
    size = {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 16, "num_experts": 128}
    return _soft_moe("soft_moe_small_patch16_224", kwargs, pretrained, last=6, **size)


@register_model
def soft_moe_small_patch14_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """Soft MoE S/14: width 384, 256 experts of one slot in the last 6 of 12 blocks."""
    size = {"embed_dim": 384, "depth": 12, "num_heads": 6, "patch_size": 14, "num_experts": 256}
    return _soft_moe("soft_moe_small_patch14_224", kwargs, pretrained, last=6, **size)


@register_model
def soft_moe_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """Soft MoE B/16: 128 experts of one slot in the last 6 of 12 blocks."""
    size = {**BASE, "patch_size": 16, "num_experts": 128}
    return _soft_moe("soft_moe_base_patch16_224", kwargs, pretrained, last=6, **size)


@register_model
def soft_moe_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """Soft MoE L/16: 128 experts of one slot in the last 12 of 24 blocks."""
    size = {**LARGE, "patch_size": 16, "num_experts": 128}
    return _soft_moe("soft_moe_large_patch16_224", kwargs, pretrained, last=12, **size)


@register_model
def soft_moe_huge_patch14_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """Soft MoE H/14: 256 experts of one slot in the last 16 of 32 blocks."""
    size = {**HUGE, "patch_size": 14, "num_experts": 256}
    return _soft_moe("soft_moe_huge_patch14_224", kwargs, pretrained, last=16, **size)


@register_model
def deep_vmoe_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """Width 384, 56 blocks, 8 experts in every odd one: 28 steps of momentum. Ours, for the question of depth."""
    size = {"embed_dim": 384, "depth": 56, "num_heads": 6, "patch_size": 16, "moe_layers": "every2", "num_experts": 8}
    return _create("deep_vmoe_small_patch16_224", pretrained, kwargs, **size)


@register_model
def vmoe_upcycled(pretrained: bool = False, **kwargs: Any) -> UpcycledViT:
    """A dense timm ViT (`backbone`) with experts: what `vmoe-momentum import timm` writes. See UpcycledViT."""
    known = kwargs.get("pretrained_cfg")
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    options = {"feature_cfg": feature_cfg, "pretrained_filter_fn": fit_positions}
    net = build_model_with_cfg(UpcycledViT.for_timm, "vmoe_upcycled", pretrained, **options, **kwargs)
    if known is None:  # normalisation and crop are the backbone's
        net.pretrained_cfg = net.default_cfg = net.backbone_cfg
    return net
