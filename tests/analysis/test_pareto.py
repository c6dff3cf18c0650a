"""analyze pareto: least-norm points in closed form and by their optimality, and the instrument by a loop."""

import math
from pathlib import Path

import pytest
import torch
from analysis_helpers import images, subject, tiny
from cli_helpers import rows as rows_of
from matplotlib.figure import Figure
from scipy.optimize import minimize
from torch import Tensor, nn

from vmoe_momentum import ExpertChoiceRouter, GShardRouter, HeavyBall, M6TRouter, SoftRouter, TopKRouter, UpcycledViT
from vmoe_momentum.analysis import Files, pareto, record
from vmoe_momentum.analysis.hulls import compare_points, least_norm_weights, shuffled
from vmoe_momentum.analysis.pareto import combine_weights
from vmoe_momentum.momentum import SAM

BLOCK = 3


class Undrawn(Files):
    """Pictures take longer than all the rest; the command's test draws."""

    def save(self, figure: Figure, suffix: str = "") -> None:
        self.drawn = [*getattr(self, "drawn", []), (suffix, figure)]


def undrawn(folder: Path, name: str = "x") -> Undrawn:
    return Undrawn(str(folder / "out"), name)


def everyone(vectors: Tensor) -> Tensor:
    return torch.ones(vectors.shape[:2], dtype=torch.bool)


