"""Every rule against its formulas written out, and the closed forms it must reduce to."""

import inspect
import math
from collections.abc import Callable

import pytest
import torch
from registered import registered
from torch import Tensor

from vmoe_momentum.momentum import (
    SAM,
    Adam,
    Coefficients,
    Complex,
    HeavyBall,
    MomentumRule,
    Nesterov,
    Residual,
    Robust,
)
from vmoe_momentum.specs import from_spec, to_spec

Layer = Callable[[Tensor], Tensor]
RULES = {
    "Residual": Residual(0.8),
    "HeavyBall": HeavyBall(0.6, 0.9),
    "Nesterov": Nesterov(0.5, 0.9),
    "Nesterov in time": Nesterov(gamma=0.7, schedule="time_varying"),
    "Complex": Complex(0.6, 0.4, 0.9),
    "Complex negative": Complex(0.6, math.pi),
    "Adam": Adam(eps=1e-3),
    "Adam 2": Adam(0.8, 0.9, 0.5, 1e-2, 0.1, 0.4, 0.9, adam_layers=2),
    "Adam everywhere": Adam(eps=1e-3, adam_layers=None, bias_correction=True),
    "Adam nowhere": Adam(adam_layers=0),
    "Robust": Robust(),
    "Robust direct": Robust(gamma=0.9, mu=0.4, alpha=0.3),
    "SAM": SAM(0.3, 0.9),
    "SAM detached": SAM(0.3, 0.9, detach_first=True),
}


def expected(rule: MomentumRule, x: Tensor, layers: list[Layer]) -> Tensor:
    """Design section 2, without the rule's code."""
    zero = torch.zeros_like(x)
    p, q, m, h = zero, zero, zero, zero
    for t, u in enumerate(layers, start=1):
        if isinstance(rule, Residual):
            x = x + rule.gamma * u(x)
        elif isinstance(rule, HeavyBall):
            p = rule.mu * p + u(x)
            x = x + rule.gamma * p
        elif isinstance(rule, Nesterov):
            mu = rule.mu if rule.schedule == "constant" else (t - 1) / (t + 2)
            p = mu * p + u(x + mu * rule.gamma * p)
            x = x + rule.gamma * p
        elif isinstance(rule, Complex):
            z = rule.mu * complex(math.cos(rule.phi), math.sin(rule.phi))
            p, q = z.real * p - z.imag * q + u(x), z.imag * p + z.real * q
            x = x + rule.gamma * p
        elif isinstance(rule, Adam):
            step = u(x)
            h = rule.mu * h + step
            if rule.adam_layers is not None and t > rule.adam_layers:
                x = x + rule.gamma2 * h
                continue
            p = rule.beta1 * p + (1 - rule.beta1) * step
            m = rule.beta2 * m + (1 - rule.beta2) * step**2
            one, two = (1 - rule.beta1**t, 1 - rule.beta2**t) if rule.bias_correction else (1.0, 1.0)
            x = x + rule.gamma1 * (p / one) / (m / two + rule.eps) ** 0.5 - rule.kappa * x
        elif isinstance(rule, Robust):
            if rule.L is None:
                gamma, mu, alpha = rule.gamma, rule.mu, rule.alpha
            else:
                k, r = rule.L / rule.m, rule.r
                gamma = k * (1 - r) ** 2 * (1 + r) / rule.L
                mu, alpha = k * r**3 / (k - 1), r**3 / ((k - 1) * (1 - r) ** 2 * (1 + r))
            p = mu * p + u(x + alpha * gamma * p)
            x = x + gamma * p
        else:
            first = u(x).detach() if rule.detach_first else u(x)
            x = x + rule.gamma * u(x - rule.rho * first / first.norm(dim=-1, keepdim=True))
    return x


def roll_out(rule: MomentumRule, x: Tensor, layers: list[Layer]) -> Tensor:
    buffers, coefficients = rule.init(x), Coefficients(rule)()
    for t, u in enumerate(layers, start=1):
        x, buffers = rule(x, u, buffers, t, coefficients)
    return x


