"""Checkpoints of fit rebuilt without their config."""

from pathlib import Path

import pytest
import timm
import torch
from analysis_helpers import write_checkpoint
from registered import registered
from torch import nn

from vmoe_momentum import SoftRouter, UpcycledViT, create_model
from vmoe_momentum.models.saved import KEY, open_saved
from vmoe_momentum.momentum import HeavyBall, MomentumRule

IMAGES = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def same(net: nn.Module, path: Path) -> None:
    from vmoe_momentum import PixelModel

    saved = open_saved(str(path))
    again = saved.build()
    with torch.no_grad():
        assert torch.equal(again(IMAGES), PixelModel(net).eval()(IMAGES))
    assert type(again.net) is type(net) and not again.training


@pytest.mark.parametrize("rule", sorted(registered(MomentumRule)))
def test_every_rule_comes_back(rule: str, tmp_path: Path) -> None:
    net = create_model("vmoe_tiny_patch4_16", rule=rule, num_classes=10)
    nn.init.normal_(net.head.weight)
    same(net, write_checkpoint(net, tmp_path / "x.ckpt"))


def test_settings_sizes_and_scale_come_back(tmp_path: Path) -> None:
    """Other classes and pixels than the name's, learned momentum, soft routing, the first blocks plain."""
    settings = {"rule": HeavyBall(learn=True), "router": SoftRouter(), "moe_layers": [2, 5, 6], "momentum_last": 2}
    net = create_model("vmoe_tiny_patch4_16", **settings, num_experts=3, representation_size=20, image_size=32)
    path = write_checkpoint(net, tmp_path / "x.ckpt", epoch=4)  # resized to 16 pixels and 10 classes
    nn.init.normal_(net.head.weight)
    same(net, write_checkpoint(net, path, epoch=4))
    assert open_saved(str(path)).epoch == 5


def test_upcycled_and_dense_networks_come_back(tmp_path: Path) -> None:
    small = {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4}
    upcycled = UpcycledViT("vit_tiny_patch16_224", moe_layers="every2", num_experts=3, backbone_args=small)
    same(upcycled, write_checkpoint(upcycled, tmp_path / "up.ckpt"))
    dense = timm.create_model("vit_tiny_patch16_224", img_size=16, **small)
    same(dense, write_checkpoint(dense, tmp_path / "dense.ckpt"))


def test_normalisation_is_the_checkpoints(tmp_path: Path) -> None:
    net = create_model("vmoe_tiny_patch4_16")
    path = write_checkpoint(net, tmp_path / "x.ckpt")
    content = torch.load(path, weights_only=True)
    content[KEY]["mean"] = [0.1, 0.2, 0.3]
    torch.save(content, path)
    assert open_saved(str(path)).build().mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])


def test_a_network_of_another_maker_cannot_be_rebuilt(tmp_path: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 10)

    saved = open_saved(str(write_checkpoint(Other(), tmp_path / "x.ckpt")))
    with pytest.raises(ValueError, match=r"its network \(Other\) was not made by timm's factory"):
        saved.build()


def test_directories_open_too(tmp_path: Path) -> None:
    from vmoe_momentum.models.directory import save

    net = create_model("vmoe_tiny_patch4_16", rule="HeavyBall", num_classes=10)
    save(net, tmp_path / "d")
    saved = open_saved(f"local-dir:{tmp_path / 'd'}")
    assert (saved.epoch, saved.facts["image_size"], saved.facts["num_classes"]) == (None, 16, 10)
    assert saved.facts["settings"]["rule"]["class_path"] == "HeavyBall"
    with torch.no_grad():
        assert torch.equal(saved.build().net(IMAGES / 255), net.eval()(IMAGES / 255))


def test_damage_is_named(tmp_path: Path) -> None:
    net = create_model("vmoe_tiny_patch4_16")
    path = write_checkpoint(net, tmp_path / "x.ckpt")
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["model.net.cls_token"]
    torch.save(content, tmp_path / "less.ckpt")
    with pytest.raises(ValueError, match="do not fit the network it describes"):
        open_saved(str(tmp_path / "less.ckpt")).build()
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="cannot be read safely|can be read safely"):
        open_saved(str(tmp_path / "cut.ckpt"))
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_saved(str(tmp_path / "none.ckpt"))
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not written by vmoe-momentum fit"):
        open_saved(str(tmp_path / "foreign.ckpt"))
