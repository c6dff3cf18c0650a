"""What networks have beyond torch's modules, for type checkers: timm's classifiers have no base class of their own, and
the files that make up our vision transformer cannot import its class."""

from typing import Any, Protocol, cast

from torch import Tensor, nn


class Classifier(Protocol):
    """Any of timm's."""

    num_classes: int
    pretrained_cfg: dict[str, Any]

    def reset_classifier(self, num_classes: int, /) -> None: ...

    def set_grad_checkpointing(self) -> None: ...


class Drawn(Protocol):
    """Ours, of whose start the initialisation wants to know."""

    initial_seed: int
    share_expert_init: bool
    pre_logits: nn.Module


class Gated(Protocol):
    """Ours, where gates can be asked for."""

    def forward_with_gates(self, images: Tensor, /) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]: ...


class Grouped(Protocol):
    """Ours, which may route the tokens of several images together."""

    num_prefix_tokens: int

    def images_together(self, num_tokens: int, /) -> int: ...


def as_classifier(net: nn.Module) -> Classifier:
    """The same."""
    return cast(Classifier, net)