def weights(count: int = 7, width: int = 4) -> list[Tensor]:
    return [torch.randn(width, width, dtype=torch.float64, requires_grad=True) for _ in range(count)]


def layers_of(matrices: list[Tensor]) -> list[Layer]:
    """sin is what the matrix's norm is in a block: a shift comes behind it."""

    def layer(w: Tensor) -> Layer:
        return lambda y, shift=None: torch.sin(y @ w) if shift is None else torch.sin(y @ w) + torch.sin(shift @ w)

    return [layer(w) for w in matrices]


@pytest.mark.parametrize("name", RULES)
def test_formulas_with_gradients(name: str) -> None:
    """Seven layers, non-linear u, float64: values and gradients to 1e-10."""
    matrices = weights()
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    outputs = [run(RULES[name], x, layers_of(matrices)) for run in (roll_out, expected)]
    torch.testing.assert_close(*outputs, atol=1e-10, rtol=1e-10)
    cotangent = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(y, [x, *matrices], cotangent) for y in outputs]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-10)


def test_every_rule_is_here_and_its_settings_travel() -> None:
    assert {type(rule) for rule in RULES.values()} == set(registered(MomentumRule).values())
    for rule in RULES.values():
        spec = to_spec(rule)
        assert to_spec(from_spec(spec, MomentumRule, "rule")) == spec


@pytest.mark.parametrize(
    ("special", "general"),
    [
        (HeavyBall(0.7, 0.9), Complex(0.7, 0.0, 0.9)),
        (Residual(0.9), Nesterov(0.0, 0.9)),
        (Residual(0.9), SAM(0.0, 0.9)),
        (Residual(0.9), HeavyBall(0.0, 0.9)),
        (HeavyBall(0.7, 0.9), Adam(mu=0.7, gamma2=0.9, adam_layers=0)),
        (HeavyBall(0.7, 0.9), Robust(gamma=0.9, mu=0.7, alpha=0.0)),
    ],
    ids=str,
)
def test_special_cases_are_bitwise(special: MomentumRule, general: MomentumRule) -> None:
    x, matrices = torch.randn(3, 5, 8), [torch.randn(8, 8) for _ in range(6)]
    assert torch.equal(roll_out(special, x, layers_of(matrices)), roll_out(general, x, layers_of(matrices)))


def test_adams_first_layer_by_hand_and_its_switch() -> None:
    """From zero buffers (1 - b1) u / sqrt((1 - b2) u^2 + eps), about 3.2 sign(u); then heavy ball on u1 and u2."""
    x, one, two = torch.randn(1, 1, 3, dtype=torch.float64), torch.tensor([2.0, -0.5, 1e-9]), torch.ones(3)
    rule = Adam()
    y = roll_out(rule, x, [lambda _: one.double()])
    torch.testing.assert_close(y - x, (0.1 * one / torch.sqrt(0.001 * one**2 + 1e-8)).double().view(1, 1, 3))
    assert abs(float((y - x)[0, 0, 0]) - 3.16) < 0.01
    z = roll_out(rule, x, [lambda _: one.double(), lambda _: two.double()])
    torch.testing.assert_close(z - y, (0.7 * one + two).double().view(1, 1, 3))


