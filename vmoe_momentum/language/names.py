"""The paper's language models by name. Sizes: the scripts of the released code (MomentumSMoE, language)."""

from typing import Any

from ..moe import Router
from ..momentum import MomentumRule
from ..names import did_you_mean
from ..ranges import in_range
from .blocks import Form
from .heads import Head
from .network import NUMBERS, ROUTER, SparseLanguageModel

MEDIUM = {"width": 352, "depth": 6, "hidden": 352, "dropout": 0.1}
SIZES: dict[str, dict[str, Any]] = {
    "smoe_lm_tiny": {"width": 128, "depth": 3, "hidden": 128, "context": 64, "dropout": 0.1, "num_experts": 8},
    "smoe_lm_small": {"width": 128, "depth": 3, "hidden": 128, "context": 256, "dropout": 0.7},
    "smoe_lm_medium": {**MEDIUM, "context": 1024},
    "smoe_lm_large": {"width": 512, "depth": 12, "hidden": 512, "context": 2048, "dropout": 0.1},
    "glam_lm_medium": {**MEDIUM, "context": 2048, "dense_between": True},
}  # 8 heads and 16 experts, unless it says otherwise; tiny is ours, the demo's


@in_range("", **{name: bounds.or_(None) for name, bounds in NUMBERS.items()})
def create_language_model(
    name: str = "smoe_lm_medium",
    vocab_size: int | None = None,
    rule: MomentumRule | dict[str, Any] | str | None = None,
    router: Router | dict[str, Any] | str | None = None,
    form: Form = "paper",
    head: Head = "softmax",
    cutoffs: list[int] | None = None,
    width: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    hidden: int | None = None,
    num_experts: int | None = None,
    context: int | None = None,
    dropout: float | None = None,
    dense_between: bool | None = None,
) -> SparseLanguageModel:
    """A language model by name, changed where something else than null is given.

    Args:
        name: smoe_lm_tiny (the demo's), smoe_lm_small, smoe_lm_medium, smoe_lm_large, glam_lm_medium.
        vocab_size: Words, 1 to 1e9; null for what the data has (and one until then).
        rule: Momentum across the sparse blocks; null for Residual.
        router: Null for the paper's: the largest 2 logits, a softmax over these, no noise, capacity or loss.
        form: paper, one residual connection and one norm a sparse layer; or released, two of each.
        head: softmax over all words, or adaptive, with rare words in narrower tails.
        cutoffs: First words of the adaptive head's tails, 1 to 1e9.
        width: D, 1 to 65536, a multiple of num_heads.
        depth: Sparse blocks, 1 to 10000.
        num_heads: Attention heads, 1 to 65536.
        hidden: Width of an expert's hidden layer, 1 to 65536.
        num_experts: Experts of a sparse layer, 1 to 65536.
        context: Positions before a token that it attends to, 1 to 65536.
        dropout: In [0, 1).
        dense_between: A dense block behind each sparse one, as in GLaM.

    Raises ValueError: no such name, or a setting that means nothing.
    """
    if name not in SIZES:
        raise ValueError(f"name={name}{did_you_mean(name, SIZES)}")
    changed = {
        "width": width, "depth": depth, "num_heads": num_heads, "hidden": hidden, "num_experts": num_experts,
        "context": context, "dropout": dropout, "dense_between": dense_between,
    }  # fmt: skip
    settings = SIZES[name] | {key: value for key, value in changed.items() if value is not None}
    given: dict[str, Any] = {
        "rule": "Residual" if rule is None else rule, "router": ROUTER if router is None else router,
        "form": form, "head": head,
    }  # fmt: skip
    if vocab_size is None:  # as many as an adaptive head needs; the cutoffs are for the words to come
        net = SparseLanguageModel(16, **given, **settings)
        net.cutoffs = cutoffs
    else:
        net = SparseLanguageModel(vocab_size, cutoffs=cutoffs, **given, **settings)
    return net
