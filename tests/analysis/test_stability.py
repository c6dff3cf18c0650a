"""Regions found by running the rules, against closed forms."""

import math

import numpy as np
import pytest
import torch
from registered import registered

from vmoe_momentum.analysis import residual_radius, spectral_radius, step_size
from vmoe_momentum.momentum import SAM, Adam, Complex, HeavyBall, MomentumRule, Nesterov, Residual, Robust

LINEAR = [
    Residual(0.7), HeavyBall(0.7, 0.8), Nesterov(0.6, 0.9), Complex(0.7, 0.4, 1.1), Complex(0.5, math.pi), Robust(),
    Robust(gamma=0.5, mu=0.3, alpha=0.9),
]  # fmt: skip


def plane(count: int = 400) -> torch.Tensor:
    """Complex numbers over and around all regions."""
    generator = torch.Generator().manual_seed(1)
    real = torch.rand(count, generator=generator, dtype=torch.float64) * 6 - 1.5
    return torch.complex(real, torch.rand(count, generator=generator, dtype=torch.float64) * 4 - 2)


def radius(rule: MomentumRule, sigma: torch.Tensor, t: int = 1) -> torch.Tensor:
    found = spectral_radius(rule, t, rule.coefficients(), sigma)
    assert found is not None
    return found


def largest_root(*coefficients: np.ndarray) -> torch.Tensor:
    """Of monic polynomials, coefficients [S] from the second highest power down."""
    return torch.tensor([np.abs(np.roots([1, *column])).max() for column in zip(*coefficients, strict=True)])


def recurrence(s: np.ndarray, mu: float, alpha: float) -> torch.Tensor:
    """x_t+1 = x_t + mu (x_t - x_t-1) - s (x_t + alpha (x_t - x_t-1)): roots of its characteristic polynomial."""
    return largest_root(-(1 + mu - s * (1 + alpha)), mu - s * alpha)


def test_residual_is_a_disc() -> None:
    sigma = plane()
    torch.testing.assert_close(radius(Residual(0.7), sigma), (1 - 0.7 * sigma).abs())
    torch.testing.assert_close(residual_radius(0.7, sigma), (1 - 0.7 * sigma).abs())


@pytest.mark.parametrize("mu", [0.0, 0.3, 0.7, 0.95])
def test_heavy_ball_is_an_ellipse_and_its_companion(mu: float) -> None:
    gamma, sigma = 0.8, plane()
    s = gamma * sigma
    found = radius(HeavyBall(mu, gamma), sigma)
    ellipse = ((s.real - (1 + mu)) / (1 + mu)) ** 2 + (s.imag / (1 - mu)) ** 2
    clear = (ellipse - 1).abs() > 1e-6
    assert torch.equal((found < 1)[clear], (ellipse < 1)[clear])
    assert 0 < int((ellipse < 1).sum()) < len(s)
    companion = torch.zeros(len(s), 2, 2, dtype=torch.complex128)
    companion[:, 0, 0], companion[:, 0, 1], companion[:, 1, 0] = 1 + mu - s, -mu, 1
    torch.testing.assert_close(found, torch.linalg.eigvals(companion).abs().amax(-1), atol=1e-7, rtol=0)


def test_momentum_can_break_what_residual_contracts() -> None:
    """The design's example, s = 1 + 0.9 i."""
    sigma = torch.tensor([1 + 0.9j])
    assert float(radius(Residual(), sigma)) == pytest.approx(0.90, abs=0.005)
    assert float(radius(HeavyBall(0.7), sigma)) == pytest.approx(1.45, abs=0.005)


