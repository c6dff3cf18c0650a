"""The sparse MLP: route, dispatch, experts, combine."""

from collections.abc import Callable

from torch import Tensor, nn

from .experts import Experts
from .losses import mean
from .routing import Router


class SparseMlp(nn.Module):
    """A sparse mixture of expert MLPs in place of a transformer's MLP.

    Instruments hook `router`, whose output is `(plan, losses)`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_experts: int,
        router: Router,
        act_layer: Callable[[], nn.Module],
        drop: float = 0.0,
        draw: bool = True,
        drop_outputs: bool = True,
    ) -> None:
        """draw: False leaves the experts' memory as it is, for weights that come from elsewhere. drop_outputs: whether
        dropout comes behind the experts, too, or behind their hidden layer only."""
        super().__init__()
        self.router = router.for_layer(in_features, num_experts)
        self.experts = Experts(num_experts, in_features, hidden_features, act_layer, drop, draw, drop_outputs)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x: [B, N, D]; noise: from `router.sample_noise` -> outputs [B, N, D], auxiliary loss [], mean over groups,
        and gates without noise [B, N, E].

        Of no images the outputs are none and the loss is 0.
        """
        plan, losses = self.router(x, noise)
        rows, ends = plan.dispatch(self._on_the_wire(x.flatten(0, 1)))
        even = ends is None and self.training and self.router.even  # batches of training are equally large
        outputs = plan.combine(self._on_the_wire(self.experts(rows, ends, even)))
        gates = plan.gates if losses.gates is None else losses.gates
        return (
            outputs.reshape(x.shape).to(x.dtype),
            mean(losses.auxiliary),
            gates.reshape(*x.shape[:2], gates.shape[-1]),
        )

    def every_output(self, tokens: Tensor) -> Tensor:
        """What each expert makes of each token, chosen or not: [T, D] -> [T, E, D]."""
        num_experts = self.experts.fc1.weight.shape[0]
        rows = self._on_the_wire(tokens).repeat(num_experts, 1)
        outputs = self._on_the_wire(self.experts(rows, None))
        return outputs.reshape(num_experts, *tokens.shape).transpose(0, 1)

    def _on_the_wire(self, x: Tensor) -> Tensor:
        return x.bfloat16().to(x.dtype) if self.router.bfloat16_dispatch else x