def test_robust_at_its_upper_end_evaluates_where_gradient_descent_does() -> None:
    """r = 1 - 1/k: the points y_t are those of gradient descent with step 1/L, exactly."""
    L, m = 2.0, 0.3
    rule = Robust(L=L, m=m, r=1 - m / L)
    curvature = torch.linspace(m, L, 9, dtype=torch.float64)
    seen: list[Tensor] = []

    def u(y: Tensor) -> Tensor:
        seen.append(y)
        return -curvature * y - 0.1 * torch.tanh(y)

    start = torch.randn(2, 3, 9, dtype=torch.float64)
    roll_out(rule, start, [u] * 8)
    points, visited = start, list(seen)
    for y in visited:
        torch.testing.assert_close(y, points, atol=1e-12, rtol=1e-12)
        points = points + (-curvature * points - 0.1 * torch.tanh(points)) / L


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_robust_contracts_by_r_on_quadratics(share: float) -> None:
    """The largest spectral radius over curvatures in [m, L] is r, attained at m."""
    L, m = 1.7, 0.2
    low, high = 1 - math.sqrt(m / L), 1 - m / L
    rule = Robust(L=L, m=m, r=low + share * (high - low))
    c, radii = rule.coefficients(), []
    for sigma in torch.linspace(m, L, 41, dtype=torch.float64).tolist():
        columns = []
        for start in ((1.0, 0.0), (0.0, 1.0)):  # the linear map of (x, p), by running the rule
            x, p = (torch.full((1, 1, 1), value, dtype=torch.float64) for value in start)
            x, (p,) = rule(x, lambda y, s=sigma: -s * y, (p,), 1, c)
            columns.append([float(x), float(p)])
        radii.append(float(torch.linalg.eigvals(torch.tensor(columns, dtype=torch.float64).T).abs().max()))
    assert max(radii) == pytest.approx(rule.r, abs=1e-6)
    assert radii[0] == pytest.approx(rule.r, abs=1e-6)


def test_sam_stands_still_where_the_update_is_zero_and_its_gradient_is_finite() -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.tensor([1.0, 0.0]).view(2, 1, 1)  # drop path: the second image skips
    y = roll_out(SAM(0.1), x, [lambda z: mask * torch.sin(z)])
    assert torch.equal(y[1], x[1])
    y.square().sum().backward()
    assert x.grad.isfinite().all()
    z = torch.zeros(1, 1, 4, requires_grad=True)
    roll_out(SAM(0.1), z, [lambda v: v * v]).sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Robust(L=1.0, m=0.25, r=0.8), r"Robust.r=0.8: use a number in .*= \[0.5, 0.75\], where k"),
        (lambda: Robust(L=1.0, m=0.25, r=0.4), r"Robust.r=0.4: use a number in"),
        (lambda: Robust(L=1.0, m=2.0, r=0.4), "Robust.L=1.0: use a number above Robust.m=2.0"),
        (lambda: Robust(L=1.0, m=0.0, r=0.4), "Robust.m=0.0"),
        (lambda: Robust(L=1.0), "give L, m and r, or gamma, mu and alpha"),
        (lambda: Robust(L=1.0, m=0.25, r=0.6, mu=0.4), "give L, m and r, or gamma, mu and alpha"),
        (lambda: Robust(gamma=1.0, mu=1.2, alpha=0.1), "Robust.mu=1.2"),
        (lambda: Robust(gamma=1.0, mu=0.2, alpha=-0.1), "Robust.alpha=-0.1"),
        (lambda: Nesterov(mu=1.0), "Nesterov.mu=1.0"),
        (lambda: Nesterov(schedule="cosine"), "Nesterov.schedule=cosine"),
        (lambda: Complex(phi=7.0), "Complex.phi=7.0"),
        (lambda: SAM(rho=-1.0), "SAM.rho=-1.0"),
        (lambda: Adam(kappa=2.0), "Adam.kappa=2.0"),
        (lambda: Adam(adam_layers=-1), "Adam.adam_layers=-1"),
        (lambda: Adam(eps=0.0), "Adam.eps=0.0"),
    ],
)
def test_impossible_settings_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_robust_takes_its_ends() -> None:
    for k in (1.5, 4.0, 1e6):
        Robust(L=1.0, m=1 / k, r=1 - 1 / k)
        Robust(L=1.0, m=1 / k, r=1 - 1 / math.sqrt(k))


CHANGES = {
    Residual: {"gamma": 0.5},
    HeavyBall: {"mu": 0.5, "gamma": 0.5, "learn": True},
    Nesterov: {"mu": 0.5, "gamma": 0.5, "schedule": "time_varying", "look_ahead": "after_norm"},
    Complex: {"mu": 0.5, "phi": 0.1, "gamma": 0.5},
    Adam: {
        "beta1": 0.5, "beta2": 0.5, "gamma1": 0.5, "eps": 1e-2, "kappa": 0.5, "mu": 0.5, "gamma2": 0.5,
        "adam_layers": 2, "bias_correction": True,
    },
    SAM: {"rho": 0.5, "gamma": 0.5, "detach_first": True},
}  # fmt: skip


