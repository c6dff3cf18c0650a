"""What travels from block to block beside the tokens."""

from typing import NamedTuple

from torch import Tensor


class Carry(NamedTuple):
    """A pytree, so that checkpointing, compile, export and FSDP see every tensor in it.

    It moves by argument only: kept on a module it would be wrong under gradient checkpointing, where the recomputed
    forward would read the last block's state.
    """

    momentum: tuple[Tensor, ...]  # the rule's buffers, each [B, N, D], float32 also in half networks; () for Residual
    aux_loss: Tensor  # [] router losses summed over the MoE blocks so far
    gates: tuple[Tensor, ...] | None = None  # [B, N, E] of each MoE block so far, without noise; None: nobody asked
