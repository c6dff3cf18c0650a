"""The language networks against loops over positions, layers and tokens; the cache, causality, what must not leak."""

import inspect
import re
from pathlib import Path

import naive_lm
import pytest
import torch
from registered import registered
from torch import Tensor

from vmoe_momentum import SAM, Adam, Complex, HeavyBall, Nesterov, Residual, Robust, TopKRouter
from vmoe_momentum.language import SIZES, SparseBlock, SparseLanguageModel, create_language_model
from vmoe_momentum.language.exporting import open_program, write_program
from vmoe_momentum.language.network import ROUTER
from vmoe_momentum.moe import Router
from vmoe_momentum.momentum import MomentumRule

V, CONTEXT = 11, 5
SMALL = {"width": 12, "depth": 3, "num_heads": 2, "hidden": 10, "num_experts": 4, "context": CONTEXT, "dropout": 0.0}
NAIVE = {
    "residual": (Residual(), naive_lm.residual),
    "heavy ball": (HeavyBall(), naive_lm.heavy_ball),
    "nesterov": (Nesterov(), naive_lm.nesterov),
    "adam released": (Adam(gamma1=0.8, kappa=1.0), naive_lm.adam_released),
    "robust": (Robust(L=1.0, m=0.8, r=0.2), naive_lm.robust),
}


def small(rule: MomentumRule | str = "HeavyBall", **more) -> SparseLanguageModel:
    """In float64 and evaluation, its norms and biases drawn, too."""
    torch.manual_seed(1)
    net = SparseLanguageModel(V, **SMALL | {"rule": rule} | more).double().eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "bias" in name or "norm" in name:
                weight.add_(0.3 * torch.randn_like(weight))
    return net


def text(streams: int = 2, size: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, V, (streams, size), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("dense_between", [False, True])
@pytest.mark.parametrize("name", NAIVE)
def test_as_written_out_token_by_token(name: str, dense_between: bool, form: str) -> None:
    """Log-probabilities and every gradient, to 1e-10."""
    rule, step = NAIVE[name]
    net, words = small(rule, form=form, dense_between=dense_between), text()
    weights = {key: value.detach().clone().requires_grad_() for key, value in net.named_parameters()}
    facts = naive_lm.Facts(CONTEXT, SMALL["num_heads"], 2, form == "released", step)
    expected = torch.stack([naive_lm.log_probabilities(weights, facts, stream.tolist()) for stream in words])
    found = net(words)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    cotangent = torch.randn_like(expected)
    ours = torch.autograd.grad((found * cotangent).sum(), list(net.parameters()))
    theirs = torch.autograd.grad((expected * cotangent).sum(), list(weights.values()))
    for key, our, their in zip(weights, ours, theirs, strict=True):
        assert float(our.abs().max()) > 0, key
        torch.testing.assert_close(our, their, atol=1e-10 * max(1.0, float(their.abs().max())), rtol=0, msg=key)


def test_residual_of_one_expert_is_a_plain_post_norm_transformer() -> None:
    one = {"class_path": "TopKRouter", "init_args": {**ROUTER["init_args"], "top_k": 1}}
    net, words = small("Residual", num_experts=1, router=one), text()
    x = net.embed(words)
    past = torch.zeros(2, CONTEXT, SMALL["width"], dtype=torch.float64)
    for block in net.blocks:
        fc1, fc2 = block.mlp.experts.fc1, block.mlp.experts.fc2
        h = block.norm1(x + block.attn(x, past, net.distances))
        x = block.norm3(h + (h @ fc1.weight[0].T + fc1.bias[0]).relu() @ fc2.weight[0].T + fc2.bias[0])
    torch.testing.assert_close(net(words), net.head(x).log_softmax(-1), atol=1e-12, rtol=0)


@pytest.mark.parametrize("rule", sorted(registered(MomentumRule)))
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_cached_context_is_one_long_pass(rule: str, cut: int) -> None:
    """With cuts before and behind the length of the context. Were buffers part of it, these would differ."""
    net, words = small(rule, dense_between=True, form="released"), text(size=13)
    whole = net.read(words, net.empty_cache(2))
    parts, cache = [], net.empty_cache(2)
    for piece in words.split(cut, dim=1):
        found = net.read(piece, cache)
        parts.append(found.hidden)
        cache = found.cache
        assert all(each.shape == (2, CONTEXT, SMALL["width"]) and not each.requires_grad for each in cache)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.hidden, atol=1e-10, rtol=0)
    for ours, theirs in zip(cache, whole.cache, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=0)


