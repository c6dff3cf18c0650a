"""What a word costs, and what a batch keeps, found on the meta device."""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..moe import SparseMlp
from ..training.profile import GROUPED_MM_FLOPS, Cost
from .network import SparseLanguageModel


def cost_of_a_token(net: SparseLanguageModel, tokens: int = 16) -> Cost:
    """Operations of one word with a full context, its logits included."""
    total = sum(p.numel() for p in net.parameters())
    idle = 0
    for layer in net.modules():
        if isinstance(layer, SparseMlp):
            experts, count = sum(p.numel() for p in layer.experts.parameters()), layer.experts.fc1.weight.shape[0]
            idle += round(experts * (1 - layer.router.experts_per_token(count, tokens) / count))
    counter = FlopCounterMode(display=False, custom_mapping=GROUPED_MM_FLOPS)
    was = net.training
    with torch.no_grad(), counter, nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        _read(net.eval(), 1, tokens)
    net.train(was)
    return Cost(total, total - idle, counter.get_total_flops() / 1e9 / tokens)


def kept_of_a_batch(net: SparseLanguageModel, streams: int, block: int) -> int:
    """Bytes kept for the backward pass, in float32; logits are made anew there."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    was = net.training
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weights = {p.untyped_storage()._cdata for p in _read(net.train(), 1, block).values()}
    net.train(was)
    return streams * sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in weights)


def _read(net: SparseLanguageModel, streams: int, block: int) -> dict[str, Tensor]:
    """One block of text without memory and numbers; what stood for the weights."""
    tensors = {
        name: torch.empty_like(p, device="meta").requires_grad_(p.requires_grad) for name, p in net.named_parameters()
    }
    words = torch.zeros(streams, block, dtype=torch.int64, device="meta")
    cache = tuple(each.to("meta") for each in net.empty_cache(streams))
    wrapped = _Reading(net)
    with torch.compiler.set_stance("force_eager"):
        torch.func.functional_call(wrapped, {f"net.{name}": tensor for name, tensor in tensors.items()}, (words, cache))
    return tensors


class _Reading(nn.Module):
    def __init__(self, net: SparseLanguageModel) -> None:
        super().__init__()
        self.net = net

    def forward(self, words: Tensor, cache: tuple[Tensor, ...]) -> Tensor:
        return self.net.head.losses(self.net.read(words, cache).hidden, words)
