"""What the benchmark knows of a model: from pixels to logits, and a few facts. B images, N tokens, E experts."""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .attacks import ATTACKS
from .coupling import find_coupling

CHECKED = 8  # images of noise


class View(NamedTuple):
    """How a picture becomes the square a model wants."""

    size: int  # pixels
    crop_pct: float  # side of the centre crop over the shorter side, for whole photographs
    interpolation: str  # bilinear or bicubic
    upright: bool = False  # turned as EXIF says
    squash: bool = False  # both sides to size / crop_pct, whatever the shape, before the centre is cut (timm crop_mode)


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
    architecture: str = ""  # in words, for tables; "" for the name of its class
    random: bool = False  # it answers otherwise when asked again; found by check_model


def turned(model: Model, upright: bool) -> Model:
    """The same, shown pictures that are turned as EXIF says, or that are not."""
    view = model.view._replace(upright=upright)
    return model._replace(view=view, provenance={**model.provenance, "view": view._asdict()})


@torch.no_grad()
def check_model(
    model: Model,
    device: str,
    gradients: bool = False,
    sizes: Collection[int] = (CHECKED,),
    parts: bool = False,
    pictures: Tensor | None = None,
    random: bool = False,
) -> Model:
    """Passes over noise, and one backwards for attacks. The model with `random` and `coupled` found out.

    sizes: of the batches that will come; parts: attacks will ask about some images of a batch. pictures: a few of the
    run's, uint8 [B, 3, S, S]. random: it may answer at random. Raises ValueError: no logits of the right shape,
    probabilities, two different answers, no gradient of the pixels, a size of batch that it does not take.
    """
    generator = torch.Generator().manual_seed(0)
    side = model.view.size
    module = model.module.eval()
    count = CHECKED if _takes(model, CHECKED, device) is None else max(sizes)  # groups may be of more images
    images = torch.rand(count, 3, side, side, generator=generator).to(device)
    for size in sorted({count, *sizes}):
        problem = _takes(model, size, device)
        if problem is not None:
            told = (
                f"fails on {side}-pixel images"
                if size == count
                else f"takes no batch of {size} images, which will come"
            )
            raise ValueError(f"--model={model.name}: {told} ({problem})") from problem
    first, second = module(images), module(images)
    if not isinstance(first, Tensor) or first.shape != (count, model.num_classes):
        shape = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise ValueError(
            f"--model={model.name}: gives {shape} for {count} images; wanted logits ({count}, {model.num_classes})"
        )
    if not bool(first.isfinite().all()):
        raise ValueError(f"--model={model.name}: gives logits that are not finite on noise in [0, 1]")
    sums = first.double().sum(dim=1)
    if bool((first >= 0).all()) and bool(((sums - 1).abs() < max(1e-3, torch.finfo(first.dtype).eps)).all()):
        raise ValueError(
            f"--model={model.name}: gives probabilities (rows sum to 1); attacks and confidences need logits, so leave "
            "out its last softmax"
        )
    differs = not torch.equal(first, second)
    if differs and not random:
        raise ValueError(
            f"--model={model.name}: two passes over the same images differ; randomness must be off in eval, or "
            "averaged over by attacks: --eot=10"
        )
    if gradients:
        _check_gradient(model, images)
    asking = {parts: [name for name, found in ATTACKS.items() if found.parts == parts] for parts in (True, False)}
    problem = next((p for size in (1, 3) if (p := _takes(model, size, device)) is not None), None) if parts else None
    if problem is not None:
        raise ValueError(
            f"--model={model.name}: takes no batch of some size ({problem}), and {', '.join(asking[True])} ask about "
            f"parts of a batch; attack it with some of [{','.join(asking[False])}]"
        ) from problem
    shown = images[:0] if pictures is None else pictures.to(device).float() / 255
    if differs:  # what is drawn depends on the batch
        return model._replace(random=True, coupled=True)
    return model._replace(coupled=find_coupling(module, shown, max(sizes)))


def _takes(model: Model, size: int, device: str) -> Exception | None:
    """What goes wrong on a batch of `size` images."""
    side = model.view.size
    try:
        model.module.eval()(torch.full((size, 3, side, side), 0.5, device=device))
    except Exception as error:  # of the user's code, maybe
        return error
    return None


def _check_gradient(model: Model, images: Tensor) -> None:
    with torch.inference_mode(False), torch.enable_grad():
        leaf = images.clone().requires_grad_()
        total = model.module(leaf).sum()
        if not total.requires_grad:
            raise ValueError(f"--model={model.name}: no gradient reaches its pixels; attack it with [square] or [spsa]")