@pytest.mark.parametrize("rule", sorted(registered(MomentumRule)))
def test_no_word_sees_what_follows(rule: str) -> None:
    """Logits at t are of words up to t; and of none that lies farther back than all layers together look."""
    net, words = small(rule, dense_between=True), text(1, 40)
    before = net(words)
    for t in (0, 6, 20):
        changed = words.clone()
        changed[0, t] = (changed[0, t] + 1) % V
        difference = (net(changed) - before).abs().amax(dim=-1)[0]
        assert float(difference[:t].max() if t else 0.0) < 1e-10 and float(difference[t]) > 1e-3
        reach = t + CONTEXT * len(net.blocks)
        assert reach >= 39 or float(difference[reach + 1 :].max()) < 1e-10


@pytest.mark.parametrize("rule", sorted(registered(MomentumRule)))
def test_streams_do_not_meet(rule: str) -> None:
    net, words = small(rule), text(3)
    changed = words.clone()
    changed[1] = (changed[1] + 1) % V
    before, after = net(words), net(changed)
    for stream in (0, 2):  # but for rounding: experts meet their tokens in another order
        torch.testing.assert_close(after[stream], before[stream], atol=1e-10, rtol=0)
    assert float((after[1] - before[1]).abs().max()) > 0.01
    torch.testing.assert_close(net(words[:1]), before[:1], atol=1e-10, rtol=0)


def test_a_rule_whose_momentum_outlives_the_pass_would_be_seen(monkeypatch) -> None:
    """The test above sees momentum that goes from one block of text to the next."""
    left: list[Tensor] = []

    def init(self, x: Tensor) -> tuple[Tensor, ...]:
        return (left[-1] if left else torch.zeros_like(x),)

    def step(self, x, u, buffers, t, coefficients):
        p = coefficients["mu"] * buffers[0] + u(x)
        left.append(p.detach())
        return x + p, (p,)

    net, words = small("HeavyBall"), text(size=8)
    whole = net.read(words, net.empty_cache(2)).hidden
    monkeypatch.setattr(HeavyBall, "init", init)
    monkeypatch.setattr(HeavyBall, "step", step)
    first = net.read(words[:, :4], net.empty_cache(2))
    second = net.read(words[:, 4:], first.cache)
    assert float((torch.cat([first.hidden, second.hidden], dim=1) - whole).abs().max()) > 1e-3


@pytest.mark.parametrize("rule", [HeavyBall(learn=True), Adam(), SAM(), Complex(), Robust()], ids=repr)
def test_recomputed_gradients_are_the_same(rule: MomentumRule) -> None:
    net, words = small(rule, dense_between=True, dropout=0.3).train(), text()
    found = []
    for net.grad_checkpointing in (False, True):
        torch.manual_seed(3)
        loss = net.head.losses(net.read(words, net.empty_cache(2)).hidden, words)
        found.append(torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))
    for plain, recomputed in zip(*found, strict=True):
        assert plain is not None and torch.equal(plain, recomputed)


# other rules are the same arithmetic: part of `make test-all`
EVERY = [
    rule if rule in ("Adam", "HeavyBall") else pytest.param(rule, marks=pytest.mark.long)
    for rule in sorted(registered(MomentumRule))
]


