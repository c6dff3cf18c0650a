"""Registered networks: `timm.create_model("vmoe_small_patch32_224", rule="HeavyBall")`.

"small" in vmoe_small_* is V-MoE's S (width 512, 8 blocks), in soft_moe_small_* and deep_vmoe_small_* that of everybody
else (width 384, 12 blocks or more). To add a size: one line in SIZES.
"""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from ..moe import Router, SoftRouter
from ..momentum import MomentumRule
from ..specs import from_spec, to_spec
from .blocks import QkNormAttention
from .loading import fit_weights
from .upcycling import UpcycledViT
from .vit import MomentumVisionTransformer

# V-MoE (arXiv:2106.05974): sizes and placements as google-research/vmoe, vmoe/configs/vmoe_paper at 942a78b, has them.
# K 2; where nothing else is said a tanh layer before the head, as wide as the network.
S = {"embed_dim": 512, "depth": 8, "num_heads": 8, "representation_size": 512}
B = {"embed_dim": 768, "depth": 12, "num_heads": 12, "representation_size": 768}
L = {"embed_dim": 1024, "depth": 24, "num_heads": 16, "representation_size": 1024}
H = {"embed_dim": 1280, "depth": 32, "num_heads": 16, "representation_size": 1280}
TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 2.0}


def _vmoe(size: dict[str, Any], patch: int, moe_layers: str, num_experts: int, **more: Any) -> dict[str, Any]:
    return {**size, "patch_size": patch, "moe_layers": moe_layers, "num_experts": num_experts, **more}