def solved(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and least-norm points in the hull of all. [T, E, M] -> [T, E], [T, M]."""
    weights = least_norm_weights(vectors, everyone(vectors))
    return weights, torch.einsum("tem,te->tm", vectors, weights)


# ---- the quadratic program


def test_two_vectors_by_the_formula() -> None:
    """The foot of the perpendicular on the segment, or its nearer end."""
    pairs = torch.randn(400, 2, 5, generator=torch.Generator().manual_seed(0)).double()
    pairs[:, 0] *= torch.logspace(-3, 3, 400).double()[:, None]
    first, second = pairs.unbind(dim=1)
    wanted = ((second * (second - first)).sum(-1) / (second - first).square().sum(-1)).clamp(0, 1)
    assert {0.0, 1.0} < set(wanted.tolist())
    weights, _ = solved(pairs)
    torch.testing.assert_close(weights, torch.stack([wanted, 1 - wanted], dim=-1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [2, 8, 64])
def test_orthogonal_vectors_weigh_by_their_inverse_square(count: int) -> None:
    lengths = torch.rand(50, count, generator=torch.Generator().manual_seed(0)).double() + 0.1
    basis = torch.linalg.qr(torch.randn(count + 2, count, generator=torch.Generator().manual_seed(1)).double()).Q.T
    weights, points = solved(lengths[..., None] * basis)
    inverse = lengths.pow(-2)
    torch.testing.assert_close(weights, inverse / inverse.sum(-1, keepdim=True))
    torch.testing.assert_close(points.norm(dim=-1), inverse.sum(-1).rsqrt())


def test_zero_in_the_hull_is_stationary() -> None:
    corners = torch.randn(30, 4, 3, generator=torch.Generator().manual_seed(0)).double()
    inside = torch.cat([corners, -corners.mean(dim=1, keepdim=True)], dim=1)  # zero is a mean of these
    assert solved(inside)[1].norm(dim=-1).max() < 1e-12
    with_zero = torch.cat([corners, 0 * corners[:, :1]], dim=1)
    assert solved(with_zero)[0][:, 4].tolist() == [1.0] * 30
    assert solved(0 * corners)[1].norm() == 0
    found = compare_points(inside, torch.ones(30, 5).double() / 5, everyone(inside))["router"]
    assert found["stationary"] == 1.0 and found["cosine"] is None
    assert found["gap"] == pytest.approx(found["norm"]) and found["relative_gap"] == pytest.approx(1)


@pytest.mark.parametrize("kind", ["any", "alike", "almost alike", "flat", "of unlike sizes", "zero near"])
@pytest.mark.parametrize("count", [3, 8, 32, 64])
def test_no_point_of_the_hull_is_shorter(kind: str, count: int) -> None:
    """p is the shortest exactly where <p, v> >= |p|^2 for all v, with equality for those that have a weight."""
    generator = torch.Generator().manual_seed(count)
    vectors = torch.randn(60, count, 16, generator=generator).double()
    if kind == "alike":
        vectors[:, count // 2 :] = vectors[:, : count - count // 2]
    elif kind == "almost alike":
        vectors = vectors[:, :1] + 1e-7 * vectors
    elif kind == "flat":
        vectors = vectors[:, :, :2] @ torch.randn(60, 2, 16, generator=generator).double()
    elif kind == "of unlike sizes":
        vectors *= 10 ** (6 * torch.rand(60, count, 1, generator=generator).double())
    elif kind == "zero near":
        vectors[:, -1] = 1e-5 - vectors[:, :-1].mean(dim=1)
    weights, points = solved(vectors)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(-1), torch.ones(60).double())
    products, square = torch.einsum("tem,tm->te", vectors, points), points.square().sum(-1, keepdim=True)
    size = vectors.norm(dim=-1)
    slack = (products - square) / (size * size.amin(dim=-1, keepdim=True))
    assert slack.min() > -1e-9
    assert slack[weights > 1e-9].max() < 1e-9


def test_only_members_take_part() -> None:
    vectors = torch.randn(40, 6, 8, generator=torch.Generator().manual_seed(0)).double()
    members = torch.rand(40, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    members[:, 2] = True
    weights = least_norm_weights(vectors, members)
    assert not weights[~members].any()
    for token in range(40):
        own = vectors[token : token + 1, members[token]]
        torch.testing.assert_close(weights[token, members[token]], solved(own)[0][0])


def test_compared_by_hand() -> None:
    """Outputs (3, 0) and (0, 4): the least-norm point is (48, 36) / 25, as weights are 16 and 9 of 25."""
    vectors = torch.tensor([[[3.0, 0.0], [0.0, 4.0], [-9.0, 1.0]]]).double()
    members = torch.tensor([[True, True, False]])
    found = compare_points(vectors, torch.tensor([[0.6, 0.2, 0.0]]).double(), members)
    router, equal = found["router"], found["equal"]
    point, least = torch.tensor([2.25, 1.0]), torch.tensor([1.92, 1.44])
    assert router["weight_sum"] == pytest.approx(0.8) and router["expert_norm"] == pytest.approx(3.5)
    assert router["least_norm"] == pytest.approx(2.4) == equal["least_norm"]
    assert router["norm"] == pytest.approx(float(point.norm()))
    assert router["gap"] == pytest.approx(float((point - least).norm()))
    assert router["relative_gap"] == pytest.approx(float((point - least).norm() / point.norm()))
    assert router["cosine"] == pytest.approx(float(point @ least / point.norm() / least.norm()))
    assert (router["stationary"], router["common"], equal["common"]) == (0, 1, 1)
    assert equal["norm"] == pytest.approx(2.5) and equal["gap"] == pytest.approx(math.hypot(0.42, 0.56))
    everybody = compare_points(vectors, torch.tensor([[0.6, 0.2, 0.0]]).double(), everyone(vectors))
    assert everybody["router"]["common"] == 0 and everybody["router"]["norm"] == router["norm"]


def test_shuffled_weights_stay_with_the_members() -> None:
    members = torch.tensor([[True, False, True, True]] * 3000)
    given = torch.tensor([[0.5, 0.0, 0.25, 0.0]] * 3000)
    found = shuffled(given, members)
    assert not found[:, 1].any()
    assert torch.equal(found.sort(dim=-1).values, given.sort(dim=-1).values)
    shares = (found == 0.5).double().mean(dim=0)
    torch.testing.assert_close(shares, torch.tensor([1 / 3, 0, 1 / 3, 1 / 3]).double(), rtol=0, atol=0.03)


# ---- what the network does


def seen(net: nn.Module, count: int = 6) -> list:
    with record(net) as visits, torch.no_grad():
        net(torch.cat(images(count)) / 127.5 - 1)
    return list(visits)


NETS = {
    "TopK": lambda: tiny(rule=HeavyBall(), router=TopKRouter()),
    "renormalised": lambda: tiny(router=TopKRouter(renormalize=True, top_k=3)),
    "dropping": lambda: tiny(router=TopKRouter(eval_capacity_factor=0.5)),
    "several images": lambda: tiny(router=TopKRouter(eval_capacity_factor=0.5, group_size=34)),
    "GShard": lambda: tiny(router=GShardRouter()),
    "M6T": lambda: tiny(router=M6TRouter()),
    "expert choice": lambda: tiny(router=ExpertChoiceRouter(capacity_factor=0.5)),
    "SAM": lambda: tiny(rule=SAM()),
    "bfloat16": lambda: tiny(router=TopKRouter(bfloat16_dispatch=True)),
    "post-norm": lambda: tiny(rule=HeavyBall(), post_norm="sparse"),
    "upcycled": lambda: upcycled(),
}


def upcycled(alike: bool = False) -> nn.Module:
    """A dense DeiT-III, which scales what its layers give, made sparse."""
    torch.manual_seed(0)
    small = {"patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "init_values": 0.3}
    given = {"image_size": 16, "num_classes": 10, "num_experts": 4, "moe_layers": [1, 3], "backbone_args": small}
    net = UpcycledViT("deit3_small_patch16_224", **given)
    if not alike:
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if ".experts." in name or "ls2" in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape))
    return net.eval()


@pytest.mark.parametrize("kind", NETS)
def test_weights_times_outputs_are_the_networks_own_update(kind: str) -> None:
    net = NETS[kind]()
    for visit in seen(net):
        block, tokens = net.blocks[visit.block], visit.tokens.flatten(0, 1)
        weights = combine_weights(visit.plan, len(tokens), 4)
        reached = visit.plan.assigned().flatten(0, 1)
        assert torch.equal(weights > 0, reached)
        with torch.no_grad():
            outputs = block.ls2(block.mlp.every_output(tokens))
        torch.testing.assert_close(
            torch.einsum("te,ted->td", weights.float(), outputs), visit.update.flatten(0, 1),
            rtol=1e-2 if kind == "bfloat16" else 1e-5, atol=1e-5,
        )  # fmt: skip


def least_by_slsqp(vectors: Tensor) -> Tensor:
    """[E, D] -> [D], by another solver."""
    gram = (vectors @ vectors.T).numpy()
    sums_to_one = {"type": "eq", "fun": lambda w: w.sum() - 1}
    count = len(vectors)
    found = minimize(
        lambda w: w @ gram @ w, [1 / count] * count, jac=lambda w: 2 * gram @ w, bounds=[(0, 1)] * count,
        constraints=[sums_to_one], method="SLSQP", options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    return torch.from_numpy(found.x) @ vectors


@pytest.mark.parametrize("kind", ["TopK", "dropping", "expert choice"])
def test_rows_by_a_loop_over_tokens(kind: str, tmp_path: Path) -> None:
    net = NETS[kind]()
    found = pareto([subject(net, tmp_path)], images(3, 2), undrawn(tmp_path))
    visit = next(visit for visit in seen(net, 3) if visit.block == BLOCK)
    experts, tokens = net.blocks[BLOCK].mlp.experts.requires_grad_(False), visit.tokens.flatten(0, 1)
    weights = combine_weights(visit.plan, len(tokens), 4)  # held against the network's update above
    dropped, count = 0, {}
    sums: dict[tuple[str, str, str], float] = {}
    for token, own in zip(tokens, weights, strict=True):
        answers = []
        for e in range(4):
            hidden = experts.act(experts.fc1.weight[e] @ token + experts.fc1.bias[e])
            answers.append((experts.fc2.weight[e] @ hidden + experts.fc2.bias[e]).double())
        answers, chosen = torch.stack(answers), own > 0
        dropped += not chosen.any()
        for whose, members in (("all", torch.ones(4, dtype=torch.bool)), ("chosen", chosen)):
            if not chosen.any() or members.sum() < 2:
                continue
            for outputs, vectors in (("raw", answers), ("unit", answers / answers.norm(dim=-1, keepdim=True))):
                least = least_by_slsqp(vectors[members])
                for combination, share in (("router", own), ("equal", members.double())):
                    point = share / share.sum() @ vectors
                    numbers = {
                        "expert_norm": vectors[members].norm(dim=-1).mean(),
                        "least_norm": least.norm(),
                        "norm": point.norm(),
                        "cosine": point @ least / point.norm() / least.norm(),
                        "gap": (point - least).norm(),
                        "relative_gap": (point - least).norm() / point.norm(),
                        "common": float((vectors[members] @ point).min() >= 0),
                        "weight_sum": own.sum(),
                    }
                    key = (whose, outputs, combination)
                    count[key] = count.get(key, 0) + 1
                    for name, value in numbers.items():
                        sums[*key, name] = sums.get((*key, name), 0) + float(value)
    rows = {(r.experts, r.outputs, r.combination): r for r in found if r.block == BLOCK and r.combination != "shuffled"}
    assert {key: row.tokens for key, row in rows.items()} == count and len(count) == 8
    assert {row.unreached for row in rows.values()} == {dropped}
    assert (dropped > 0) == (kind != "TopK")
    for (*key, name), value in sums.items():
        if (key[1:], name) == (["unit", "equal"], "gap"):  # zero up to rounding for two of length 1
            continue
        assert getattr(rows[*key], name) == pytest.approx(value / count[*key], rel=1e-4, abs=1e-5), (*key, name)


def test_upcycled_experts_are_alike_and_any_combination_is_least(tmp_path: Path) -> None:
    found = pareto([subject(upcycled(alike=True), tmp_path)], images(), undrawn(tmp_path))
    assert {row.block for row in found} == {1, 3} and {row.experts for row in found} == {"all", "chosen"}
    for row in found:
        assert row.relative_gap == pytest.approx(0, abs=1e-6) and row.cosine == pytest.approx(1)
        assert row.norm == pytest.approx(row.least_norm) == row.expert_norm
        assert (row.common, row.weight_sum) == (1, pytest.approx(1))


def test_tokens_are_a_sample(tmp_path: Path) -> None:
    """--tokens: the same sample at every block and for every network; of all there are, all."""
    net = tiny(router=TopKRouter())
    few = pareto(
        [subject(net, tmp_path, "a"), subject(net, tmp_path, "b")], images(), undrawn(tmp_path, "x"), tokens=40
    )
    assert {row.tokens for row in few} == {40}
    assert [row[4:] for row in few if row.model == "a"] == [row[4:] for row in few if row.model == "b"]
    every = pareto([subject(net, tmp_path)], images(), undrawn(tmp_path, "y"), tokens=10**9)
    assert {row.tokens for row in every} == {6 * 17}
    assert every[0].least_norm != few[0].least_norm
    assert every[0].least_norm == pytest.approx(few[0].least_norm, rel=0.2)


def test_steps_lie_on_the_axis_of_a_second_picture(tmp_path: Path) -> None:
    over = undrawn(tmp_path, "over")
    run = [subject(tiny(rule=HeavyBall()), tmp_path, "run", epoch) for epoch in (0, 3)]
    pareto([*run, subject(tiny(), tmp_path, "once")], images(), over, tokens=30)
    assert [(row["model"], row["epoch"], row["step"]) for row in rows_of(tmp_path / "out" / "over.csv")][::48] == [
        ("run", "1", "10"), ("run", "4", "40"), ("once", "1", "10"),
    ]  # fmt: skip
    (depth, first), (training, second) = over.drawn
    assert (depth, training) == ("", "training")
    lines = [[list(line.get_xdata()) for line in figure.axes[1].lines] for figure in (first, second)]
    assert lines == [[[1, 3, 5, 7]] * 6, [[10, 40]] * 3]  # networks times combinations; "once" has no second point


# ---- what cannot be read


def test_one_expert_a_token_has_no_hull_of_those_chosen(tmp_path: Path, capsys) -> None:
    found = pareto([subject(tiny(router=TopKRouter(top_k=1)), tmp_path)], images(), undrawn(tmp_path))
    assert {row.experts for row in found} == {"all"}
    assert all(row.norm == pytest.approx(1) for row in found if (row.outputs, row.combination) == ("unit", "router"))
    assert "net, epoch 1, block 1, 3, 5, 7: no token has two experts, so no hull" in capsys.readouterr().out


def broken() -> nn.Module:
    net = tiny()
    net.blocks[5].mlp.experts.fc2.bias.data[2, 0] = math.nan
    return net


@pytest.mark.parametrize(
    ("net", "tokens", "message"),
    [
        (lambda: tiny(router=SoftRouter()), 20, "net0.ckpt: SoftRouter gives experts mixtures of tokens, so no token"),
        (lambda: tiny(num_experts=1, router=TopKRouter(top_k=1)), 20, "net0.ckpt: one expert a layer, so there is"),
        (broken, 20, "net0.ckpt: experts of block 5 give numbers that are not finite"),
        (
            lambda: tiny(num_experts=2, router=TopKRouter(top_k=1, capacity=1)),
            1,
            "--tokens=1: none of those sampled reaches an exp",
        ),
    ],
)
def test_refused_in_one_line(net, tokens: int, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as error:
        pareto([subject(net(), tmp_path)], images(), undrawn(tmp_path), tokens=tokens)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
