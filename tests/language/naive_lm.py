"""A sparse language model written out token by token in float64. Nothing is shared with the package but the names of
its tensors; torch gives numbers that know their gradients.

One stream of text at a time. A token is a list of layers' states; the past begins with `context` zeros.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Step = Callable[[Tensor, Callable[[Tensor], Tensor], dict, int], Tensor]  # (h, u, buffers of this token, t) -> h


class Facts(NamedTuple):
    """What the tensors do not say."""

    context: int
    heads: int
    top_k: int
    released: bool
    step: Step
    dense_step: Step | None = None  # None: h + u(h)


def log_probabilities(weights: Weights, facts: Facts, words: list[int]) -> Tensor:
    """[N, V], of the word behind each."""
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
    width = weights["embed.weight"].shape[1]
    zeros = torch.zeros(width, dtype=torch.float64)
    inputs: list[list[Tensor]] = [[zeros] * facts.context for _ in range(depth)]
    found = []
    for word in words:
        x, buffers, t = weights["embed.weight"][word], {}, 0
        for layer in range(depth):
            own = {n.split(".", 2)[2]: w for n, w in weights.items() if n.startswith(f"blocks.{layer}.")}
            seen = inputs[layer][-facts.context :]
            attended = attention(own, facts.heads, weights["distances"], x, seen)
            inputs[layer].append(x)
            h = layer_norm(x + attended, own, "norm1")
            if "fc1.weight" in own:
                u = partial(feed_forward, own)
                moved = h + u(h) if facts.dense_step is None else facts.dense_step(h, u, buffers, t)
                x = layer_norm(moved, own, "norm3")
                continue
            t += 1
            moved = facts.step(h, partial(experts, own, facts.top_k), buffers, t)
            x = layer_norm(moved, own, "norm3")
            if facts.released:
                x = layer_norm(h + x, own, "norm4")
        logits = weights["head.weight"] @ x + weights["head.bias"]
        found.append(logits - logits.max() - torch.log(torch.exp(logits - logits.max()).sum()))
    return torch.stack(found)


def attention(own: Weights, heads: int, distances: Tensor, x: Tensor, seen: list[Tensor]) -> Tensor:
    """distances: [L, d], of the farthest first."""
    width = x.shape[0]
    size = width // heads
    results = []
    for head in range(heads):
        rows = slice(head * size, (head + 1) * size)
        q = own["attn.q.weight"][rows] @ x
        scores, values = [], []
        for place, before in enumerate(seen):
            k = own["attn.kv.weight"][:width][rows] @ before
            values.append(own["attn.kv.weight"][width:][rows] @ before)
            scores.append((q @ k + q @ distances[place]) / math.sqrt(size))
        total = sum(torch.exp(score) for score in scores)
        results.append(sum(torch.exp(score) / total * value for score, value in zip(scores, values, strict=True)))
    return own["attn.proj.weight"] @ torch.cat(results)


def experts(own: Weights, top_k: int, y: Tensor) -> Tensor:
    logits = own["mlp.router.weight"] @ y + own["mlp.router.bias"]
    chosen = sorted(range(len(logits)), key=lambda e: (-float(logits[e]), e))[:top_k]
    total = sum(torch.exp(logits[e]) for e in chosen)
    outputs = []
    for e in chosen:
        hidden = relu(own["mlp.experts.fc1.weight"][e] @ y + own["mlp.experts.fc1.bias"][e])
        made = own["mlp.experts.fc2.weight"][e] @ hidden + own["mlp.experts.fc2.bias"][e]
        outputs.append(torch.exp(logits[e]) / total * made)
    return sum(outputs)


def feed_forward(own: Weights, y: Tensor) -> Tensor:
    return own["fc2.weight"] @ relu(own["fc1.weight"] @ y + own["fc1.bias"]) + own["fc2.bias"]


def layer_norm(x: Tensor, own: Weights, name: str) -> Tensor:
    centred = x - x.mean()
    return centred / torch.sqrt((centred * centred).mean() + 1e-5) * own[f"{name}.weight"] + own[f"{name}.bias"]


def relu(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 0.0)


# ---- rules, from their formulas; `buffers` is this token's own


def residual(h, u, buffers, t):
    return h + u(h)


def heavy_ball(h, u, buffers, t, mu=0.7):
    buffers["p"] = mu * buffers.get("p", 0.0) + u(h)
    return h + buffers["p"]


def nesterov(h, u, buffers, t, mu=0.7):
    buffers["p"] = mu * buffers.get("p", 0.0) + u(h + mu * buffers.get("p", torch.zeros_like(h)))
    return h + buffers["p"]


def adam_released(h, u, buffers, t, mu=0.7, gamma1=0.8, beta1=0.9, beta2=0.999):
    """Adam in the first sparse layer, whose output has no skip connection; heavy ball behind it."""
    step = u(h)
    buffers["p"] = mu * buffers.get("p", 0.0) + step
    if t == 1:
        return gamma1 * (1 - beta1) * step / torch.sqrt((1 - beta2) * step * step + 1e-8)
    return h + buffers["p"]


def robust(h, u, buffers, t, L=1.0, m=0.8, r=0.2):
    """arXiv:2410.14574, kappa = L / m: p' = mu p + u(h + alpha gamma p)."""
    kappa = L / m
    gamma = kappa * (1 - r) ** 2 * (1 + r) / L
    mu, alpha = kappa * r**3 / (kappa - 1), r**3 / ((kappa - 1) * (1 - r) ** 2 * (1 + r))
    before = buffers.get("p", torch.zeros_like(h))
    buffers["p"] = mu * before + u(h + alpha * gamma * before)
    return h + gamma * buffers["p"]
