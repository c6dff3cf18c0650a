"""One network of each of timm's families opens by its own record, sees pictures as timm shows them, and has a hash."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.models import get_pretrained_cfg

from vmoe_momentum.classifiers import open_models, view_of
from vmoe_momentum.robustness import labels
from vmoe_momentum.robustness.pictures import as_tensor, show

SHORT = ("resnet18", "efficientnet_b0", "regnetx_002", "mobilenetv3_small_050", "levit_128s", "vit_tiny_patch16_224")


def families() -> list[str]:
    """The first classifier of each module that is not among SHORT's."""
    found = []
    for module in timm.list_modules():
        names = [name for name in timm.list_models(module=module) if "moe" not in name]
        records = {name: get_pretrained_cfg(name) for name in names}
        able = [name for name, cfg in records.items() if cfg is not None and cfg.num_classes]
        able = [name for name in able if records[name].input_size[-1] <= 256]
        small = [n for n in able if any(word in n for word in ("atto", "nano", "tiny", "small", "xxs", "_s", "18"))]
        found += (small or able)[:1]
    return found


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(name, marks=pytest.mark.long) for name in families())])
def test_a_family_opens(name: str) -> None:
    (model,) = open_models([name], pretrained=False)
    net = model.module.net
    assert len(model.provenance["weights_sha256"]) == 64
    assert model.view.size == net.default_cfg["input_size"][-1]
    _sees_pictures_as_timm_shows_them(model)
    with torch.no_grad():
        answers = model.module(torch.rand(2, 3, model.view.size, model.view.size))
    assert answers.shape == (2, model.num_classes)
    if model.num_classes == 1000:
        assert tuple(model.class_ids) == labels.wnids()


def _sees_pictures_as_timm_shows_them(model) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8))
    config = resolve_model_data_config(model.module.net)
    expected = create_transform(**config, is_training=False, normalize=False)(picture)
    assert torch.equal(as_tensor(show(picture, model.view)), expected)


@pytest.mark.parametrize("name", ["tf_efficientnetv2_b3", "vit_medium_patch16_gap_384"])
def test_squashed_pictures(name: str) -> None:
    (model,) = open_models([name], pretrained=False)
    assert model.view.squash
    _sees_pictures_as_timm_shows_them(model)


def test_a_network_that_takes_no_squares_is_refused() -> None:
    net = timm.create_model("resnet18")
    net.pretrained_cfg = {**net.pretrained_cfg, "input_size": (3, 96, 64)}
    with pytest.raises(ValueError, match="it takes 96 x 64 pixels"):
        view_of(net, {})


def test_features_alone_are_refused() -> None:
    names = timm.list_models("vit_tiny*dino*") + timm.list_models("vit_small*dino*")
    name = next(name for name in names if get_pretrained_cfg(name).num_classes == 0)
    with pytest.raises(ValueError, match="has no classifier"):
        open_models([name], pretrained=False)
