"""Transformer blocks that thread the carry: `x, carry = block(x, carry)`.

`carry` has no default, so any stock code path that would forget it raises instead of training without momentum.
    B images, N tokens, D width. x: [B, N, D].
"""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from timm.layers import Attention, DropPath, LayerScale, Mlp
from timm.models import register_notrace_module
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ..moe import Router, SparseMlp
from ..momentum import Carry, Coefficients, MomentumRule, Residual, ThreadsCarry
from ..momentum.threads import shifted


class QkNormAttention(Attention):
    """timm's attention; with `qk_norm` queries and keys are normalised as in flax, without a bias (as in ViT-22B)."""

    def __init__(self, *args: Any, qk_norm: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if qk_norm:
            self.q_norm, self.k_norm = qk_norms(self.head_dim, self.qkv.weight)


def qk_norms(head_dim: int, like: Tensor) -> tuple[nn.Module, nn.Module]:
    """Scale-only layer norms on the device and in the dtype of `like`."""
    options: dict[str, Any] = {"eps": 1e-6, "bias": False, "device": like.device, "dtype": like.dtype}
    return nn.LayerNorm(head_dim, **options), nn.LayerNorm(head_dim, **options)


class DenseBlock(Block):
    """timm's block; what the rule makes of the carry there is `MomentumRule.dense_step`: nothing, mostly."""

    attn: Attention  # or another of timm's with its parts

    def __init__(self, *, rule: MomentumRule, step: int, post_norm: bool, **block: Any) -> None:
        """The other arguments are timm's Block's. step: t of the MoE block to come. post_norm: behind the MLP's
        residual."""
        super().__init__(**block)
        self._thread(rule, step, post_norm)

    def _thread(self, rule: MomentumRule, step: int, post_norm: bool) -> None:
        self.rule, self.step = rule, step
        self.norm3 = norm_like(self.norm2) if post_norm else nn.Identity()

    @classmethod
    def adopt(cls, block: Block, *, rule: MomentumRule, step: int, post_norm: bool) -> "DenseBlock":
        """The same parts in a block that threads the carry."""
        new = _adopt(cls, dict(block.named_children()))
        new._thread(rule, step, post_norm)
        return new

    def forward(  # type: ignore[override]  # the carry has no default, see above
        self, x: Tensor, carry: Carry, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Carry]:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))

        def u(y: Tensor, shift: Tensor | None = None) -> Tensor:
            return self.drop_path2(self.ls2(self.mlp(shifted(self.norm2(y), shift))))

        x, buffers = self.rule.dense_step(x, u, carry.momentum, self.step, self.rule.coefficients())
        return self.norm3(x), carry._replace(momentum=buffers)


def norm_like(norm: nn.Module) -> nn.Module:
    """A fresh one of the same kind."""
    new = copy.deepcopy(norm)
    reset = getattr(new, "reset_parameters", None)
    if reset is None:
        raise ValueError(f"post_norm: a {type(norm).__name__} cannot be made anew; use a backbone with nn.LayerNorm")
    if next(new.parameters(), torch.empty(0)).device.type != "meta":
        reset()
    return new


