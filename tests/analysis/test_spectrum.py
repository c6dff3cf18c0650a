"""The spectrum against dense Jacobians and known matrices."""

import csv
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from analysis_helpers import files, images, subject, tiny
from torch import Tensor

from vmoe_momentum import ExpertChoiceRouter, HeavyBall, Nesterov, Residual, Robust, SoftRouter, TopKRouter
from vmoe_momentum.analysis import record, spectrum
from vmoe_momentum.analysis.eigenvalues import image_spectrum, token_jacobians, token_spectrum, update_of
from vmoe_momentum.momentum import SAM, Adam


def points_of(net: torch.nn.Module, index: int) -> Tensor:
    """[B, N, D] float64, where a real forward pass evaluates u."""
    with record(net) as visits, torch.no_grad():
        net(images()[0] / 127.5 - 1)
    return next(visit.point for visit in visits if visit.block == index).double()


def dense_jacobian(net: torch.nn.Module, index: int, points: Tensor) -> Tensor:
    """Of u on [N, D] in reverse mode, through the block's own parts: [N D, N D]."""
    block = net.double().blocks[index]

    def u(flat: Tensor) -> Tensor:
        y = flat.reshape(1, *points.shape)
        return block.ls2(block.mlp(block.norm2(y), None)[0]).flatten()

    return torch.autograd.functional.jacobian(u, points.flatten())


def plain(block: torch.nn.Module):
    """u of a block without a norm behind its step."""
    u = update_of(block, 1.0)
    return lambda x: u(x, torch.zeros_like(x), torch.zeros_like(x))


