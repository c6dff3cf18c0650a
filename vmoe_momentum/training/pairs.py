"""Training on pairs of pictures: attacked and clean, or two views. B images of a batch, P partners, k attacked."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ..models import PixelModel
from ..moe import router_consistency
from ..robustness.attacks import evaluated
from .adversarial import AdversarialSettings, attacked
from .consistency import ConsistencySettings
from .losses import Loss, Losses, classification_loss, divergence

Forward = Callable[[PixelModel, Tensor], tuple[Any, ...]]  # normalised images -> logits, auxiliary loss(, gates)


class Attacked(NamedTuple):
    """Pixels [k, 3, H, W] before and after an attack, and their targets [k, K]."""

    clean: Tensor
    found: Tensor
    targets: Tensor


class Views(NamedTuple):
    """Normalised pictures: one forward pass of the images trained on, and others, the j-th a view of the j-th."""

    images: Tensor  # [B, 3, H, W]
    others: Tensor  # [P, 3, H, W], P at most B
    attacked: Attacked | None


@dataclass(frozen=True)
class Pairing:
    """How batches are attacked or paired; one of them at least is set."""

    adversarial: AdversarialSettings | None
    consistency: ConsistencySettings | None
    loss: Loss
    aux_loss_weight: float

    def others(self, batch: int) -> int:
        """P of a batch of so many images."""
        if self.adversarial is None:
            return batch
        paired = self._trades is not None or self.consistency is not None
        return self.adversarial.count(batch) if paired else 0

    def views(self, model: PixelModel, images: Tensor, targets: Tensor, step: int) -> Views:
        """images: [B, 3, H, W], normalised; targets: [B, K]; step: optimizer steps done."""
        if self.adversarial is None:
            assert self.consistency is not None  # one of both is set
            return Views(images, model.normalize(self.consistency.augmented(_pixels(model, images))), None)
        few, paired = self.adversarial.count(len(images)), self.others(len(images))
        pair = self._attack(self.adversarial, model, images[:few], targets[:few], step)
        found = model.normalize(pair.found)
        if self._trades is not None:
            return Views(images, found, pair)
        return Views(torch.cat([found, images[few:]]), images[:paired], pair)

    def losses(self, model: PixelModel, plain: Forward, with_gates: Forward, views: Views, targets: Tensor) -> Losses:
        """plain, with_gates: the training pass, without and with the gates of sparse blocks."""
        count, together = len(views.images), torch.cat([views.images, views.others])
        gates: tuple[Tensor, ...] = ()
        if self.consistency is None:
            logits, aux_loss = plain(model, together)
        else:
            logits, aux_loss, gates = with_gates(model, together)
        first, second = logits[:count], logits[count:]
        if views.attacked is None:  # both views are trained on
            main_loss = classification_loss(logits, targets.repeat(2, 1), self.loss)
        else:
            main_loss = classification_loss(first, targets, self.loss)
        loss, trades_loss, consistency_loss = main_loss + self.aux_loss_weight * aux_loss, None, None
        if (trades := self._trades) is not None:
            trades_loss = divergence(first[: len(second)], second, self.loss) / len(second)
            loss = loss + trades.weight * trades_loss
        if self.consistency is not None:
            each = (router_consistency(g[: len(second)], g[count:]) for g in gates)
            consistency_loss = cast(Tensor, sum(each))  # `pairing` has seen to it that there are gates
            loss = loss + self.consistency.weight * consistency_loss
        return Losses(loss, main_loss, aux_loss, trades_loss, consistency_loss)

    def logged(self) -> list[str]:
        """Names of what a training step logs more for it, but for the routers'."""
        found = ["clean_top1", "robust_top1"] if self.adversarial is not None else []
        found += ["trades_loss"] if self._trades is not None else []
        return found + (["consistency_loss"] if self.consistency is not None else [])

    @property
    def _trades(self) -> AdversarialSettings | None:
        """The attack's settings, where its method is TRADES."""
        return self.adversarial if self.adversarial is not None and self.adversarial.method == "trades" else None

    def _attack(
        self, settings: AdversarialSettings, model: PixelModel, images: Tensor, targets: Tensor, step: int
    ) -> Attacked:
        pixels = _pixels(model, images)
        if self._trades is not None:
            with evaluated(model, 0), torch.no_grad():
                clean = model(pixels)
            torch.clear_autocast_cache()  # weights that were cast here have no gradient
            objective = partial(divergence, clean, loss=self.loss)
        else:
            objective = partial(classification_loss, targets=targets, loss=self.loss, reduction="sum")
        # SeededSteps gives each batch a seed of its own; without it each step has one
        seed, budget = (torch.initial_seed() + step) % 2**63, settings.budget(step)
        how = (budget, settings.size(budget), settings.start, seed)
        return Attacked(pixels, attacked(model, pixels, objective, *how), targets)


def _pixels(model: PixelModel, images: Tensor) -> Tensor:
    """Normalised -> in [0, 1]; mixing and rounding leave them a unit of rounding outside."""
    return (images * model.std + model.mean).clamp(0, 1)


def pairing(
    net: nn.Module,
    adversarial: AdversarialSettings | None,
    consistency: ConsistencySettings | None,
    loss: Loss,
    aux_loss_weight: float,
    random_erasing: float,
) -> Pairing | None:
    """None: nothing is paired. Raises ValueError: settings that do not go together."""
    if adversarial is None and consistency is None:
        return None
    if random_erasing:
        raise ValueError(
            f"model.random_erasing={random_erasing}: its noise lies outside [0, 1], where model.adversarial and "
            "model.consistency take pixels to be; use model.random_erasing=0"
        )
    if consistency is not None:
        if not getattr(net, "moe_layers", ()) or not hasattr(net, "forward_with_gates"):
            raise ValueError(
                f"model.consistency: {type(net).__name__} here has no sparse blocks whose routing could agree; leave "
                "it out"
            )
        if (consistency.view == "attack") != (adversarial is not None):
            way_out = "set model.adversarial" if adversarial is None else "use view=attack"
            raise ValueError(
                f"model.consistency.view={consistency.view} "
                f"{'without' if adversarial is None else 'beside'} model.adversarial; {way_out}, or leave one out"
            )
    return Pairing(adversarial, consistency, loss, aux_loss_weight)
