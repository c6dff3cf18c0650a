"""Sparse upcycling: equal to the dense network where it is said to be, and refused where it cannot be done."""

import inspect
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from vmoe_momentum import (
    ExpertChoiceRouter,
    GShardRouter,
    HeavyBall,
    M6TRouter,
    SoftRouter,
    TopKRouter,
    UpcycledViT,
    cli,
    create_model,
)
from vmoe_momentum.models.directory import save
from vmoe_momentum.models.upcycling import differences

SMALL = {"embed_dim": 48, "depth": 4, "num_heads": 3, "img_size": 32, "patch_size": 8, "num_classes": 7}


def dense_directory(folder: Path, name: str, **settings) -> tuple[nn.Module, str]:
    """A dense network with random weights, norms and scales not at their start, and its local-dir name."""
    net = timm.create_model(name, **settings)
    for parameter in net.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.2)
    save(net, folder / "dense")
    return net.eval(), f"local-dir:{folder / 'dense'}"


def test_vit_tiny_keeps_its_logits(tmp_path: Path, capsys) -> None:
    """The command on a real size: 4 experts, 8 images, renormalised gates, dropless."""
    dense, source = dense_directory(tmp_path, "vit_tiny_patch16_224")
    out = tmp_path / "sparse"
    cli.run(["import", "timm", f"--source={source}", f"--out={out}", "--moe_layers=last2", "--num_experts=4"])
    assert "in evaluation its logits equal the dense network's" in capsys.readouterr().out
    net = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    assert net.moe_layers == (9, 11)
    x = torch.randn(8, 3, 224, 224)
    with torch.no_grad():
        assert (net(x) - dense(x)).abs().max() <= 1e-5


FAMILIES = {
    "vit_tiny_patch16_224": SMALL,
    "deit_tiny_patch16_224": SMALL,
    "deit3_small_patch16_224": SMALL,  # layer scale, positions without the class token
    "vit_small_patch14_dinov2": SMALL | {"num_classes": 5},  # layer scale
    "vit_small_patch14_reg4_dinov2": SMALL,  # registers
    "vit_base_patch16_clip_224": SMALL,  # norm before the blocks, quick settings of CLIP
    "vit_base_patch16_clip_quickgelu_224": SMALL,  # another activation
    "vit_base_patch16_siglip_224": SMALL,  # attention pooling
    "vit_small_patch16_36x1_224": SMALL,
    "vit_tiny_r_s16_p8_224": SMALL | {"patch_size": 1, "embed_dim": 48},  # a convolutional stem
    "vit_wee_patch16_reg1_gap_256": SMALL | {"global_pool": "avg"},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_keep_their_logits_through_a_directory(name: str, tmp_path: Path) -> None:
    dense, source = dense_directory(tmp_path, name, **FAMILIES[name])
    net = UpcycledViT(source, pretrained=True, moe_layers="every2", num_experts=3, router=GShardRouter()).eval()
    assert not differences(net)
    x = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(net(x), dense(x), atol=1e-5, rtol=1e-5)
    save(net, tmp_path / "sparse")
    again = timm.create_model(f"local-dir:{tmp_path}/sparse", pretrained=True).eval()
    assert torch.equal(again(x), net(x))
    assert again.pretrained_cfg["mean"] == list(dense.pretrained_cfg["mean"])
    config = json.loads((tmp_path / "sparse" / "config.json").read_text())
    assert config["model_args"]["backbone"] == name


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, None),
        ({"router": TopKRouter(1, renormalize=True)}, None),
        ({"router": TopKRouter(2, renormalize=True, eval_capacity_factor=0.3)}, "full experts drop tokens"),
        ({"router": TopKRouter(2, renormalize=True, capacity=2)}, "full experts drop tokens"),
        ({"router": TopKRouter(2)}, "by the sum of the chosen gates"),
        ({"router": TopKRouter(2, renormalize=True, bfloat16_dispatch=True)}, "rounds tokens"),
        ({"router": ExpertChoiceRouter()}, "combine weights do not sum to one"),
        ({"router": SoftRouter()}, "combine weights do not sum to one"),
        ({"router": M6TRouter()}, "combine weights do not sum to one"),
        ({"router": TopKRouter(4)}, None),  # all experts: the raw gates sum to one
        ({"router": TopKRouter(2, renormalize=True, eval_capacity_factor=2.0)}, None),  # E / K: nothing can be dropped
        ({"moe_layers": "none", "rule": HeavyBall()}, None),
        ({"rule": HeavyBall()}, "moves the residual stream otherwise"),
    ],
)
def test_what_differs_is_said(settings: dict, reason: str | None, tmp_path: Path) -> None:
    dense, source = dense_directory(tmp_path, "vit_tiny_patch16_224", **SMALL)
    net = UpcycledViT(source, pretrained=True, num_experts=4, **settings).eval()
    x = torch.randn(4, 3, 32, 32)
    difference = (net(x) - dense(x)).abs().max()
    if reason is None:
        assert differences(net) == []
        assert difference <= 1e-5
    else:
        assert reason in differences(net)[0]
        assert difference > 1e-4


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("deit_tiny_distilled_patch16_224", "distilled networks read two tokens.*use deit_tiny_patch16_224"),
        ("resnet18", "a ResNet; only timm's VisionTransformer can be upcycled"),
        ("vit_base_patch16_rpn_224", "its blocks are ResPostBlock"),
        ("vit_giant_patch14_dinov2", "its MLP is a SwiGLUPacked|its MLP is a GluMlp"),
        ("vit_tiny_patch16_22", "no such timm model; did you mean vit_tiny_patch16_224"),
        ("vmoe_tiny_patch4_16", "it has experts already"),
        ("vit_tiny_r_s16_p8_224", "image_size=24"),
        ("local-dir:nowhere", "Config file not found: nowhere/config.json"),
    ],
)
def test_what_cannot_be_upcycled_is_refused_with_the_reason(backbone: str, message: str) -> None:
    size = SMALL if backbone.startswith(("vit_giant", "vit_base")) else {}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        UpcycledViT(backbone, backbone_args=size, image_size=24 if "r_s16" in backbone else None)


