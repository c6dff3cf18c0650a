"""Auxiliary losses of a router, one value per group: [G, S, E] -> [G]. Legend of axes: this folder's __init__.

Source: V-MoE, arXiv:2106.05974, appendix A.2, and google-research/vmoe, vmoe/nn/routing.py at 942a78b, whose values
these reproduce (population variance; per group).
"""

import torch
from torch import Tensor


def _squared_variation(per_expert: Tensor) -> Tensor:
    """(std / mean)^2 over the last axis, population std; no square root, whose gradient is undefined at balance."""
    var, mean = torch.var_mean(per_expert, dim=-1, correction=0)
    return var / mean.square()


def importance_loss(gates: Tensor) -> Tensor:
    """Squared coefficient of variation of the experts' summed gates. gates: [G, S, E], clean softmax. -> [G]."""
    return _squared_variation(gates.sum(dim=1))


def load_loss(logits: Tensor, noisy_logits: Tensor, top_index: Tensor, noise_std: float) -> Tensor:
    """Squared coefficient of variation of each expert's mean probability of being chosen if the noise were redrawn.

    logits, noisy_logits: [G, S, E]; top_index: [G, S, K], experts chosen on the noisy logits, best first; noise_std:
    the standard deviation that was added (noise_std / E in V-MoE). The threshold is the K-th largest noisy logit, for
    every expert alike; gradients flow through it and through the clean logits. -> [G].
    """
    threshold = noisy_logits.gather(-1, top_index[..., -1:])
    chosen = torch.special.ndtr((logits - threshold) / noise_std)  # 1 - Phi(z) = Phi(-z)
    return _squared_variation(chosen.mean(dim=1))


def gshard_loss(gates: Tensor, top_index: Tensor) -> Tensor:
    """E * sum_e (share of tokens whose best expert is e) * (mean gate of e); 1 when balanced. -> [G].

    Source: GShard, arXiv:2006.16668, Algorithm 1, with the factor E of their code. gates: [G, S, E], those used to
    choose; top_index: [G, S, K], best first. The share has no gradient.
    """
    num_experts = gates.shape[-1]
    experts = torch.arange(num_experts, device=gates.device)
    share = (top_index[..., :1] == experts).to(gates.dtype).mean(dim=1)
    return num_experts * (share * gates.mean(dim=1)).sum(dim=-1)


def mean(x: Tensor) -> Tensor:
    """Of all elements, []; 0 where there are none, as in an empty batch."""
    return x.mean() if x.numel() else x.sum()
