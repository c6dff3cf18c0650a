"""Whether an image's answer depends on the others of its batch, as under expert capacity over several images.

Each image alone against the same image in other company: other images, other places, other batch sizes. B images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AT_LEAST, PARTS = 8, 3  # sizes of batches; the second divides little
DRAWS = 2


def find_coupling(module: nn.Module, pictures: Tensor, batch_size: int) -> bool:
    """pictures: [B, 3, S, S] in [0, 1] of the run, maybe none; images of many kinds join them, since a full expert
    drops tokens only where many are alike. batch_size: of the run.

    A module that fails on some size of batch depends on it, too.
    """
    probe, limit = torch.cat([make_probe(pictures.shape[-1]).to(pictures), pictures]), max(AT_LEAST, batch_size)
    together, alone = (_answers(module, list(probe.split(size))) for size in (limit, 1))
    if alone is None or together is None:
        return True
    allowed = _rounding(module, probe, together, limit)
    generator = torch.Generator().manual_seed(2)
    others = torch.rand(max(0, limit - len(probe)), *probe.shape[1:], generator=generator).to(probe)
    turned = _answers(module, list(probe.flip(0).split(PARTS)))
    crowded = _answers(module, list(torch.cat([others, probe]).split(limit)))
    if turned is None or crowded is None:
        return True
    found = torch.stack([together, turned.flip(0), crowded[len(others) :]])
    return bool(((found - alone).abs().amax(dim=(0, 2)) > allowed).any())


def make_probe(size: int) -> Tensor:
    """[8, 3, size, size]: noise, faint noise, flat colours, ramps and coarse blocks."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    ramp = torch.linspace(0, 1, size)
    noise, faint = draw(2, 3, size, size), 0.45 + 0.1 * draw(1, 3, size, size)
    flat = draw(2, 3, 1, 1).expand(2, 3, size, size)
    ramps = torch.stack([(ramp * draw(3, 1, 1)).expand(3, size, size)])
    coarse = F.interpolate(draw(2, 3, max(2, size // 8), max(2, size // 8)), (size, size))
    return torch.cat([noise, faint, flat, ramps, coarse])


def _answers(module: nn.Module, batches: list[Tensor]) -> Tensor | None:
    """[B, K] in double precision; None where the module takes no batch of that size."""
    try:
        answers = torch.cat([module(images) for images in batches]).double()
    except Exception:  # of the user's code, maybe
        return None
    return answers if len(answers) == sum(map(len, batches)) else None


def _rounding(module: nn.Module, probe: Tensor, answers: Tensor, limit: int) -> Tensor:
    """[B] what kernels may do to each image's logits: those of other batch sizes add in another order.

    The network's own answer to pixels moved by one unit of rounding says how far it carries that. Measured over our
    rules and timm's families on a CPU: in float32 kernels do as much as that or twice; halves are added up in float32
    and rounded afterwards, so kernels seldom differ at all, and at most by as much.
    """
    eps, factor = _precision(module, probe.device)
    changed = torch.zeros(len(probe), dtype=torch.float64, device=probe.device)
    for seed in range(DRAWS):
        signs = torch.randint(0, 2, probe.shape, generator=torch.Generator().manual_seed(seed)).to(probe) * 2 - 1
        moved = _answers(module, list((probe * (1 + eps * signs)).clamp(0, 1).split(limit)))
        if moved is not None:
            changed = torch.maximum(changed, (moved - answers).abs().amax(dim=1))
    return factor * (changed + eps * answers.abs().amax(dim=1))


def _precision(module: nn.Module, device: torch.device) -> tuple[float, float]:
    """Unit of rounding of the coarsest type that the module computes in, and how many of them are allowed."""
    types = {p.dtype for p in module.parameters() if p.is_floating_point()} | {torch.float32}
    eps = max(torch.finfo(dtype).eps for dtype in types)
    if device.type == "cuda" and (torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32):
        eps = max(eps, 2.0**-10)
    return eps, 8.0 if eps == torch.finfo(torch.float32).eps else 2.0
