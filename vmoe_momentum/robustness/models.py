"""What the benchmark knows of a model: from pixels to logits, and a few facts. B images, N tokens, E experts."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class View(NamedTuple):
    """How a picture becomes the square a model wants."""

    size: int  # pixels
    crop_pct: float  # side of the centre crop over the shorter side, for whole photographs
    interpolation: str  # bilinear or bicubic


class Model(NamedTuple):
    """One model of the comparison."""

    label: str  # models of one label are a group, such as seeds
    name: str  # the label, numbered where it is shared
    module: nn.Module  # float32 pixels in [0, 1], [B, 3, size, size] -> logits [B, K]; normalises inside
    view: View
    num_classes: int
    class_names: list[str] | None
    # images -> logits and, for each MoE block, [B, N, E] bool: which experts each token reaches; None for dense models
    routing: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]] | None
    # images, labels -> [], what routers add to the loss
    router_loss: Callable[[Tensor, Tensor], Tensor] | None
    provenance: dict[str, Any]  # source, hash, settings: goes into the report
    coupled: bool = False  # an image's answer depends on the others of its batch; found by check_model
    class_ids: list[str] | None = None  # names of the folders it was trained on, in label order


@torch.no_grad()
def check_model(model: Model, device: str, gradients: bool = False) -> Model:
    """Passes over noise, and one backwards for attacks. The model with `coupled` found out.

    Raises ValueError: no logits of the right shape, probabilities, two different answers, no gradient of the pixels.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(8, 3, model.view.size, model.view.size, generator=generator).to(device)
    module = model.module.eval()
    try:
        first, second = module(images), module(images)
    except Exception as error:  # of the user's code, maybe
        raise ValueError(f"--model={model.name}: fails on {model.view.size}-pixel images ({error})") from error
    if not isinstance(first, Tensor) or first.shape != (8, model.num_classes):
        shape = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(f"--model={model.name}: gives {shape} for 8 images; wanted logits (8, {model.num_classes})")
    if not bool(first.isfinite().all()):
        raise ValueError(f"--model={model.name}: gives logits that are not finite on noise in [0, 1]")
    sums = first.double().sum(dim=1)
    if bool((first >= 0).all()) and bool(((sums - 1).abs() < 1e-3).all()):
        raise ValueError(
            f"--model={model.name}: gives probabilities (rows sum to 1); attacks and confidences need logits, so leave "
            "out its last softmax"
        )
    if not torch.equal(first, second):
        raise ValueError(
            f"--model={model.name}: two passes over the same images differ; randomness must be off in eval"
        )
    if gradients:
        _check_gradient(model, images)
    turned = module(images.flip(0)).flip(0)
    return model._replace(coupled=not torch.allclose(first, turned, rtol=1e-3, atol=1e-3 * float(first.std())))


def _check_gradient(model: Model, images: Tensor) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.clone().requires_grad_()
        total = model.module(leaf).sum()
        if not total.requires_grad:
            raise ValueError(f"--model={model.name}: no gradient reaches its pixels; attack it with [square] or [spsa]")
