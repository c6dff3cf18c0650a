"""What an attack may do."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

from torch import Tensor

from ..asked import Norm


class Stages(Protocol):
    """Where an attack that takes long leaves what it has found so far, so that it can go on in another process."""

    def load(self) -> dict[str, Tensor]:
        """What was left there for these images, on the CPU; {} for nothing."""

    def keep(self, found: dict[str, Tensor]) -> None: ...


class Budget(NamedTuple):
    """What an attack may do."""

    eps: float
    norm: Norm = "Linf"
    steps: int = 20
    queries: int = 5000
    seed: int = 0
    random_start: bool = False  # at a random point of the ball, not at the picture
    restarts: int = 1  # the first starts as told above, the others at random; of each image the worst is kept
    eot: int = 1  # passes that gradients are averaged over, for networks that are random in evaluation
    # adds what routers do to the loss; top-k hides gradients of the choice itself. images, labels -> []
    router_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    stages: Stages | None = None  # of this batch; changes no number