def _soft(width: int, depth: int, heads: int, patch: int, num_experts: int) -> dict[str, Any]:
    """Soft MoE in the last half of the blocks, one slot an expert, queries and keys normalised, mean of the patches.

    Source: arXiv:2308.00951, and vmoe/projects/soft_moe/configs at 942a78b.
    """
    size = {"embed_dim": width, "depth": depth, "num_heads": heads, "patch_size": patch}
    sparse = {"moe_layers": list(range(depth // 2, depth)), "num_experts": num_experts, "router": to_spec(SoftRouter())}
    return {**size, **sparse, "qk_norm": True, "global_pool": "avg"}


SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "vmoe_custom": (
        "Any shape: say it in the arguments, as imported checkpoints do. Without them that of vmoe_tiny_patch4_16.",
        {**TINY, "depth": 8, "moe_layers": "every2", "num_experts": 4},
    ),
    "vmoe_tiny_patch4_16": (
        "For 16-pixel images; ours: width 64, 8 blocks, MLP 128, 4 experts in every odd block, K 2, no tanh layer.",
        {**TINY, "depth": 8, "moe_layers": "every2", "num_experts": 4},
    ),
    "vmoe_tiny_patch7_28": (
        "For 28-pixel images, such as Fashion-MNIST: vmoe_tiny_patch4_16's blocks on 16 patches of 7 pixels. Ours.",
        {**TINY, "img_size": 28, "patch_size": 7, "depth": 8, "moe_layers": "every2", "num_experts": 4},
    ),
    "deep_vmoe_tiny_patch4_16": (
        "vmoe_tiny_patch4_16 with 56 blocks, 28 of them sparse: what does momentum do over many steps? Ours.",
        {**TINY, "depth": 56, "moe_layers": "every2", "num_experts": 4},
    ),
    "vmoe_small_patch32_224": ("V-MoE-S/32, last 2, as released for ImageNet.", _vmoe(S, 32, "last2", 8)),
    "vmoe_small_every2_patch32_224": ("V-MoE-S/32, every 2.", _vmoe(S, 32, "every2", 32)),
    "vmoe_small_every2_experts8_patch32_224": (
        "V-MoE-S/32, every 2, of 8 experts: the network of MomentumSMoE's vision code. Its norms: post_norm.",
        _vmoe(S, 32, "every2", 8),
    ),
    "vmoe_small_every2_experts8_patch4_28": (
        "The same on 49 patches of 28-pixel images, such as Fashion-MNIST: S/32's shapes without its pixels. Ours.",
        _vmoe(S, 4, "every2", 8, img_size=28),
    ),
    "vmoe_small_patch16_224": ("S/32's network on patches of 16; ours, not in the paper.", _vmoe(S, 16, "last2", 8)),
    "vmoe_base_last2_patch32_224": ("V-MoE-B/32, last 2.", _vmoe(B, 32, "last2", 32)),
    "vmoe_base_every2_patch32_224": ("V-MoE-B/32, every 2.", _vmoe(B, 32, "every2", 32)),
    "vmoe_base_every2_experts8_patch32_224": (
        "V-MoE-B/32, every 2, of 8 experts, as in MomentumSMoE's vision code.",
        _vmoe(B, 32, "every2", 8),
    ),
    "vmoe_base_patch16_224": (
        "V-MoE-B/16, every 2, as released (ImageNet-21k): no tanh layer.",
        _vmoe(B, 16, "every2", 8, representation_size=0),
    ),
    "vmoe_base_patch16_384": (
        "The same for 384 pixels, as MomentumSMoE's vision code fine-tunes it.",
        _vmoe(B, 16, "every2", 8, representation_size=0, img_size=384),
    ),
    "vmoe_base_last2_patch16_224": ("V-MoE-B/16, last 2.", _vmoe(B, 16, "last2", 32)),
    "vmoe_large_last2_patch32_224": ("V-MoE-L/32, last 2.", _vmoe(L, 32, "last2", 32)),
    "vmoe_large_every2_patch32_224": ("V-MoE-L/32, every 2.", _vmoe(L, 32, "every2", 32)),
    "vmoe_large_last2_patch16_224": ("V-MoE-L/16, last 2.", _vmoe(L, 16, "last2", 32)),
    "vmoe_large_every2_patch16_224": ("V-MoE-L/16, every 2.", _vmoe(L, 16, "every2", 32)),
    "vmoe_huge_last5_patch14_224": ("V-MoE-H/14, last 5.", _vmoe(H, 14, "last5", 32)),
    "vmoe_huge_every2_patch14_224": ("V-MoE-H/14, every 2.", _vmoe(H, 14, "every2", 32)),
    "soft_moe_small_patch16_224": ("Soft MoE S/16.", _soft(384, 12, 6, 16, 128)),
    "soft_moe_small_patch14_224": ("Soft MoE S/14.", _soft(384, 12, 6, 14, 256)),
    "soft_moe_base_patch16_224": ("Soft MoE B/16.", _soft(768, 12, 12, 16, 128)),
    "soft_moe_large_patch16_224": ("Soft MoE L/16.", _soft(1024, 24, 16, 16, 128)),
    "soft_moe_huge_patch14_224": ("Soft MoE H/14.", _soft(1280, 32, 16, 14, 256)),
    "deep_vmoe_small_patch16_224": (
        "Width 384, 56 blocks, 8 experts in every odd one: 28 steps of momentum. Ours, for the question of depth.",
        {"embed_dim": 384, "depth": 56, "num_heads": 6, "patch_size": 16, "moe_layers": "every2", "num_experts": 8},
    ),
}
NAMES = (*SIZES, "vmoe_upcycled")


def _cfg(size: int) -> dict[str, Any]:
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
    {f"{name}.untrained": _cfg(SIZES[name][1].get("img_size", 224) if name in SIZES else 224) for name in NAMES}
)


def _create(variant: str, pretrained: bool, size: dict[str, Any], given: dict[str, Any]) -> MomentumVisionTransformer:
    # layernorm: timm's, eps 1e-6; the final norm stays before the pooling, as in the reference
    fixed = {"norm_layer": "layernorm", "act_layer": "gelu_tanh", "fc_norm": False, "attn_layer": QkNormAttention}
    settings = {**fixed, **size, **given}
    for name, base in (("rule", MomentumRule), ("router", Router)):
        if name in settings:  # timm records JSON only
            settings[name] = to_spec(from_spec(settings[name], base, name))
    # as in the reference, only the classifier that reads a class token has one
    settings.setdefault("class_token", settings.get("global_pool", "token") == "token")
    options: dict[str, Any] = {"feature_cfg": _features(settings), "pretrained_filter_fn": fit_weights}
    return build_model_with_cfg(MomentumVisionTransformer, variant, pretrained, **options, **settings)


def _features(settings: dict[str, Any]) -> dict[str, Any]:
    """timm's features_only, through forward_intermediates: its other ways take what a block returns for tokens."""
    way = settings.pop("feature_cls", "getter")
    if way != "getter":
        raise ValueError(f"feature_cls={way}: blocks here return tokens and momentum; leave it out (getter)")
    return {"out_indices": settings.pop("out_indices", 3), "feature_cls": "getter"}


def _register(name: str, docstring: str, size: dict[str, Any]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> MomentumVisionTransformer:
        return _create(name, pretrained, size, kwargs)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = docstring
    register_model(entrypoint)


for _name, _line in SIZES.items():
    _register(_name, *_line)


@register_model
def vmoe_upcycled(pretrained: bool = False, **kwargs: Any) -> UpcycledViT:
    """A dense timm ViT (`backbone`) with experts: what `vmoe-momentum import timm` writes. See UpcycledViT."""
    known = kwargs.get("pretrained_cfg")
    options: dict[str, Any] = {"feature_cfg": _features(kwargs), "pretrained_filter_fn": fit_weights}
    net = build_model_with_cfg(UpcycledViT.for_timm, "vmoe_upcycled", pretrained, **options, **kwargs)
    if known is None:  # normalisation and crop are the backbone's
        net.pretrained_cfg = net.default_cfg = net.backbone_cfg
    return net