def same_set(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Complex numbers [S] in any order."""
    distance = (a.unsqueeze(1) - b.unsqueeze(0)).abs()
    assert float(distance.min(dim=0).values.max()) < tolerance
    assert float(distance.min(dim=1).values.max()) < tolerance


@pytest.mark.parametrize("router", [TopKRouter(), TopKRouter(top_k=1, renormalize=True), TopKRouter(top_k=4)], ids=repr)
def test_tokens_agree_with_the_dense_jacobian(router: TopKRouter) -> None:
    net = tiny(rule=HeavyBall(), router=router)
    for index in (1, 7):
        points = points_of(net, index)[0, :3]
        u = plain(net.blocks[index])
        jacobian = token_jacobians(u, points)
        dense = dense_jacobian(net, index, points).reshape(3, 64, 3, 64)
        for token in range(3):
            torch.testing.assert_close(jacobian[token], dense[token, :, token], atol=1e-12, rtol=0)
            same_set(
                token_spectrum(u, points).sigma[token], torch.linalg.eigvals(-dense[token, :, token]), tolerance=1e-6
            )
        assert float(dense[0, :, 1].abs().max()) == 0.0  # one token's update knows nothing of another's
        net.float()


def test_the_jacobian_is_that_of_finite_differences() -> None:
    net = tiny()
    points = points_of(net, 5)[1, :2]
    net = net.double()
    jacobian, step = token_jacobians(plain(net.blocks[5]), points), 1e-5
    block = net.blocks[5]
    for axis in (0, 17, 63):
        shift = torch.zeros(64, dtype=torch.float64)
        shift[axis] = step
        ahead, behind = (block.mlp(block.norm2((points + s * shift)[None]), None)[0][0] for s in (1, -1))
        torch.testing.assert_close(jacobian[:, :, axis], (ahead - behind).detach() / (2 * step), atol=1e-7, rtol=0)


def test_directions_that_norms_remove_are_counted_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    points = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    for norm, removed in (
        (lambda y: F.layer_norm(y, (8,), eps=1e-6), 2),
        (lambda y: F.rms_norm(y, (8,), eps=1e-6), 1),
        (lambda y: y, 0),
    ):
        found = token_spectrum(lambda y, norm=norm: norm(y) @ weight.T, points)
        assert found.zero.sum(dim=-1).tolist() == [removed] * 5
        assert float(found.sigma[found.zero].abs().max() if removed else 0.0) < 1e-3
        assert float(found.sigma[~found.zero].abs().min()) > 1e-2


def test_conditioning_of_eigenvalues() -> None:
    points = torch.ones(1, 2, dtype=torch.float64)
    symmetric = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    found = token_spectrum(lambda y: y @ symmetric, points)
    torch.testing.assert_close(found.condition, torch.ones(1, 2, dtype=torch.float64))
    nearly = torch.tensor([[1.0, 1.0], [0.0, 1.0 + 1e-6]], dtype=torch.float64)
    # 1 / |cosine| between (1, 0) and (-1e-6, 1) normalised: 1e6
    found = token_spectrum(lambda y: y @ nearly.T, points)
    torch.testing.assert_close(found.condition, torch.full((1, 2), 1e6, dtype=torch.float64), rtol=1e-3, atol=0)
    jordan = torch.tensor([[1.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    assert float(token_spectrum(lambda y: y @ jordan.T, points).condition.min()) > 1e12


def test_counting_pairs_never_splits_their_vectors() -> None:
    """Whatever the cut, conditions are those of the dense matrix: a conjugate pair may be cut between its halves."""
    generator = torch.Generator().manual_seed(4)
    matrix = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    points = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    sigma, right = torch.linalg.eig(-matrix)
    condition = torch.linalg.inv(right).norm(dim=-1) * right.norm(dim=0)
    for count in range(1, 16):
        found = image_spectrum(lambda y: (matrix @ y.flatten()).reshape(y.shape), points, count)
        assert found.sigma.shape == (1, count)
        for value, known in zip(found.sigma[0], found.condition[0], strict=True):
            nearest = (sigma - value).abs().argmin()
            assert float((sigma - value).abs()[nearest]) < 1e-6
            assert float(known) == pytest.approx(float(condition[nearest]), rel=1e-4)


def test_small_images_are_not_crowded_by_the_measurement() -> None:
    """Capacity never drops anything of four tokens, and must not of sixteen taken from several images."""
    net = tiny(router=TopKRouter(eval_capacity_factor=1.05), global_pool="avg", image_size=8)
    with record(net) as visits, torch.no_grad():
        net(torch.randn(8, 3, 8, 8))
    points = visits[0].point.double().flatten(0, 1)
    assert net.blocks[1].mlp.router.takes_tokens_alone(4, 4)
    together = token_jacobians(plain(net.blocks[1]), points[:16])
    alone = torch.cat([token_jacobians(plain(net.blocks[1]), point[None]) for point in points[:16]])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)
    assert float(together.abs().amax(dim=(1, 2)).min()) > 1e-3


def test_coupled_tokens_agree_with_the_dense_jacobian() -> None:
    net = tiny(router=SoftRouter())
    points = points_of(net, 3)[0]
    found = image_spectrum(plain(net.blocks[3]), points, 12)
    dense = -dense_jacobian(net, 3, points)
    sigma, right = torch.linalg.eig(dense)
    left = torch.linalg.inv(right)
    condition = left.norm(dim=-1) * right.norm(dim=0)
    order = sigma.abs().argsort(descending=True)[:12]
    torch.testing.assert_close(
        found.sigma[0].abs().sort(descending=True).values, sigma[order].abs(), atol=1e-6, rtol=1e-6
    )
    for value, known in zip(found.sigma[0], found.condition[0], strict=True):
        nearest = (sigma - value).abs().argmin()
        assert float((sigma - value).abs()[nearest]) < 1e-6
        assert float(known) == pytest.approx(float(condition[nearest]), rel=1e-4)


@pytest.mark.parametrize("router", [ExpertChoiceRouter(), TopKRouter(eval_capacity_factor=0.5)], ids=repr)
def test_routers_that_mix_tokens_are_taken_whole(router, tmp_path: Path) -> None:
    net = tiny(router=router, moe_layers=[1])
    rows = spectrum([subject(net, tmp_path)], images(), files(tmp_path), images=1, count=6)
    assert {row.part for row in rows} == {"largest"}
    points = points_of(net, 1)[0]
    largest = torch.linalg.eigvals(dense_jacobian(net, 1, points)).abs().max()
    assert rows[0].largest == pytest.approx(float(largest), rel=1e-5)


def test_coupled_tokens_with_a_norm_behind_the_step(tmp_path: Path, capsys) -> None:
    """1 - gamma sigma of whole images: the block's own step in reverse mode, at the momentum it had."""
    rule = Robust(gamma=0.9, mu=0.5, alpha=0.6, look_ahead="after_norm")
    net, seen = tiny(rule=rule, router=SoftRouter(), post_norm="all", moe_layers=[1, 3]), {}
    block = net.blocks[3]
    block.register_forward_pre_hook(lambda m, i: seen.__setitem__("p", i[1].momentum[0]))
    block.norm2.register_forward_hook(lambda m, i, o: seen.__setitem__("x", i[0]))
    with torch.no_grad():
        net(images()[0][:1] / 127.5 - 1)
    x, p = seen["x"].double(), seen["p"].double()
    rows = spectrum([subject(net, tmp_path)], images(), files(tmp_path), images=1, count=6)
    told = capsys.readouterr().out
    assert "leaves out its way with momentum" in told and "the norm's scale is left out" in told
    block = net.double().blocks[3]

    def step(flat: Tensor) -> Tensor:
        def u(y: Tensor, shift: Tensor) -> Tensor:
            return block.mlp(block.norm2(y) + shift, None)[0]

        return block.norm3(rule(flat.reshape(x.shape), u, (p,), 2, rule.coefficients())[0]).flatten()

    jacobian = torch.autograd.functional.jacobian(step, x.flatten())
    largest = (1 - torch.linalg.eigvals(jacobian)).abs().max()
    assert next(row for row in rows if row.block == 3).largest == pytest.approx(float(largest), rel=1e-4)


def test_tokens_grouped_over_images_are_refused(tmp_path: Path) -> None:
    net = tiny(router=TopKRouter(group_size=17 * 4, eval_capacity_factor=0.5))
    with pytest.raises(ValueError, match="router.group_size=68 mixes tokens of several images"):
        spectrum([subject(net, tmp_path)], images(), files(tmp_path))
    assert not (tmp_path / "out").exists()


def test_rows_and_files(tmp_path: Path) -> None:
    """Shares from the CSV of eigenvalues; two epochs draw the curve over training; the point u is taken at is seen."""
    subjects = [subject(tiny(rule=HeavyBall(0.5, 0.8)), tmp_path, "a", epoch) for epoch in (0, 1)]
    subjects += [subject(tiny(rule=SAM(rho=3.0)), tmp_path, "sam"), subject(tiny(rule=Adam()), tmp_path, "adam")]
    rows = spectrum(subjects, images(), files(tmp_path), tokens=5)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "x.csv", "x.png", "x_eigenvalues.csv", "x_epochs.png",
    ]  # fmt: skip
    assert len(rows) == 16
    with (tmp_path / "out" / "x_eigenvalues.csv").open(newline="") as file:
        details = list(csv.DictReader(file))
    own = [d for d in details if (d["model"], d["block"]) == ("a", "3")]
    assert {d["epoch"] for d in own} == {"2"} and len(own) == 5 * 64
    counted = [complex(float(d["real"]), float(d["imag"])) for d in own if d["layer_norm_zero"] == "0"]
    row = next(r for r in rows if (r.model, r.epoch, r.block) == ("a", 2, 3))
    assert (row.t, row.rule, row.tokens, row.eigenvalues, row.layer_norm_zeros) == (2, "HeavyBall", 5, 310, 10)
    assert row.gamma == pytest.approx(0.8)
    s = 0.8 * torch.tensor(counted)
    disc = ((1 - s).abs() < 1).double().mean()
    ellipse = (((s.real - 1.5) / 1.5) ** 2 + (s.imag / 0.5) ** 2 < 1).double().mean()
    assert (row.share_residual, row.share_rule) == (pytest.approx(float(disc)), pytest.approx(float(ellipse)))
    assert row.share_residual != row.share_rule
    assert row.largest == pytest.approx(float((0.8 * torch.tensor(counted).abs()).max()), rel=1e-5)
    conditions = torch.tensor([float(d["condition"]) for d in own if d["layer_norm_zero"] == "0"])
    assert row.near_defective == pytest.approx(float((conditions > 1e4).double().mean()))
    none = [(r.model, r.t) for r in rows if r.share_rule is None]
    assert none == [("sam", 1), ("sam", 2), ("sam", 3), ("sam", 4), ("adam", 1)]