@pytest.mark.parametrize(("cls", "name"), [(cls, name) for cls, names in CHANGES.items() for name in names])
def test_every_setting_changes_something(cls: type[MomentumRule], name: str) -> None:
    """The outcome, its gradient, or what is learned. dense_blocks: tests/models/test_vit.py."""
    assert set(CHANGES[cls]) == set(inspect.signature(cls).parameters) - {"dense_blocks"}
    seen = []
    for rule in (cls(), cls(**{name: CHANGES[cls][name]})):
        torch.manual_seed(1)
        matrices = weights()
        y = roll_out(rule, torch.ones(1, 2, 4, dtype=torch.float64), layers_of(matrices))
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(y.sum(), matrices)])
        seen.append((y, gradient, len(list(Coefficients(rule).parameters()))))
    (a, ga, na), (b, gb, nb) = seen
    assert not torch.equal(a, b) or not torch.equal(ga, gb) or na != nb


@pytest.mark.parametrize("name", ["L", "m", "r", "gamma", "mu", "alpha"])
def test_every_setting_of_robust_changes_something(name: str) -> None:
    base = {"L": 1.0, "m": 0.25, "r": 0.6} if name in "Lmr" else {"gamma": 0.9, "mu": 0.4, "alpha": 0.3}
    other = {**base, name: base[name] * 1.05}
    assert Robust(**base).coefficients() != Robust(**other).coefficients()


@pytest.mark.parametrize("cls", [Nesterov, Robust])
def test_looking_ahead_behind_the_norm_hands_the_shift_over(cls: type[MomentumRule]) -> None:
    """The same step with u(x, shift) for u(x + shift), where u is linear in both."""
    matrix = torch.randn(4, 4, dtype=torch.float64)
    x, seen = torch.randn(1, 2, 4, dtype=torch.float64), []

    def u(y: Tensor, shift: Tensor | None = None) -> Tensor:
        seen.append(shift)
        return (y if shift is None else y + shift) @ matrix

    outcomes = []
    for place in ("before_norm", "after_norm"):
        rule = cls(look_ahead=place)
        buffers, y = rule.init(x), x
        for t in (1, 2, 3):
            y, buffers = rule(y, u, buffers, t, rule.coefficients())
        outcomes.append(y)
    torch.testing.assert_close(*outcomes)
    assert [shift is None for shift in seen] == [True] * 3 + [False] * 3


# ---- half types

SMALL = {"Adam as published": Adam(), "SAM near": SAM(0.5)}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e-5, 3e3])
@pytest.mark.parametrize("name", [*RULES, *SMALL])
def test_half_streams_are_stepped_in_float32(name: str, size: float, dtype: torch.dtype) -> None:
    """Updates whose squares vanish or overflow in float16; Adam's eps, which is 0 in it."""
    rule = {**RULES, **SMALL}[name]
    x = torch.randn(3, 2, 4).to(dtype)
    layers = [lambda y, w=w: (size * torch.sin(y.float() @ w.float())).to(y.dtype) for w in weights(4)]
    buffers, coefficients, exact = rule.init(x), Coefficients(rule)(), x.float()
    precise = rule.init(exact)
    for t, u in enumerate(layers, start=1):  # from the same x each time: only one step is rounded
        moved, buffers = rule(x, u, buffers, t, coefficients)
        expected, precise = rule(x.float(), lambda y, u=u: u(y.to(dtype)).float(), precise, t, coefficients)
        assert moved.dtype == dtype and all(buffer.dtype == torch.float32 for buffer in buffers)
        assert torch.equal(moved, expected.to(dtype)) and moved.isfinite().all()
        assert all(torch.equal(a, b) for a, b in zip(buffers, precise, strict=True))
        x = moved


def test_learned_scalars_of_half_networks_are_float32() -> None:
    scalars = Coefficients(HeavyBall(learn=True)).half()()
    assert {value.dtype for value in scalars.values()} == {torch.float32}
