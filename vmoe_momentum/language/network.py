"""The sparse language models of MomentumSMoE (arXiv:2410.14574): SMoE and GLaM with a momentum rule across depth.

    B streams of text, N tokens of a block of text, L positions looked back on, D width, V words in the vocabulary,
    H heads, d = D / H.

One loop, `_run_blocks`, threads the carry; everything goes through it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..moe import Router
from ..momentum import Carry, MomentumRule
from ..ranges import COUNT, MOMENTUM, Range, in_range
from ..specs import from_spec, to_spec
from .blocks import DenseBlock, Form, SparseBlock, check_form
from .heads import Head, make_head

SIZE, DEPTH = Range(1, 2**16, whole=True), Range(1, 10_000, whole=True)
NUMBERS = {
    "vocab_size": COUNT, "width": SIZE, "depth": DEPTH, "num_heads": SIZE, "hidden": SIZE, "num_experts": SIZE,
    "context": SIZE, "dropout": MOMENTUM, "cutoffs": COUNT.or_(None),
}  # fmt: skip
# As the released code routes: the largest 2 logits, a softmax over these two, a bias; no noise, capacity or loss
ROUTER = {
    "class_path": "TopKRouter",
    "init_args": {
        "top_k": 2, "renormalize": True, "gate_bias": True, "noise_std": 0.0, "capacity_factor": "dropless",
        "importance_loss_weight": 0.0, "load_loss_weight": 0.0,
    },
}  # fmt: skip
Cache = tuple[Tensor, ...]  # of each block its inputs at the L positions before, [B, L, D]


class Read(NamedTuple):
    """What became of a block of text."""

    hidden: Tensor  # [B, N, D], what the head is given: of the words up to each position
    cache: Cache  # for the block of text that follows
    aux_loss: Tensor  # [] router losses summed over the sparse blocks


@in_range("", **NUMBERS)
class SparseLanguageModel(nn.Module):
    """Words in, words out: a causal transformer of sparse blocks, or of sparse and dense ones in turn.

    Args:
        vocab_size: V, 1 to 1e9.
        width: D, 1 to 65536, a multiple of num_heads.
        depth: Sparse blocks, 1 to 10000.
        num_heads: H, 1 to 65536.
        hidden: Width of an expert's hidden layer, 1 to 65536.
        num_experts: E, 1 to 65536.
        context: L, positions before a token that it attends to, 1 to 65536.
        dropout: On attention weights and behind the hidden layers of experts and feed-forward layers, in [0, 1).
        dense_between: A dense block behind each sparse one, as in GLaM.
        form: paper, one residual connection and one norm a sparse layer; or released, two of each.
        rule: Momentum across the sparse blocks. Buffers begin at zero with every block of text: they are of a position,
            and never part of the cache.
        router: A router under which a token's experts do not depend on later tokens.
        head: softmax over all words, or adaptive (Grave et al., arXiv:1609.04309): rare words in tails of less width.
        cutoffs: Of the adaptive head, first words of its tails, 1 to 1e9 and ascending; null for V/15, 3V/15 and 6V/15.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        width: int = 352,
        depth: int = 6,
        num_heads: int = 8,
        hidden: int = 352,
        num_experts: int = 16,
        context: int = 1024,
        dropout: float = 0.1,
        dense_between: bool = False,
        form: Form = "paper",
        rule: MomentumRule | dict[str, Any] | str = "Residual",
        router: Router | dict[str, Any] | str = ROUTER,
        head: Head = "softmax",
        cutoffs: list[int] | None = None,
    ) -> None:
        super().__init__()
        self._arguments = {
            "width": width, "depth": depth, "num_heads": num_heads, "hidden": hidden, "num_experts": num_experts,
            "context": context, "dropout": dropout, "dense_between": dense_between, "form": form, "head": head,
        }  # fmt: skip
        check_form(form)
        if width % num_heads:
            raise ValueError(
                f"width={width}: not a multiple of num_heads={num_heads}; use {num_heads * -(-width // num_heads)}"
            )
        # abstract bases, of which an object of a subclass is made
        self.rule = from_spec(rule, MomentumRule, "rule")
        router = from_spec(router, Router, "router")
        self.router_spec, self.form, self.dense_between = to_spec(router), form, dense_between
        self.vocab_size, self.width, self.context, self.num_heads = vocab_size, width, context, num_heads
        self.embed = nn.Embedding(vocab_size, width)
        self.distances = nn.Parameter(torch.randn(context, width // num_heads))  # of the farthest first
        shared: dict[str, Any] = {
            "width": width, "num_heads": num_heads, "drop": dropout, "hidden": hidden, "rule": self.rule,
        }  # fmt: skip
        sparse: dict[str, Any] = {"num_experts": num_experts, "router": router, "form": form}
        self.blocks = nn.ModuleList()
        for step in range(1, depth + 1):
            self.blocks.append(SparseBlock(**shared, **sparse, step=step))
            if dense_between:
                self.blocks.append(DenseBlock(**shared, step=step + 1))
        self.head_kind, self.cutoffs = head, cutoffs
        self.head = make_head(head, width, vocab_size, cutoffs)
        self.grad_checkpointing = False
        self._check_causal()

    def reset_vocabulary(self, vocab_size: int) -> None:
        """A fresh embedding and head for another number of words. Raises ValueError: cutoffs that do not suit it."""
        with self.distances.device:
            self.embed = nn.Embedding(vocab_size, self.width)
            self.head = make_head(self.head_kind, self.width, vocab_size, self.cutoffs)
        self.vocab_size = vocab_size

    def _check_causal(self) -> None:
        """Raises ValueError: a router that lets a token see those behind it, where perplexity means nothing."""
        was, first = self.training, self.blocks[0]
        assert isinstance(first, SparseBlock)
        for mode in (True, False):
            self.train(mode)
            if not first.mlp.router.takes_tokens_alone(self.context, first.mlp.experts.fc1.weight.shape[0]):
                raise ValueError(
                    f"router={self.router_spec['class_path']}: what becomes of a token would depend on those behind "
                    "it, which a language model must not see; use TopKRouter with capacity_factor=dropless"
                )
        self.train(was)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the sparse blocks."""
        return tuple(index for index, block in enumerate(self.blocks) if isinstance(block, SparseBlock))

    def function_settings(self) -> dict[str, Any]:
        """What changes the function but lies in no tensor, as JSON: it travels with every checkpoint."""
        return {
            "rule": to_spec(self.rule), "router": self.router_spec, "form": self.form, "num_heads": self.num_heads,
            "dense_between": self.dense_between, "context": self.context, "head": self.head_kind,
            "sparse_blocks": list(self.moe_layers),
        }  # fmt: skip

    def build_arguments(self) -> dict[str, Any]:
        """Arguments of the constructor that builds it again, as JSON."""
        return dict(self._arguments)

    def empty_cache(self, streams: int) -> Cache:
        """Before the first word: zeros, which are attended to, as in the released code."""
        like = self.distances
        return tuple(like.new_zeros(streams, self.context, self.width) for _ in self.blocks)

    def read(self, words: Tensor, cache: Cache) -> Read:
        """words: int64 [B, N], each the successor of the one before, the first that of what the cache has seen."""
        hidden, carry, cache = self._run_blocks(words, cache)
        return Read(hidden, cache, carry.aux_loss)

    def forward(self, words: Tensor) -> Tensor:
        """Words [B, N] with nothing before them -> log-probabilities [B, N, V] of the word behind each."""
        return self.head.log_prob(self.read(words, self.empty_cache(words.shape[0])).hidden)

    def _run_blocks(self, words: Tensor, cache: Iterable[Tensor]) -> tuple[Tensor, Carry, Cache]:
        x = self.embed(words)
        carry, kept = Carry(self.rule.init(x), x.new_zeros(())), []
        for block, past in zip(self.blocks, cache, strict=True):
            kept.append(torch.cat([past, x], dim=1)[:, -self.context :].detach())
            if self.grad_checkpointing and torch.is_grad_enabled():
                x, carry = checkpoint(block, x, carry, past, self.distances, use_reentrant=False)
            else:
                x, carry = block(x, carry, past, self.distances)
        return x, carry, tuple(kept)
