"""What training makes small. B images, K classes."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Literal["softmax", "sigmoid"]


class Losses(NamedTuple):
    """Of a training batch, each []."""

    loss: Tensor  # the weighted sum of the others
    main_loss: Tensor
    aux_loss: Tensor  # the routers'
    trades_loss: Tensor | None = None  # divergence of attacked predictions from clean ones, mean over images
    consistency_loss: Tensor | None = None  # between pairs of images, summed over sparse blocks


def classification_loss(
    logits: Tensor, targets: Tensor, loss: Loss, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """logits, targets (rows sum to 1): [B, K] -> [], mean or sum over images."""
    logits = _at_least_float32(logits)
    if loss == "sigmoid":
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(dim=-1)
        return losses.mean() if reduction == "mean" else losses.sum()
    return F.cross_entropy(logits, targets, reduction=reduction)


def divergence(clean: Tensor, other: Tensor, loss: Loss) -> Tensor:
    """KL(clean || other) of predictions by logits [B, K], summed over images; sigmoid: of each class by itself. []"""
    clean, other = _at_least_float32(clean), _at_least_float32(other)
    if loss == "softmax":
        return F.kl_div(other.log_softmax(-1), clean.log_softmax(-1), reduction="sum", log_target=True)
    yes = clean.sigmoid() * (F.logsigmoid(clean) - F.logsigmoid(other))
    no = (-clean).sigmoid() * (F.logsigmoid(-clean) - F.logsigmoid(-other))
    return (yes + no).sum()


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
