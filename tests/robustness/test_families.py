"""One network of each of timm's families opens by its own record, and can be told from others."""

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

from vmoe_momentum.classifiers import open_models
from vmoe_momentum.robustness import labels

SHORT = ("resnet18", "efficientnet_b0", "regnetx_002", "mobilenetv3_small_050", "levit_128s", "vit_tiny_patch16_224")


def families() -> list[str]:
    """The first classifier of each module that is not among SHORT's."""
    found = []
    for module in timm.list_modules():
        names = [name for name in timm.list_models(module=module) if "moe" not in name]
        able = [
            n
            for n in names
            if (cfg := get_pretrained_cfg(n)) is not None and cfg.num_classes and cfg.input_size[-1] <= 256
        ]
        small = [n for n in able if any(word in n for word in ("atto", "nano", "tiny", "small", "xxs", "_s", "18"))]
        found += (small or able)[:1]
    return found


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(name, marks=pytest.mark.long) for name in families())])
def test_a_family_opens(name: str) -> None:
    (model,) = open_models([name], pretrained=False)
    assert (
        len(model.provenance["weights_sha256"]) == 64
        and model.view.size == model.module.net.default_cfg["input_size"][-1]
    )
    with torch.no_grad():
        answers = model.module(torch.rand(2, 3, model.view.size, model.view.size))
    assert answers.shape == (2, model.num_classes)
    if model.num_classes == 1000:
        assert tuple(model.class_ids) == labels.wnids()


def test_features_alone_are_refused() -> None:
    name = next(
        n
        for n in timm.list_models("vit_tiny*dino*") + timm.list_models("vit_small*dino*")
        if get_pretrained_cfg(n).num_classes == 0
    )
    with pytest.raises(ValueError, match="has no classifier"):
        open_models([name], pretrained=False)
