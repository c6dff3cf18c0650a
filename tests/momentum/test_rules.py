"""Momentum rules: identities, an independent reference, and the stability limits of design section 2."""

import math

import pytest
import torch
from torch import Tensor

from vmoe_momentum.momentum import Coefficients, HeavyBall, MomentumRule, Residual

RULES = {
    "Residual": Residual(),
    "Residual 0.5": Residual(gamma=0.5),
    "HeavyBall": HeavyBall(),
    "HeavyBall 0.9": HeavyBall(mu=0.9, gamma=0.3),
    "HeavyBall learned": HeavyBall(mu=0.4, gamma=1.2, learn=True),
}


def roll_out(rule: MomentumRule, x: Tensor, updates: list) -> Tensor:
    """x after one block per update, as the network threads it."""
    buffers, coefficients = rule.init(x), Coefficients(rule).to(x.dtype)()
    for t, u in enumerate(updates, start=1):
        x, buffers = rule(x, u, buffers, t, coefficients)
    return x


def layers(count: int, width: int) -> list[Tensor]:
    return [torch.randn(width, width, dtype=torch.float64, requires_grad=True) / width**0.5 for _ in range(count)]


def test_heavy_ball_without_momentum_is_residual_bitwise() -> None:
    x = torch.randn(2, 5, 8)
    weights = [w.float() for w in layers(6, 8)]
    updates = [lambda y, w=w: torch.tanh(y @ w) for w in weights]
    assert torch.equal(roll_out(HeavyBall(mu=0.0, gamma=1.0), x, updates), roll_out(Residual(), x, updates))


def test_residual_is_the_plain_residual_connection_bitwise() -> None:
    x, weight = torch.randn(2, 5, 8), torch.randn(8, 8)
    assert torch.equal(roll_out(Residual(), x, [lambda y: torch.tanh(y @ weight)]), x + torch.tanh(x @ weight))


@pytest.mark.parametrize("name", RULES)
def test_against_a_scalar_recurrence_with_gradients(name: str) -> None:
    """Six layers with a non-linear u in float64: p_t and x_t by their formulas, written out without the rule."""
    rule, weights = RULES[name], layers(6, 4)
    x0 = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    mu, gamma = getattr(rule, "mu", 0.0), rule.gamma
    x, p = x0, torch.zeros_like(x0)
    for w in weights:
        p = mu * p + torch.sin(x @ w)
        x = x + gamma * p
    ours = roll_out(rule, x0, [lambda y, w=w: torch.sin(y @ w) for w in weights])
    tolerance = 1e-6 if rule.learned else 1e-12  # a learned mu goes through a float32 logit
    torch.testing.assert_close(ours, x, atol=tolerance, rtol=tolerance)
    if not rule.learned:
        for actual, expected in zip(
            torch.autograd.grad(ours.sum(), [x0, *weights]), torch.autograd.grad(x.sum(), [x0, *weights]), strict=True
        ):
            torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


def growth(rule: MomentumRule, jacobian: Tensor) -> float:
    """Ratio of successive norms of (x_t, x_{t-1}) after 300 steps of u = -jacobian x. Below 1: it converges."""
    x = torch.ones(1, 1, jacobian.shape[0], dtype=torch.float64)
    buffers, coefficients, previous, ratios = rule.init(x), rule.coefficients(), x, []
    for t in range(1, 301):
        before = torch.cat([x, previous], dim=-1)
        new, buffers = rule(x, lambda y: -y @ jacobian.T, buffers, t, coefficients)
        x, previous = new, x
        scale = torch.cat([x, previous], dim=-1).norm()
        ratios.append(float(scale / before.norm()))
        x, previous, buffers = x / scale, previous / scale, tuple(b / scale for b in buffers)
    return math.prod(ratios[-100:]) ** 0.01  # complex pairs make single ratios oscillate


