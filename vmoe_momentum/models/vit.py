"""timm's vision transformer with momentum through its sparse blocks.

B images, N tokens, D width, K classes. One loop, `_run_blocks`, threads the carry; everything goes through it.
"""

import math
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from typing import Any, Literal, cast

import torch
from timm.layers import AttentionPoolLatent, Mlp, get_device_dtype
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..moe import Router
from ..momentum import Carry, MomentumRule
from ..ranges import COUNT_OR_NONE, MOMENTUM, SIDE, Range, in_range
from ..specs import from_spec, to_spec
from .blocks import DenseBlock, MomentumBlock, QkNormAttention, qk_norms
from .groups import fill_group
from .initialization import draw_seed, init_head, init_vmoe
from .placement import PostNorm, block_settings, check_post_norm, moe_indices, momentum_steps
from .positions import AutocastStream, SinCos2d

BLOCKS, WIDTH = Range(0, 10_000, whole=True), Range(0, 2**16, whole=True)
RATIO = Range(0, 1024, above=True).or_(None)
SPARSE = {  # ranges of the settings that are about sparse blocks
    "moe_layers": BLOCKS.or_(None, str), "expert_drop_rate": MOMENTUM.or_(None),
    "num_experts": replace(WIDTH, low=1).or_(None).because("V-MoE uses 8 experts in a sparse layer"),
    "momentum_last": replace(BLOCKS, low=1).or_(None), "momentum_restart": replace(BLOCKS, low=1).or_(None),
}  # fmt: skip
NUMBERS = {  # and of a whole network
    **SPARSE, "drop_rate": MOMENTUM.or_(None), "drop_path_rate": MOMENTUM.or_(None), "image_size": SIDE.or_(None),
    "num_classes": COUNT_OR_NONE.or_(None).because("0 is a network without a head"),
}  # fmt: skip


