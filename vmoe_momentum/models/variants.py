"""Registered networks: `timm.create_model("vmoe_small_patch32_224", rule="HeavyBall")`.

"small" is V-MoE's S (width 512, 8 blocks), not timm's ViT-S. To add a size: one function here.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ..moe import Router
from ..momentum import MomentumRule
from .settings import from_spec, to_spec
from .vit import MomentumVisionTransformer


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


default_cfgs = generate_default_cfgs(
    {
        "vmoe_tiny_patch4_16.untrained": _cfg(16),
        "vmoe_small_patch32_224.untrained": _cfg(),
        "vmoe_small_patch16_224.untrained": _cfg(),
        "vmoe_base_patch16_224.untrained": _cfg(),
    }
)


def _create(variant: str, pretrained: bool, size: dict[str, Any], given: dict[str, Any]) -> MomentumVisionTransformer:
    settings = {"norm_layer": "layernorm", "act_layer": "gelu_tanh", **size, **given}  # layernorm: timm's, eps 1e-6
    for name, base in (("rule", MomentumRule), ("router", Router)):
        if name in settings:  # timm records JSON only
            settings[name] = to_spec(from_spec(settings[name], base, name))
    settings.setdefault("representation_size", settings["embed_dim"])
    feature_cfg = {"out_indices": settings.pop("out_indices", 3), "feature_cls": "getter"}
    return build_model_with_cfg(MomentumVisionTransformer, variant, pretrained, feature_cfg=feature_cfg, **settings)


@register_model
def vmoe_tiny_patch4_16(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """For 16-pixel images; ours: width 64, 8 blocks, MLP 128, 4 experts in every odd block, K 2, no tanh layer."""
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 8, "num_heads": 4, "mlp_ratio": 2.0}
    sparse = {"moe_layers": "every2", "num_experts": 4, "representation_size": 0}
    return _create("vmoe_tiny_patch4_16", pretrained, {**shape, **sparse}, kwargs)


@register_model
def vmoe_small_patch32_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-S/32, last 2: width 512, 8 blocks, MLP 2048, 8 heads, 8 experts in blocks 5 and 7, K 2."""
    size = {"patch_size": 32, "embed_dim": 512, "depth": 8, "num_heads": 8, "moe_layers": "last2", "num_experts": 8}
    return _create("vmoe_small_patch32_224", pretrained, size, kwargs)


@register_model
def vmoe_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """S/32's network on patches of 16; ours, not in the paper."""
    size = {"patch_size": 16, "embed_dim": 512, "depth": 8, "num_heads": 8, "moe_layers": "last2", "num_experts": 8}
    return _create("vmoe_small_patch16_224", pretrained, size, kwargs)


@register_model
def vmoe_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
    """V-MoE-B/16, every 2: width 768, 12 blocks, MLP 3072, 12 heads, 8 experts in every odd block, K 2."""
    size = {"patch_size": 16, "embed_dim": 768, "depth": 12, "num_heads": 12, "moe_layers": "every2", "num_experts": 8}
    return _create("vmoe_base_patch16_224", pretrained, size, kwargs)