def test_weights_that_cannot_be_had_are_an_answer_not_a_traceback(monkeypatch) -> None:
    def offline(*args, **kwargs):
        if kwargs["pretrained"]:
            raise OSError("no route to host\nand so on")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"pretrained=true: its weights could not be had \(no route to host\); use"):
        UpcycledViT("vit_tiny_patch16_224", pretrained=True)


def test_every_setting_changes_something(tmp_path: Path) -> None:
    _, source = dense_directory(tmp_path, "vit_tiny_patch16_224", **SMALL)
    changes = {
        "moe_layers": [0], "num_experts": 3, "rule": HeavyBall(), "router": TopKRouter(2), "expert_drop_rate": 0.5,
        "num_classes": 3, "image_size": 48, "drop_rate": 0.5, "drop_path_rate": 0.5, "pretrained": False,
        "momentum_last": 1, "momentum_restart": 1, "post_norm": "dense",
        "grad_checkpointing": True, "backbone_args": {"proj_drop_rate": 0.5}, "backbone": "deit_tiny_patch16_224",
    }  # fmt: skip

    assert set(changes) == set(inspect.signature(UpcycledViT.__init__).parameters) - {"self"}

    def run(name: str | None) -> tuple[torch.Tensor, bool]:
        torch.manual_seed(0)
        base = {"backbone": source, "pretrained": name != "backbone", "rule": HeavyBall(0.3), "num_experts": 4}
        net = UpcycledViT(**{**base, **({name: changes[name]} if name else {})}).train()
        side = net.patch_embed.img_size[0]
        torch.manual_seed(0)
        return net(torch.linspace(-1, 1, 4 * 3 * side * side).view(4, 3, side, side)), net.grad_checkpointing

    before, _ = run(None)
    for name in changes:
        after, checkpointing = run(name)
        assert after.shape != before.shape or not torch.equal(after, before) or checkpointing, name


def test_gradients_tell_the_experts_apart(tmp_path: Path) -> None:
    _, source = dense_directory(tmp_path, "vit_tiny_patch16_224", **SMALL)
    net = UpcycledViT(source, pretrained=True, num_experts=4).train()
    logits, aux_loss = net.forward_with_aux(torch.randn(16, 3, 32, 32))
    (logits.square().sum() + aux_loss).backward()
    gradient = net.blocks[1].mlp.experts.fc1.weight.grad
    assert all(p.grad is not None for p in net.parameters())
    assert not torch.allclose(gradient[0], gradient[1])


def test_create_model_loads_directories_and_points_to_the_class(tmp_path: Path) -> None:
    _, source = dense_directory(tmp_path, "vit_tiny_patch16_224", **SMALL)
    net = UpcycledViT(source, pretrained=True, num_experts=4).eval()
    save(net, tmp_path / "sparse")
    x = torch.randn(2, 3, 32, 32)
    again = create_model(f"local-dir:{tmp_path}/sparse").eval()
    assert torch.equal(again(x), net(x))
    assert not torch.equal(create_model(f"local-dir:{tmp_path}/sparse", pretrained=False).eval()(x), net(x))
    ball = create_model(f"local-dir:{tmp_path}/sparse", rule=HeavyBall(0.5), num_classes=3, image_size=48).eval()
    assert ball(torch.randn(2, 3, 48, 48)).shape == (2, 3)
    flexible = timm.create_model(f"local-dir:{tmp_path}/sparse", pretrained=True, dynamic_img_size=True).eval()
    torch.testing.assert_close(flexible(x), net(x))
    assert flexible(torch.randn(2, 3, 40, 48)).shape == (2, 7)
    with pytest.raises(ValueError, match="pos_embed=none: an upcycled network has its backbone's"):
        create_model(f"local-dir:{tmp_path}/sparse", pos_embed="none")
    with pytest.raises(ValueError, match="backbone_args=.*bogus"):
        UpcycledViT(backbone_args={"bogus": 3})
    with pytest.raises(ValueError, match="use the class UpcycledViT"):
        create_model("vmoe_upcycled")
    with pytest.raises(ValueError, match=r"rule=HeavyBall.*has no sparse layers"):
        create_model(source, rule=HeavyBall())
    with pytest.raises(FileNotFoundError, match="name=local-dir:nowhere: no file nowhere/config.json"):
        create_model("local-dir:nowhere")