def test_epochs_and_directories_side_by_side(tmp_path: Path) -> None:
    from vmoe_momentum.analysis.subjects import open_subjects
    from vmoe_momentum.models.directory import save

    net = tiny()
    save(net, tmp_path / "net")
    epochs = [subject(net, tmp_path, "a", epoch).saved.source for epoch in (0, 1)]
    subjects = open_subjects([f"a={path}" for path in epochs] + [f"b=local-dir:{tmp_path / 'net'}"], lambda saved: None)
    rows = spectrum(subjects, images(), files(tmp_path), tokens=2)
    assert [row.epoch for row in rows[::4]] == [1, 2, None]
    assert (tmp_path / "out" / "x_epochs.png").exists()


def test_momentum_is_the_first_buffer() -> None:
    from vmoe_momentum import Complex

    net = tiny(rule=Complex(0.7, 1.0))
    with record(net) as visits, torch.no_grad():
        net(images()[0] / 127.5 - 1)
    torch.testing.assert_close(visits[0].momentum, visits[0].update)  # the real part; the other is 0 at the first block


def test_u_is_taken_where_the_rule_evaluates_it() -> None:
    plain, ahead = tiny(rule=Residual()), tiny(rule=Robust())
    twice = tiny(rule=SAM(rho=3.0))
    with record(plain) as visits, torch.no_grad():
        plain(images()[0] / 127.5 - 1)
        before = visits[0]
    with record(twice) as visits, torch.no_grad():
        twice(images()[0] / 127.5 - 1)
        distance = (visits[0].point - before.point).norm(dim=-1)
    torch.testing.assert_close(distance, torch.full_like(distance, 3.0))
    with record(ahead) as visits, torch.no_grad():
        ahead(images()[0] / 127.5 - 1)
        first, second = visits[:2]
    torch.testing.assert_close(first.point, before.point)  # no momentum yet
    assert (second.update - twice.blocks[3].mlp(ahead.blocks[3].norm2(second.point))[0]).abs().max() < 1e-5
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ahead.modules())