@in_range("", **SPARSE, representation_size=WIDTH, depth=BLOCKS, expert_ratio=RATIO)
class MomentumVisionTransformer(VisionTransformer):
    """V-MoE (arXiv:2106.05974) with a momentum rule across its MoE blocks (arXiv:2410.14574).

    Without MoE layers it equals timm's VisionTransformer, bitwise, and shares its state dict.
    """

    pre_logits: nn.Module

    def __init__(
        self,
        *,
        rule: MomentumRule | dict[str, Any] | str = "Residual",
        router: Router | dict[str, Any] | str = "TopKRouter",
        moe_layers: str | list[int] = "last2",
        num_experts: int = 8,
        expert_ratio: float | None = None,
        representation_size: int = 0,
        expert_drop_rate: float | None = None,
        share_expert_init: bool = True,
        momentum_last: int | None = None,
        momentum_restart: int | None = None,
        post_norm: PostNorm = "none",
        pos_embed: Literal["learn", "sincos2d", "none"] = "learn",
        depth: int = 12,
        **timm_args: Any,
    ) -> None:
        """See `create_model` for the settings; timm_args are those of timm's VisionTransformer."""
        if pos_embed not in ("learn", "sincos2d", "none"):
            raise ValueError(f"pos_embed={pos_embed}: use learn, sincos2d or none")
        _check_unsupported(moe_layers, timm_args)
        check_patches(timm_args.get("img_size", 224), timm_args.get("patch_size", 16))
        check_post_norm(post_norm)
        rule, router = from_spec(rule, MomentumRule, "rule"), from_spec(router, Router, "router")
        indices = moe_indices(moe_layers, depth)
        steps = momentum_steps(len(indices), momentum_last, momentum_restart)
        width = timm_args.get("embed_dim", 768)
        if expert_ratio is not None and int(width * expert_ratio) < 1:
            raise ValueError(
                f"expert_ratio={expert_ratio}: leaves an expert no hidden unit; use at least {1 / width:g}"
            )

        def block_fn(**block: Any) -> nn.Module:
            index = block["depth"]
            shared = {"rule": rule, **block_settings(index, indices, steps, post_norm)}
            if index not in indices:
                return DenseBlock(**block, **shared)
            sparse: dict[str, Any] = {"num_experts": num_experts, "router": router, "expert_drop": expert_drop_rate}
            if expert_ratio is not None:
                block["mlp_ratio"] = expert_ratio
            return MomentumBlock(**block, **sparse, **shared)

        seed = draw_seed()  # before anything that draws on some devices only
        table = "learn" if pos_embed == "learn" else "none"
        make: Any = block_fn  # timm's hint asks for a class; it only calls it
        super().__init__(depth=depth, block_fn=make, weight_init="skip", pos_embed=table, **timm_args)
        self.positions: str = pos_embed
        self.sincos = SinCos2d()
        self._keep_settings(rule, router, post_norm, seed, share_expert_init)
        pool, normed = self.attn_pool, timm_args.get("attn_layer") is QkNormAttention and timm_args.get("qk_norm")
        if normed and isinstance(pool, AttentionPoolLatent):  # timm's would go without
            pool.q_norm, pool.k_norm = qk_norms(pool.head_dim, pool.kv.weight)
        if representation_size:
            dense = nn.Linear(self.embed_dim, representation_size, **get_device_dtype(self))
            self.pre_logits = nn.Sequential(OrderedDict(fc=dense, act=nn.Tanh()))
            self.head_hidden_size = representation_size
            self.reset_classifier(self.num_classes)
        init_vmoe(self)

    def _keep_settings(
        self, rule: MomentumRule, router: Router, post_norm: PostNorm, seed: int, share_expert_init: bool = True
    ) -> None:
        self.rule, self.router_spec, self.share_expert_init = rule, to_spec(router), share_expert_init
        self.initial_seed = seed
        self.post_norm: str = post_norm
        self.pre_logits = nn.Identity()
        self.stream = AutocastStream()

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the sparse blocks."""
        return tuple(index for index, block in enumerate(self.blocks) if isinstance(block, MomentumBlock))

    @property
    def sparse_blocks(self) -> tuple[MomentumBlock, ...]:
        """In order; their indices are `moe_layers`."""
        return tuple(block for block in self.blocks if isinstance(block, MomentumBlock))

    def function_settings(self) -> dict[str, Any]:
        """What changes the function but lies in no tensor, as JSON: it travels with every checkpoint."""
        return {
            "rule": to_spec(self.rule),
            "router": self.router_spec,
            "moe_layers": list(self.moe_layers),
            "momentum_steps": [block.step for block in self.sparse_blocks],
            "post_norm": self.post_norm,
            "num_heads": cast(DenseBlock, self.blocks[0]).attn.num_heads if len(self.blocks) else 0,
            "global_pool": self.global_pool,
            "pos_embed": self.positions,
            "patch_size": list(self.patch_embed.patch_size),
        }

    def _run_blocks(
        self,
        images: Tensor,
        take: tuple[int, ...] = (),
        num_blocks: int | None = None,
        gates: bool = False,
        **attention: Any,
    ) -> tuple[Tensor, Carry, list[Tensor]]:
        """images: [B, 3, H, W] -> tokens before the final norm [B, N, D], the carry, tokens after the blocks `take`.

        gates: whether the carry gathers them.
        """
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(images))))
        together = 1 if self.training else self.images_together(x.shape[1])
        x = fill_group(x, together) if together > 1 else x
        x = self.stream(x) if self.moe_layers else x
        carry, taken = Carry(self.rule.init(x), x.new_zeros(()), () if gates else None), []
        for index, block in enumerate(self.blocks[:num_blocks]):
            # timm may be set to the reentrant kind, which does not see the tensors in the carry: wrong gradients
            recomputed = partial(checkpoint, block, use_reentrant=False)
            run = recomputed if self.grad_checkpointing and torch.is_grad_enabled() else block
            x, carry = run(x, carry, **attention)
            if index in take:
                taken.append(x)
        if together > 1:
            x, taken = x[: images.shape[0]], [y[: images.shape[0]] for y in taken]
        return x, carry, taken

    def images_together(self, num_tokens: int) -> int:
        """In this mode, the fewest images of `num_tokens` tokens each that make whole routing groups."""
        layers = [block.mlp for block in self.sparse_blocks]
        return math.lcm(*(mlp.router.images_together(num_tokens, mlp.experts.fc1.weight.shape[0]) for mlp in layers))

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches [B, N, D] (or [B, h, w, D]) -> tokens with positions, class token first."""
        if self.positions == "sincos2d":  # the class token has none
            x = self.sincos(x, *self.patch_embed.grid_size)
        return super()._pos_embed(x)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, 3, H, W] -> [B, N, D]."""
        return self.norm(self._run_blocks(x, attn_mask=attn_mask, is_causal=is_causal)[0])

    def forward_with_aux(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> logits [B, K] and the auxiliary loss [], summed over the MoE blocks."""
        tokens, carry, _ = self._run_blocks(x)
        return self.forward_head(self.norm(tokens)), carry.aux_loss

    def forward_with_gates(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The same, and each MoE block's gates without noise [B, N, E]."""
        tokens, carry, _ = self._run_blocks(x, gates=True)
        assert carry.gates is not None  # asked for
        return self.forward_head(self.norm(tokens)), carry.aux_loss, tuple(g[: x.shape[0]] for g in carry.gates)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """[B, N, D] -> logits [B, K], or the head's input (after the tanh layer of `representation_size`)."""
        x = self.head_drop(self.pre_logits(self.fc_norm(self.pool(x))))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """timm's contract: see VisionTransformer.forward_intermediates."""
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt}; use NCHW or NLC")
        take, last = feature_take_indices(len(self.blocks), indices)
        batch, _, height, width = x.shape
        x, _, taken = self._run_blocks(
            x, tuple(take), last + 1 if stop_early else None, attn_mask=attn_mask, is_causal=is_causal
        )
        taken = [self.norm(y) for y in taken] if norm else taken
        with_prefix = return_prefix_tokens and self.num_prefix_tokens
        prefix = [y[:, : self.num_prefix_tokens] for y in taken] if with_prefix else None
        taken = [y[:, self.num_prefix_tokens :] for y in taken]
        if output_fmt == "NCHW":
            rows, columns = self.patch_embed.dynamic_feat_size((height, width))
            taken = [y.reshape(batch, rows, columns, -1).permute(0, 3, 1, 2).contiguous() for y in taken]
        if output_dict:
            result = {"image_intermediates": taken}
            if prefix is not None:
                result["image_intermediates_prefix"] = prefix
            return result if intermediates_only else {**result, "image_features": self.norm(x)}
        found = taken if prefix is None else list(zip(taken, prefix, strict=True))
        return found if intermediates_only else (self.norm(x), found)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head, initialised as V-MoE's, for num_classes (0: none)."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes > 0:
            self.head = nn.Linear(self.head_hidden_size, num_classes, **get_device_dtype(self))
            self.head.train(self.training)
            init_head(self.head)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """V-MoE's initialisation once more, the same draws: after `to_empty`, say. timm's modes are not for it."""
        if mode not in ("", "skip", "reset"):
            raise ValueError(f"weight_init={mode}: V-MoE networks start as published; leave it out")
        init_vmoe(self)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """torch's; a network on the meta device takes the tensors themselves, a mapped file's without reading it."""
        return super().load_state_dict(state_dict, strict, assign or any(p.is_meta for p in self.parameters()))

    @torch.jit.ignore
    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """timm calls this for .npz files, whose names are another network's."""
        raise ValueError(
            f"checkpoint_path={checkpoint_path}: bring it in with `vmoe-momentum import flax --source ...`"
        )

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """timm's; a pruned head takes the tanh layer along."""
        kept = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if prune_head:
            self.pre_logits, self.head_hidden_size = nn.Identity(), self.embed_dim
        return kept

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """timm's, and what routers want spared."""
        spared = super().no_weight_decay()
        for name, module in self.named_modules():
            if isinstance(module, Router):
                spared |= {f"{name}.{own}" for own in module.no_weight_decay()}
        return spared

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """timm's; positions are resampled to the new grid. Raises ValueError: not a multiple of the patch."""
        check_patches(img_size or self.patch_embed.img_size, patch_size or self.patch_embed.patch_size)
        super().set_input_size(img_size, patch_size)