@pytest.mark.parametrize("rule", LINEAR, ids=repr)
def test_real_and_complex_eigenvalues_by_the_recurrence(rule: MomentumRule) -> None:
    sigma, c = plane(), rule.coefficients()
    s = (c["gamma"] * sigma).numpy()
    if isinstance(rule, Complex):  # (x, Re p, Im p), written out
        mu, cos, sin = c["mu"], math.cos(c["phi"]), math.sin(c["phi"])
        matrix = np.zeros((len(s), 3, 3), dtype=complex)
        matrix[:, 1] = np.stack([-sigma.numpy(), np.full(len(s), mu * cos), np.full(len(s), -mu * sin)], axis=-1)
        matrix[:, 2] = [0, mu * sin, mu * cos]
        matrix[:, 0] = c["gamma"] * matrix[:, 1]
        matrix[:, 0, 0] += 1
        expected = torch.from_numpy(np.abs(np.linalg.eigvals(matrix)).max(axis=-1))
    elif isinstance(rule, Residual):
        expected = (1 - torch.from_numpy(s)).abs()
    else:
        alpha = {HeavyBall: 0.0, Nesterov: c["mu"]}.get(type(rule), c.get("alpha"))
        expected = recurrence(s, c["mu"], alpha)
    torch.testing.assert_close(radius(rule, sigma), expected, atol=1e-7, rtol=0)


@pytest.mark.parametrize("rule", LINEAR, ids=repr)
def test_the_radius_is_the_growth_of_a_long_run(rule: MomentumRule) -> None:
    """By definition: 4,000 steps on x' = -sigma x, in real numbers."""
    sigma = torch.tensor([0.3 + 0.2j, 1.5 + 0.1j, -0.1 + 0.3j, 3.0 + 0.4j], dtype=torch.complex128)
    x = torch.ones(1, 4, 2, dtype=torch.float64)
    buffers, log = rule.init(x), torch.zeros(4, dtype=torch.float64)

    def u(y: torch.Tensor) -> torch.Tensor:
        return -torch.view_as_real(sigma * torch.view_as_complex(y.contiguous()))

    for t in range(1, 4001):
        x, buffers = rule(x, u, buffers, t, rule.coefficients())
        size = x.norm(dim=-1, keepdim=True)
        x, buffers = x / size, tuple(p / size for p in buffers)
        log = log + size.log().flatten()
    torch.testing.assert_close((log / 4000).exp(), radius(rule, sigma), atol=3e-3, rtol=0)


@pytest.mark.parametrize(("L", "m", "r"), [(1.0, 0.25, 0.6), (1.0, 0.25, 0.5), (4.0, 0.1, 0.975), (2.0, 0.5, 0.75)])
def test_robust_contracts_by_r_on_its_curvatures(L: float, m: float, r: float) -> None:  # noqa: N803
    rule = Robust(L=L, m=m, r=r)
    worst = radius(rule, torch.linspace(m, L, 201, dtype=torch.float64))
    assert float(worst.max()) == pytest.approx(r, abs=1e-6)
    assert float(radius(rule, torch.tensor([m]))) == pytest.approx(r, abs=1e-6)


def test_nesterovs_schedule_is_taken_at_its_step() -> None:
    rule, sigma = Nesterov(schedule="time_varying"), plane()
    for t in (1, 2, 5):
        mu = (t - 1) / (t + 2)
        expected = recurrence(sigma.numpy(), mu, mu)
        torch.testing.assert_close(radius(rule, sigma, t), expected, atol=1e-7, rtol=0)


def test_rules_that_are_not_linear_have_no_region() -> None:
    sigma = plane(5)
    for rule, t in ((SAM(), 1), (Adam(), 1), (Adam(adam_layers=None), 9)):
        assert spectral_radius(rule, t, rule.coefficients(), sigma) is None


def test_adam_after_its_layers_is_heavy_ball_whatever_the_idle_buffers_hold() -> None:
    sigma = plane()
    expected = radius(HeavyBall(0.6, 1.3), sigma)
    assert (expected < 1).any()
    torch.testing.assert_close(radius(Adam(mu=0.6, gamma2=1.3), sigma, t=2), expected)


@pytest.mark.parametrize("name", sorted(registered(MomentumRule)))
def test_every_rule_answers(name: str) -> None:
    rule = registered(MomentumRule)[name]()
    assert step_size(rule, 2, rule.coefficients()) > 0
    found = spectral_radius(rule, 2, rule.coefficients(), plane(5))
    assert found is None or (found.shape == (5,) and found.isfinite().all())


def test_step_size_is_gamma() -> None:
    for rule, t, gamma in ((HeavyBall(0.7, 0.4), 3, 0.4), (Adam(gamma2=0.3), 2, 0.3), (SAM(gamma=1.7), 1, 1.7)):
        assert step_size(rule, t, rule.coefficients()) == pytest.approx(gamma)
