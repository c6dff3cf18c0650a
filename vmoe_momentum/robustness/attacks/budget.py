"""What an attack may do."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from ..asked import Norm


class Budget(NamedTuple):
    """What an attack may do."""

    eps: float
    norm: Norm = "Linf"
    steps: int = 20
    queries: int = 5000
    seed: int = 0
    # adds what routers do to the loss; top-k hides gradients of the choice itself. images, labels -> []
    router_loss: Callable[[Tensor, Tensor], Tensor] | None = None
