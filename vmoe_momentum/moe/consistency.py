"""Router consistency: images that look alike should reach the same experts. P pairs of tokens; other axes: __init__."""

from torch import Tensor

OFF_DIAGONAL = 10.0  # the published weights are 0.005 and 0.05


def router_consistency(gates: Tensor, partners: Tensor) -> Tensor:
    """Pairwise router consistency of one sparse block. gates, partners: [..., E], token by token the same patch -> [].

    C = E / P * sum over pairs of g h^T, [E, E]; the loss is mean((C_ee - 1)^2) + 10 mean(C_ef^2), e other than f: zero
    where both tokens of every pair go wholly to one and the same expert, and all experts to equally many. Gates are
    those without noise. Source: Kada et al., Robustifying Routers Against Input Perturbations for Sparse
    Mixture-of-Experts Vision Transformers (IEEE OJSP 6, 2025), as their code has it (m82kada/PRC at 61d3359,
    app/vmoe/nn/routing.py, matrix_top1_diagonal and matrix_top1_offdiagonal, weights of its ImageNet recipe).

    Of no pairs it is 0; with one expert there is nothing off the diagonal.
    """
    g, h = gates.flatten(0, -2), partners.flatten(0, -2)
    if not g.numel():
        return (g + h).sum()
    num_experts = g.shape[-1]
    joint = num_experts / len(g) * (g.T @ h)
    diagonal = joint.diagonal()
    together = (diagonal - 1).square().mean()
    if num_experts == 1:
        return together
    apart = (joint - diagonal.diag()).square().sum() / (num_experts * (num_experts - 1))
    return together + OFF_DIAGONAL * apart