class MomentumBlock(Block, ThreadsCarry):
    """timm's block with a sparse MLP whose residual line is a momentum rule.

    Its experts hold nothing yet: the network draws them, once (init_vmoe), or they are copied.
    """

    attn: Attention  # or another of timm's with its parts
    mlp: SparseMlp
    ls2: LayerScale | nn.Identity

    def __init__(
        self,
        *,
        num_experts: int,
        router: Router,
        rule: MomentumRule,
        step: int,
        post_norm: bool,
        expert_drop: float | None,
        mlp_ratio: float,
        act_layer: type[nn.Module],
        **block: Any,
    ) -> None:
        """The other arguments are timm's Block's.

        step: t of the rule, 1 where momentum starts, 0 for a plain residual block. post_norm: a norm behind the rule's
        step. expert_drop: None for the proj_drop of dense MLPs.
        """
        super().__init__(mlp_ratio=mlp_ratio, act_layer=act_layer, **{**block, "mlp_layer": _NoMlp})
        width, drop = block["dim"], block.get("proj_drop", 0.0) if expert_drop is None else expert_drop
        self._become_sparse(
            lambda: SparseMlp(width, int(width * mlp_ratio), num_experts, router, act_layer, drop, draw=False),
            rule, step, post_norm, block.get("device"), block.get("dtype"),
        )  # fmt: skip

    def _become_sparse(
        self,
        build: Callable[[], SparseMlp],
        rule: MomentumRule,
        step: int,
        post_norm: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """None: where and as torch makes tensors."""
        self.rule, self.step = rule if step else Residual(), step
        with nullcontext() if device is None else torch.device(device):
            self.mlp, self.momentum = build().to(dtype), Coefficients(self.rule).to(dtype)
        self.noise = _DrawNoise(self.mlp)
        self.norm3 = norm_like(self.norm2) if post_norm else nn.Identity()

    @classmethod
    def adopt(
        cls,
        block: Block,
        *,
        num_experts: int,
        router: Router,
        rule: MomentumRule,
        step: int,
        post_norm: bool,
        expert_drop: float | None,
    ) -> "MomentumBlock":
        """The parts of a dense block, its MLP copied into every expert (sparse upcycling, arXiv:2212.05055)."""
        dense = cast(Mlp, block.mlp)
        fc1, fc2 = cast(nn.Linear, dense.fc1), cast(nn.Linear, dense.fc2)
        width, hidden, like = fc1.in_features, fc1.out_features, fc1.weight
        drop = dense.drop1.p if expert_drop is None else expert_drop
        activation = partial(copy.deepcopy, dense.act)
        new = _adopt(cls, {name: part for name, part in block.named_children() if name != "mlp"})
        new._become_sparse(
            lambda: SparseMlp(width, hidden, num_experts, router, activation, drop, draw=False),
            rule, step, post_norm, like.device, like.dtype,
        )  # fmt: skip
        with torch.no_grad():
            for layer, source in ((new.mlp.experts.fc1, fc1), (new.mlp.experts.fc2, fc2)):
                layer.weight.copy_(source.weight.expand_as(layer.weight))
                layer.bias.copy_(layer.bias * 0 if source.bias is None else source.bias.expand_as(layer.bias))
        return new

    def forward(  # type: ignore[override]  # the carry has no default, see above
        self, x: Tensor, carry: Carry, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> tuple[Tensor, Carry]:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)))
        return self.sparse_step(x, carry, self.noise(x), self._drop_path_mask(x))

    def _drop_path_mask(self, x: Tensor) -> Tensor | None:
        """[B, 1, 1]: 0 where this image skips u, 1 / (1 - rate) elsewhere. It drops u, not the momentum gathered."""
        if not self.training or not isinstance(self.drop_path2, DropPath):
            return None
        return self.drop_path2(torch.ones_like(x[:, :1, :1]))


class _DrawNoise(nn.Module):
    """The router's noise as a module of its own, so that timm's fx tools can pass it by."""

    def __init__(self, mlp: SparseMlp) -> None:
        super().__init__()
        self.source = (mlp,)  # in a tuple: registered once, as the block's mlp

    def forward(self, x: Tensor) -> Tensor | None:
        return self.source[0].router.sample_noise(x)


register_notrace_module(SparseMlp)
register_notrace_module(_DrawNoise)


def _adopt(cls: type[Block], parts: dict[str, nn.Module]) -> Any:
    block = cls.__new__(cls)
    nn.Module.__init__(block)
    for name, part in parts.items():
        setattr(block, name, part)
    return block


class _NoMlp(nn.Module):
    """Takes the place of the dense MLP, which a sparse block never builds (nor draws random numbers for)."""

    def __init__(self, **_: object) -> None:
        super().__init__()
