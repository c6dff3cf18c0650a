"""Eigenvalues of -du/dx, with the condition number of each. In float64.

u is the block's update; where a norm stands behind the step, the one that the plain step would need to lead there:
(norm(x + gamma u(x) + rest) - x) / gamma, so that 1 - gamma sigma are the eigenvalues of the block's map. rest is what
momentum added, held fixed.
    T tokens, N tokens of an image, D width, S eigenvalues.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigs
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from ..momentum import ThreadsCarry

ZERO = 1e-3  # a direction that J shrinks to this share of |J| is one LayerNorm removes (its eps leaves a rest)


class Eigenvalues(NamedTuple):
    """Of -du/dx at some tokens."""

    sigma: Tensor  # [T, S] complex128
    condition: Tensor  # [T, S] 1 / |cosine between left and right eigenvector|; 1 for normal matrices, NaN: unknown
    zero: Tensor  # [T, S] bool: a direction that LayerNorm removes, before the layer or behind the step


class Points(NamedTuple):
    """Where a block evaluates u, and how it goes on from there. Each [B, N, D] (or [T, D])."""

    x: Tensor
    shift: Tensor  # added behind the norm before the layer
    rest: Tensor  # added to x + gamma u(x)

    def split(self, size: int) -> "list[Points]":
        return [Points(*parts) for parts in zip(*(part.split(size) for part in self), strict=True)]


def has_post_norm(block: ThreadsCarry) -> bool:
    return not isinstance(block.norm3, nn.Identity)


def update_of(block: ThreadsCarry, gamma: float) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """u of a block in evaluation, in float64, as a function of x, shift and rest, all [B, N, D]."""
    block = copy.deepcopy(block).double().eval().requires_grad_(False)

    def u(x: Tensor, shift: Tensor, rest: Tensor) -> Tensor:
        update = block.ls2(block.mlp(block.norm2(x) + shift, None)[0])
        return (block.norm3(x + gamma * update + rest) - x) / gamma if has_post_norm(block) else update

    return u


def token_jacobians(u: Callable[[Tensor], Tensor], points: Tensor) -> Tensor:
    """du/dx of each token, for updates that take tokens one by one. points: [T, D] float64 -> [T, D, D]."""
    num_tokens, width = points.shape

    def column(direction: Tensor) -> Tensor:
        # one token an image: nothing that is counted over an image can come between them
        return jvp(u, (points[:, None],), (direction.expand(num_tokens, 1, width),))[1][:, 0]

    eye = torch.eye(width, dtype=points.dtype, device=points.device)
    columns = vmap(column, chunk_size=max(1, 2**18 // (num_tokens * width)))(eye)  # [column, T, row]
    return columns.permute(1, 2, 0)


def token_spectrum(u: Callable[[Tensor], Tensor], points: Tensor, gamma: float | None = None) -> Eigenvalues:
    """All D eigenvalues of each token. points: [T, D] float64. gamma: the step's, where a norm stands behind it."""
    jacobian = token_jacobians(u, points)
    sigma, right = torch.linalg.eig(-jacobian)
    left, info = torch.linalg.inv_ex(right)
    condition = left.norm(dim=-1) * right.norm(dim=-2)
    condition = condition.nan_to_num(nan=torch.inf).masked_fill((info != 0).unsqueeze(-1), torch.inf)
    if gamma is not None:  # what the norm removes, the map takes to 0
        radius = (1.0 - gamma * sigma).abs()
        return Eigenvalues(sigma.cpu(), condition.cpu(), (radius <= ZERO * radius.amax(-1, keepdim=True)).cpu())
    # Adding a constant to x, or scaling it about its mean, changes nothing behind LayerNorm (behind RMSNorm: scaling).
    plane = torch.stack([torch.ones_like(points), points], dim=-1)
    shrunk = torch.linalg.svdvals(jacobian @ torch.linalg.qr(plane).Q)
    size = torch.linalg.matrix_norm(jacobian, 2)
    removed = (shrunk <= ZERO * size.unsqueeze(-1)).sum(dim=-1)
    rank = sigma.abs().argsort(dim=-1).argsort(dim=-1)
    return Eigenvalues(sigma.cpu(), condition.cpu(), (rank < removed.unsqueeze(-1)).cpu())


def image_spectrum(u: Callable[[Tensor], Tensor], points: Tensor, count: int) -> Eigenvalues:
    """The `count` largest eigenvalues of a whole image, matrix-free, for updates that couple its tokens.

    points: [N, D] float64 -> [1, count]. ARPACK, Jacobian-vector products only.
    """
    back = vjp(u, points[None])[1]

    def forward_product(v: np.ndarray) -> np.ndarray:
        return -jvp(u, (points[None],), (_like(v, points),))[1].cpu().numpy().ravel()

    def backward_product(v: np.ndarray) -> np.ndarray:
        return -back(_like(v, points))[0].cpu().numpy().ravel()

    sigma, right = _arpack(forward_product, points.numel(), count)
    # more than `count`, and their conjugates: a cut may keep one of a pair here and the other there
    theirs, left = _arpack(backward_product, points.numel(), count + 4)
    theirs, left = np.r_[theirs, theirs.conj()], np.c_[left, left.conj()]
    distance = np.abs(sigma[:, None] - theirs[None])
    nearest = distance.argmin(axis=1)
    # J^T y = sigma y: the left eigenvector is y without conjugation
    cosine = np.abs((left[:, nearest] * right).sum(axis=0))
    found = distance.min(axis=1) < 1e-6 * np.abs(sigma).max()
    condition = np.where(found, 1.0 / np.maximum(cosine, 1e-300), np.nan)
    values = torch.from_numpy(sigma).unsqueeze(0)
    return Eigenvalues(values, torch.from_numpy(condition).unsqueeze(0), torch.zeros_like(values, dtype=torch.bool))


def _like(v: np.ndarray, points: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(v)).to(points).reshape(1, *points.shape)


def _arpack(product: Callable[[np.ndarray], np.ndarray], size: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start, count = np.random.default_rng(0).standard_normal(size), min(count, size - 2)
    # a disc of eigenvalues of like modulus converges slowly in ARPACK's own, small basis
    basis = min(size, max(4 * count, 60))
    try:
        sigma, vectors = eigs(operator, k=count, which="LM", v0=start, ncv=basis, tol=1e-10)
    except ArpackNoConvergence as error:
        if not len(error.eigenvalues):
            raise ValueError(f"--eigenvalues={count}: none of them converged; ask for fewer") from error
        sigma, vectors = error.eigenvalues, error.eigenvectors  # fewer, and the row says how many
    return sigma, vectors