@pytest.mark.parametrize("rule", EVERY)
def test_compiled_whole_as_eager(rule: str) -> None:
    net, words = small(rule, dense_between=True), text()
    compiled = torch.compile(net.read, fullgraph=True, backend="aot_eager")
    cache = net.read(words, net.empty_cache(2)).cache
    torch.testing.assert_close(compiled(words, cache), net.read(words, cache), atol=1e-9, rtol=0)


@pytest.mark.parametrize("form", ["paper", pytest.param("released", marks=pytest.mark.long)])
@pytest.mark.parametrize("rule", EVERY)
def test_exported_as_eager(rule: str, form: str, tmp_path: Path) -> None:
    """For any number of streams and words, going on from the cache."""
    net = small(rule, dense_between=True, form=form)
    write_program(net, tmp_path, {})
    program, cache = open_program(tmp_path), net.empty_cache(3)
    for words in text(3, 11).split([2, 6, 3], dim=1):
        expected = net.read(words, cache)
        found, cache = program(words, cache)
        torch.testing.assert_close(found, net.head.log_prob(expected.hidden), atol=1e-9, rtol=0)
        torch.testing.assert_close(cache, expected.cache, atol=1e-9, rtol=0)


def test_dropout_is_on_attention_and_hidden_layers_only() -> None:
    """Behind the experts there is none, as in the released code: at a rate that drops all, what is left is the bias."""
    net = small("Residual", dropout=0.999999).train()
    block, h = net.blocks[0], torch.randn(1, 4, SMALL["width"], dtype=torch.float64)
    outputs = block.mlp(h)[0]
    plan = block.mlp.router(h, None)[0]
    expected = plan.gates  # softmax over all
    chosen = expected.topk(2, dim=-1)
    weights = torch.zeros_like(expected).scatter(
        -1, chosen.indices, chosen.values / chosen.values.sum(-1, keepdim=True)
    )
    torch.testing.assert_close(outputs, weights @ block.mlp.experts.fc2.bias, atol=1e-9, rtol=0)


# ---- names and sizes


WORDS = 267_735  # of WikiText-103


def sparse(width: int) -> int:
    """Attention without biases, two norms, the router, and 16 experts of two layers with biases."""
    return 4 * width**2 + 4 * width + 16 * (width + 1) + 16 * (2 * width**2 + 2 * width)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [  # by hand: V D + (D + 1) V, L d, and the blocks
        ("smoe_lm_small", WORDS * 257 + 256 * 16 + 3 * sparse(128)),
        ("smoe_lm_medium", WORDS * 705 + 1024 * 44 + 6 * sparse(352)),
        ("smoe_lm_large", WORDS * 1025 + 2048 * 64 + 12 * sparse(512)),
        ("glam_lm_medium", WORDS * 705 + 2048 * 44 + 6 * sparse(352) + 6 * (6 * 352**2 + 6 * 352)),
    ],
)  # fmt: skip
def test_sizes_by_hand(name: str, parameters: int) -> None:
    with torch.device("meta"):
        net = create_language_model(name, vocab_size=WORDS, rule="HeavyBall")
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert len(net.moe_layers) == {"smoe_lm_small": 3, "smoe_lm_large": 12}.get(name, 6)
    assert len(net.blocks) == len(net.moe_layers) * (2 if name.startswith("glam") else 1)


def test_the_guide_says_these_sizes() -> None:
    guide = (Path(__file__).parents[2] / "vmoe_momentum" / "language" / "README.md").read_text()
    told = dict(re.findall(r"^\| `(\w+)`.* \| ([\d.]+) M \|$", guide, flags=re.MULTILINE))
    assert told.keys() == SIZES.keys()
    for name, millions in told.items():
        with torch.device("meta"):
            net = create_language_model(name, vocab_size=WORDS)
        assert f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f}" == millions, name


def test_the_released_form_has_a_second_norm_and_nothing_else() -> None:
    sizes = [sum(p.numel() for p in small(form=form).parameters()) for form in ("paper", "released")]
    assert sizes[1] - sizes[0] == SMALL["depth"] * 2 * SMALL["width"]