def growth_complex(rule: MomentumRule, s: complex) -> float:
    """gamma sigma = s as a real 2x2 block."""
    sigma = s / rule.coefficients()["gamma"]
    return growth(rule, torch.tensor([[sigma.real, -sigma.imag], [sigma.imag, sigma.real]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("rule", "limit"),
    [(Residual(), 2.0), (Residual(gamma=0.5), 2.0), *((HeavyBall(mu, 0.8), 2 + 2 * mu) for mu in (0.0, 0.3, 0.7, 0.9))],
    ids=str,
)
def test_real_stability_limit_by_bisection(rule: MomentumRule, limit: float) -> None:
    """Proposition 1 and Corollary 1 of arXiv:2410.14574, found by running the rule: gamma sigma < limit, to 1e-3."""
    gamma = rule.coefficients()["gamma"]
    low, high = 0.5, 5.0
    while high - low > 2e-4:
        middle = (low + high) / 2
        sigma = torch.tensor([[middle / gamma]], dtype=torch.float64)
        low, high = (middle, high) if growth(rule, sigma) < 1.0 else (low, middle)
    assert abs(low - limit) < 1e-3
    assert growth(rule, torch.tensor([[-0.05]], dtype=torch.float64)) > 1.0  # and 0 is the other end


@pytest.mark.parametrize("mu", [0.3, 0.7])
def test_complex_stability_region_is_the_ellipse(mu: float) -> None:
    """20 points a little inside and outside ((Re s - (1+mu))/(1+mu))^2 + (Im s/(1-mu))^2 = 1."""
    for k in range(20):
        angle = 2 * math.pi * (k + 0.5) / 20
        direction = complex((1 + mu) * math.cos(angle), (1 - mu) * math.sin(angle))
        assert growth_complex(HeavyBall(mu, gamma=1.3), (1 + mu) + 0.99 * direction) < 1.0
        assert growth_complex(HeavyBall(mu, gamma=1.3), (1 + mu) + 1.01 * direction) > 1.0


@pytest.mark.parametrize("inside", [True, False])
def test_residual_region_is_the_unit_disc(inside: bool) -> None:
    for k in range(20):
        s = 1 + (0.99 if inside else 1.01) * complex(math.cos(k), math.sin(k))
        assert (growth_complex(Residual(), s) < 1.0) == inside


def test_momentum_narrows_the_region_along_the_imaginary_axis() -> None:
    """Design section 2: at s = 1 + 0.9i Residual contracts by 0.90, HeavyBall(0.7) grows by 1.45."""
    assert growth_complex(Residual(), 1 + 0.9j) == pytest.approx(0.90, abs=0.005)
    assert growth_complex(HeavyBall(0.7), 1 + 0.9j) == pytest.approx(1.45, abs=0.005)


def test_learned_coefficients_start_at_the_constants_and_stay_inside() -> None:
    coefficients = Coefficients(HeavyBall(mu=0.7, gamma=1.25, learn=True))
    assert {name for name, _ in coefficients.named_parameters()} == {"raw_mu", "raw_gamma"}
    assert float(coefficients()["mu"]) == pytest.approx(0.7, abs=1e-6)
    assert float(coefficients()["gamma"]) == pytest.approx(1.25, abs=1e-6)
    with torch.no_grad():
        coefficients.raw_mu += 6.0
    assert 0.7 < float(coefficients()["mu"]) < 1.0
    assert not list(Coefficients(HeavyBall()).parameters())


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: HeavyBall(mu=1.0), "HeavyBall.mu=1.0"),
        (lambda: HeavyBall(mu=-0.1), "HeavyBall.mu=-0.1"),
        (lambda: HeavyBall(mu=0.0, learn=True), "HeavyBall.mu=0.0"),
        (lambda: HeavyBall(learn=True, dense_blocks=True), "HeavyBall.dense_blocks=True"),
        (lambda: HeavyBall(gamma=0.0), "HeavyBall.gamma=0.0"),
        (lambda: Residual(gamma=float("nan")), "Residual.gamma=nan"),
    ],
)
def test_impossible_settings_are_named(make, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make()