@pytest.mark.parametrize(
    "rule",
    [
        Residual(gamma=0.7),
        HeavyBall(mu=0.6, gamma=0.8),
        Robust(gamma=0.9, mu=0.5, alpha=0.6, look_ahead="after_norm"),
        Nesterov(mu=0.7, look_ahead="after_norm"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("post_norm", [pytest.param("none", marks=pytest.mark.long), "all"])
def test_a_norm_behind_the_step_is_part_of_the_map(rule, post_norm: str, tmp_path: Path) -> None:
    """1 - gamma sigma are the eigenvalues of the block's own step at the momentum it had, its two zeros left out."""
    net = tiny(rule=rule, post_norm=post_norm)
    for block in net.blocks:  # scales that differ, as trained ones do
        if post_norm == "all":
            torch.nn.init.uniform_(block.norm3.weight, 0.3, 1.5, generator=torch.Generator().manual_seed(1))
    seen = {}
    block = net.blocks[7]
    block.register_forward_pre_hook(lambda m, i: seen.__setitem__("buffers", i[1].momentum))
    block.norm2.register_forward_hook(lambda m, i, o: seen.__setitem__("x", i[0]))
    with torch.no_grad():
        net(torch.cat(images()).float() / 127.5 - 1)
    x, buffers = seen["x"].double().flatten(0, 1), [b.double().flatten(0, 1) for b in seen["buffers"]]
    found = subject(net, tmp_path)
    spectrum([found], images(), files(tmp_path), tokens=102)
    with (tmp_path / "out" / "x_eigenvalues.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["block"] == "7"]
    block = net.double().blocks[7]
    gamma = rule.coefficients()["gamma"]
    order = torch.randperm(102, generator=torch.Generator().manual_seed(0))
    for number in (0, 1, 50):
        token = int(order[number])

        def step(y: Tensor, token: int = token) -> Tensor:
            def u(z: Tensor, shift: Tensor | float = 0.0) -> Tensor:
                return block.mlp(block.norm2(z) + (0.0 if shift is None else shift), None)[0]

            kept = tuple(b[token][None, None] for b in buffers)
            moved = block.rule(y[None, None], u, kept, block.step, block.momentum())[0]
            return block.norm3(moved)[0, 0]

        expected = torch.linalg.eigvals(torch.autograd.functional.jacobian(step, x[token]))
        own = [row for row in rows if row["token"] == str(number)]
        sigma = torch.tensor([complex(float(r["real"]), float(r["imag"])) for r in own], dtype=torch.complex128)
        same_set(1 - gamma * sigma, expected, 1e-4)
        zeros = torch.tensor([r["layer_norm_zero"] == "1" for r in own])
        assert int(zeros.sum()) == 2
        assert float(((1 - gamma * sigma) if post_norm == "all" else sigma)[zeros].abs().max()) < 1e-3
    with (tmp_path / "out" / "x.csv").open() as file:
        assert {row["post_norm"] for row in csv.DictReader(file)} == {str(int(post_norm == "all"))}