def test_another_vocabulary_is_a_fresh_embedding_and_head() -> None:
    net = create_language_model("smoe_lm_tiny", width=16, context=4)
    blocks = [p.clone() for p in net.blocks.parameters()]
    net.reset_vocabulary(23)
    assert net(torch.tensor([[22]])).shape == (1, 1, 23) and net.vocab_size == 23
    assert all(torch.equal(a, b) for a, b in zip(blocks, net.blocks.parameters(), strict=True))
    assert all(isinstance(net.blocks[i], SparseBlock) for i in net.moe_layers)


@pytest.mark.parametrize(
    "setting", ["width", "depth", "num_heads", "hidden", "num_experts", "context", "dense_between"]
)
def test_every_size_changes_the_network(setting: str) -> None:
    other = {
        "width": 32,
        "depth": 2,
        "num_heads": 4,
        "hidden": 8,
        "num_experts": 5,
        "context": 6,
        "dense_between": True,
    }
    base = {"width": 16, "depth": 1, "num_heads": 2, "hidden": 16, "num_experts": 4, "context": 4}
    shapes = [
        {n: tuple(p.shape) for n, p in create_language_model("smoe_lm_tiny", 9, **given).named_parameters()}
        for given in (base, base | {setting: other[setting]})
    ]
    assert shapes[0] != shapes[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "smoe_lm_huge"}, "name=smoe_lm_huge; did you mean"),
        ({"width": 10, "num_heads": 4}, "width=10: not a multiple of num_heads=4; use 12"),
        ({"form": "both"}, "form=both: use paper or released"),
        ({"head": "hinge"}, "head=hinge: use softmax or adaptive"),
        ({"cutoffs": [3]}, r"cutoffs=\[3\]: for head=adaptive"),
        ({"vocab_size": 9, "head": "adaptive", "cutoffs": [9]}, r"cutoffs=\[9\]: use ascending numbers from 1 to 8"),
        ({"router": "SoftRouter"}, "router=SoftRouter: what becomes of a token would depend on those behind it"),
        ({"router": "ExpertChoiceRouter"}, "router=ExpertChoiceRouter: what becomes"),
        ({"router": TopKRouter(capacity_factor=1.0)}, "router=TopKRouter: what becomes"),
        ({"router": TopKRouter(capacity_factor="dropless", eval_capacity_factor=0.5)}, "router=TopKRouter: what"),
        ({"depth": 0}, "depth=0: use a whole number from 1"),
    ],
)
def test_what_means_nothing_is_told(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_language_model(**{"name": "smoe_lm_tiny", "vocab_size": 9, **settings})


def test_every_router_that_is_taken_alone_is_taken() -> None:
    """By the sweep over all: those that mix tokens are refused, the others train."""
    taken = []
    for name, cls in registered(Router).items():
        takes = inspect.signature(cls.__init__).parameters
        dropless = {"capacity_factor": "dropless"} if "capacity_factor" in takes else {}
        try:
            net = small("Residual", router=cls(**dropless))
        except ValueError as error:
            assert "must not see" in str(error) or "capacity_factor" in str(error), (name, error)
            continue
        taken.append(name)
        words = text(1, 12)
        changed = words.clone()
        changed[0, 6] = (changed[0, 6] + 1) % V
        for net.training in (True, False):
            torch.manual_seed(0)
            before = net(words)
            torch.manual_seed(0)
            torch.testing.assert_close(net(changed)[:, :6], before[:, :6], atol=1e-10, rtol=0, msg=name)
    assert "TopKRouter" in taken and "SoftRouter" not in taken


def test_names_build_what_they_say() -> None:
    assert set(SIZES) == {"smoe_lm_tiny", "smoe_lm_small", "smoe_lm_medium", "smoe_lm_large", "glam_lm_medium"}
