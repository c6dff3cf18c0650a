"""A V-MoE written out in float64 loops over flax parameters: what tests/oracles does not cover is compared with this.

Nothing is shared with the package. Images are NHWC; names are those of a flax checkpoint, without `params/`.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from scipy.special import softmax

Array = np.ndarray
Params = Mapping[str, Array]
Route = Callable[[Params, str, Array], Array]  # (params, "Encoder/encoderblock_1/Moe", tokens [S, D]) -> [S, D]


def below(params: Params, name: str) -> dict[str, Array]:
    return {key[len(name) + 1 :]: value for key, value in params.items() if key.startswith(name + "/")}


def gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x: Array, scale: Array, bias: Array | float = 0.0) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-6) * scale + bias


def mlp(x: Array, p: Params, expert: int | None = None) -> Array:
    kernels = [p[f"Dense_{i}/kernel"] if expert is None else p[f"Dense_{i}/kernel"][expert] for i in (0, 1)]
    biases = [p[f"Dense_{i}/bias"] if expert is None else p[f"Dense_{i}/bias"][expert] for i in (0, 1)]
    return gelu(x @ kernels[0] + biases[0]) @ kernels[1] + biases[1]


def attention(queries: Array, keys: Array, p: Params) -> Array:
    """One image: [Nq, D], [N, D] -> [Nq, D]."""
    q, k, v = (
        np.einsum("nd,dhe->hne", x, p[f"{name}/kernel"]) + p[f"{name}/bias"][:, None]
        for name, x in (("query", queries), ("key", keys), ("value", keys))
    )
    if "query_ln/scale" in p:
        q, k = layer_norm(q, p["query_ln/scale"]), layer_norm(k, p["key_ln/scale"])
    weights = softmax(q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1]), axis=-1)
    return np.einsum("hne,hed->nd", weights @ v, p["out/kernel"]) + p["out/bias"]


def top_k(k: int, slots: int | None, batch_priority: bool = False, renormalize: bool = False) -> Route:
    def route(params: Params, name: str, x: Array) -> Array:
        gates = softmax(x @ params[f"{name}/Router/dense/kernel"], axis=-1)
        num_tokens, num_experts = gates.shape
        chosen = [sorted(range(num_experts), key=lambda e, g=g: (-g[e], e))[:k] for g in gates]
        order = sorted(range(num_tokens), key=lambda s: -gates[s].max()) if batch_priority else range(num_tokens)
        used, y = [0] * num_experts, np.zeros_like(x)
        for rank in range(k):
            for s in order:
                e = chosen[s][rank]
                used[e] += 1
                if slots is None or used[e] <= slots:
                    weight = gates[s, e] / (gates[s, chosen[s]].sum() if renormalize else 1.0)
                    y[s] += weight * mlp(x[s], below(params, f"{name}/Mlp"), e)
        return y

    return route


def expert_choice(slots: int) -> Route:
    def route(params: Params, name: str, x: Array) -> Array:
        gates, y = softmax(x @ params[f"{name}/Router/dense/kernel"], axis=-1), np.zeros_like(x)
        for e in range(gates.shape[1]):
            for s in sorted(range(len(x)), key=lambda s, e=e: (-gates[s, e], s))[:slots]:
                y[s] += gates[s, e] * mlp(x[s], below(params, f"{name}/Mlp"), e)
        return y

    return route


def soft(params: Params, name: str, x: Array) -> Array:
    mu, scale = params[f"{name}/Router/mu"], params[f"{name}/Router/scale"]
    num_experts, num_slots = mu.shape[1:]
    unit = [row / math.sqrt((row**2).sum() + 1e-6) for row in x]
    logits = np.empty((len(x), num_experts, num_slots))
    for e in range(num_experts):
        for p in range(num_slots):
            direction = mu[:, e, p] / math.sqrt((mu[:, e, p] ** 2).sum() + 1e-6)
            logits[:, e, p] = [scale * row @ direction for row in unit]
    dispatch = softmax(logits, axis=0)
    combine = softmax(logits.reshape(len(x), -1), axis=1).reshape(logits.shape)
    y = np.zeros_like(x)
    for e in range(num_experts):
        for p in range(num_slots):
            y += combine[:, e, p, None] * mlp(dispatch[:, e, p] @ x, below(params, f"{name}/Mlp"), e)
    return y


def sincos2d(rows: int, columns: int, width: int) -> Array:
    table, quarter = np.zeros((rows * columns, width)), width // 4
    for y in range(rows):
        for x in range(columns):
            for i in range(quarter):
                omega = 1 / 10_000 ** (i / (quarter - 1))
                table[y * columns + x, i :: quarter] = [
                    math.sin(x * omega), math.cos(x * omega), math.sin(y * omega), math.cos(y * omega)
                ]  # fmt: skip
    return table


class Step(NamedTuple):
    """p' = mu p + u(ahead of x by `ahead` p); x' = x + gamma p'. after_norm: behind the norm, in dense blocks too."""

    mu: float = 0.0
    gamma: float = 1.0
    ahead: float = 0.0
    after_norm: bool = False


