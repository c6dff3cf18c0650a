"""Where a momentum rule is stable, found by running the rule itself on linear updates.

Near a fixed point u(x) is about J x. For an eigenvalue sigma of -J the rule turns (x, buffers) into M(sigma) (x,
buffers); it contracts there iff the spectral radius of M is below 1 (arXiv:2410.14574 for real sigma; expert Jacobians
are not symmetric, so sigma is complex in general). With s = gamma sigma: for Residual that is the disc |1 - s| < 1, for
HeavyBall the ellipse ((Re s - (1 + mu)) / (1 + mu))^2 + (Im s / (1 - mu))^2 < 1, narrower along the imaginary axis.

Left out, as sigma says nothing of it: that a norm behind the step acts on the momentum, too, and the scale of the norm
where a rule looks ahead behind it, which is taken for a look-ahead in the stream.

A new rule needs nothing here. Rules that are not linear in (x, buffers), as SAM and Adam's own step, have no region.
    S eigenvalues; a complex number is a pair, on which -sigma acts as a 2x2 matrix.
"""

import torch
from torch import Tensor

from ..momentum import MomentumRule, Residual
from ..momentum.base import Scalars


def step_size(rule: MomentumRule, t: int, coefficients: Scalars) -> float:
    """gamma: how far x moves, from empty buffers, for a constant update of 1."""
    x = torch.zeros(1, 1, 1, dtype=torch.float64)
    with torch.no_grad():
        return float(rule(x, lambda y, shift=None: torch.ones_like(y), rule.init(x), t, coefficients)[0])


def spectral_radius(rule: MomentumRule, t: int, coefficients: Scalars, sigma: Tensor) -> Tensor | None:
    """Factor by which one step at the t-th MoE block grows (x, buffers) in the long run; None for non-linear rules.

    sigma: [S] complex eigenvalues of -du/dx -> [S] float64.
    """
    sigma = sigma.to(torch.complex128)
    matrix = _transition(rule, t, coefficients, sigma)
    if matrix is None:
        return None
    return torch.linalg.eigvals(matrix).abs().amax(dim=-1)


def residual_radius(gamma: float, sigma: Tensor) -> Tensor:
    """|1 - gamma sigma|, for comparison at the same step size."""
    radius = spectral_radius(Residual(gamma), 1, {"gamma": gamma}, sigma)
    assert radius is not None  # a linear rule
    return radius


@torch.no_grad()
def _transition(rule: MomentumRule, t: int, coefficients: Scalars, sigma: Tensor) -> Tensor | None:
    """M [S, 2n, 2n] over x and the buffers that x ever depends on; None where the rule is not linear in them."""
    real, imaginary = sigma.real, sigma.imag
    minus_sigma = torch.stack([-real, imaginary, -imaginary, -real], dim=-1).reshape(-1, 2, 2)

    def u(y: Tensor, shift: Tensor | None = None) -> Tensor:  # [any, S, 2]
        y = y if shift is None else y + shift
        return torch.einsum("sij,bsj->bsi", minus_sigma, y)

    parts = 1 + len(rule.init(torch.zeros(1, 1, 2)))
    size = 2 * parts

    def step(state: Tensor) -> Tensor:
        """[any, S, 2n] -> the same."""
        x, *buffers = state.unflatten(-1, (parts, 2)).unbind(dim=-2)
        x, buffers = rule(x, u, tuple(buffers), t, coefficients)
        return torch.cat([x, *buffers], dim=-1)

    basis = torch.eye(size, dtype=torch.float64).unsqueeze(1).expand(-1, len(sigma), -1)
    matrix = step(basis).permute(1, 2, 0)  # columns are images of the basis
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, len(sigma), size, generator=generator, dtype=torch.float64)
    linear = torch.einsum("sij,bsj->bsi", matrix, probe)
    if not torch.allclose(step(probe), linear, rtol=1e-9, atol=1e-9):
        return None
    kept = _seen_by_x(matrix)
    return matrix[:, kept][:, :, kept]


def _seen_by_x(matrix: Tensor) -> Tensor:
    """[2n] bool: coordinates that x depends on after some steps. Others, such as idle buffers, say nothing of it."""
    touches = (matrix != 0).any(dim=0)
    seen = torch.zeros(matrix.shape[-1], dtype=torch.bool)
    seen[:2] = True
    for _ in range(matrix.shape[-1]):
        seen = seen | touches[seen].any(dim=0)
    return seen