def _check_unsupported(moe_layers: str | list[int], timm_args: dict[str, Any]) -> None:
    """Settings of timm's blocks that experts do not have are refused rather than ignored."""
    defaults: dict[str, tuple[object, ...]] = {"weight_init": ("", "skip"), "fix_init": (False,)}
    if moe_layers not in ("none", []):
        defaults |= {"scale_mlp_norm": (False,), "proj_bias": (True,), "mlp_layer": (Mlp,)}
    for name, accepted in defaults.items():
        if timm_args.get(name, accepted[0]) not in accepted:
            raise ValueError(f"{name}={timm_args[name]}: not for networks with experts; leave it out")
    timm_args.pop("weight_init", None)


def check_patches(image: int | tuple[int, int], patch: int | tuple[int, int]) -> None:
    """Raises ValueError: an image that is not a whole number of patches."""
    sizes = image if isinstance(image, list | tuple) else (image, image)
    if any(size < 1 for size in sizes):
        raise ValueError(f"image_size={image}: use a number of pixels, a multiple of the patch size {patch}")
    patches = patch if isinstance(patch, list | tuple) else (patch, patch)
    for size, side in zip(sizes, patches, strict=True):
        if size % side or size < side:
            below = size // side * side
            raise ValueError(
                f"image_size={size} is not a multiple of the patch size {side}; use "
                + (f"{below} or {below + side}" if below else f"{side}")
            )