def forward(
    params: Params,
    images: Array,
    route: Route,
    group_size: int | None = None,
    sincos: bool = False,
    step: Step = Step(),  # noqa: B008  (immutable)
) -> Array:
    """images: [B, H, W, C] -> logits [B, K]. group_size None: each image is a group. LayerNorm_2 where it stands."""
    params = {name: value.astype(np.float64) for name, value in params.items()}
    kernel, images = params["embedding/kernel"], images.astype(np.float64)
    height, width = kernel.shape[:2]
    rows, columns = images.shape[1] // height, images.shape[2] // width
    x = np.empty((len(images), rows * columns, kernel.shape[-1]))
    for b, image in enumerate(images):
        for i in range(rows):
            for j in range(columns):
                patch = image[i * height : (i + 1) * height, j * width : (j + 1) * width]
                x[b, i * columns + j] = np.einsum("hwc,hwcd->d", patch, kernel) + params["embedding/bias"]
    if sincos:
        x = x + sincos2d(rows, columns, x.shape[-1])
    if "cls" in params:
        x = np.concatenate([np.tile(params["cls"], (len(x), 1, 1)), x], axis=1)
    if "Encoder/posembed_input/pos_embedding" in params:
        x = x + params["Encoder/posembed_input/pos_embedding"]
    depth = len({name.split("/")[1] for name in params if name.startswith("Encoder/encoderblock_")})
    momentum = np.zeros_like(x)
    for index in range(depth):
        name = f"Encoder/encoderblock_{index}"
        p = below(params, name)
        y = layer_norm(x, p["LayerNorm_0/scale"], p["LayerNorm_0/bias"])
        x = x + np.stack([attention(image, image, below(p, "SelfAttention")) for image in y])
        shift, sparse = step.ahead * momentum, "Mlp/Dense_0/kernel" not in p
        before = shift if sparse and not step.after_norm else 0.0
        y = layer_norm(x + before, p["LayerNorm_1/scale"], p["LayerNorm_1/bias"])
        y = y + shift if step.after_norm else y
        if sparse:
            groups = y.reshape(-1, group_size or y.shape[1], y.shape[2])
            told = np.stack([route(params, f"{name}/Moe", group) for group in groups]).reshape(x.shape)
            momentum = step.mu * momentum + told
            x = x + step.gamma * momentum
        else:
            x = x + mlp(y, below(p, "Mlp"))
        if "LayerNorm_2/scale" in p:
            x = layer_norm(x, p["LayerNorm_2/scale"], p["LayerNorm_2/bias"])
    x = layer_norm(x, params["Encoder/encoder_norm/scale"], params["Encoder/encoder_norm/bias"])
    x = _pool(params, x)
    if "pre_logits/kernel" in params:
        x = np.tanh(x @ params["pre_logits/kernel"] + params["pre_logits/bias"])
    return x @ params["head/kernel"] + params["head/bias"]


def _pool(params: Params, x: Array) -> Array:
    if "MapHead/probe" in params:
        p = below(params, "MapHead")
        probe = params["MapHead/probe"][0]
        q = np.concatenate([attention(probe, image, below(p, "MultiHeadDotProductAttention")) for image in x])
        return q + mlp(layer_norm(q, p["LayerNorm/scale"], p["LayerNorm/bias"]), below(p, "Mlp"))
    return x[:, 0] if "cls" in params else x.mean(axis=1)
