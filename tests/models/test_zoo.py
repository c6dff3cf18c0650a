"""The contracts of timm and torch, kept by every registered name (small, but with its own placement, router and head).

`make test-all` adds every momentum rule; here the names take turns. What torch compiles and exports, it does for one
name of each family and for every rule: cut down to width 32 the others of a family are the same program.
"""

import copy
import csv
import functools
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from registered import registered
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import AttentionExtract
from torch import Tensor, nn

from vmoe_momentum import HeavyBall
from vmoe_momentum.models import MomentumVisionTransformer
from vmoe_momentum.models.directory import save
from vmoe_momentum.models.variants import NAMES
from vmoe_momentum.momentum import MomentumRule
from vmoe_momentum.specs import to_spec

ROOT = Path(__file__).parent.parent.parent
RULES = [*registered(MomentumRule)]
SHORT = [(name, RULES[i % len(RULES)]) for i, name in enumerate(NAMES)]
LONG = [(name, rule) for name in NAMES for rule in RULES if (name, rule) not in SHORT]
FAMILIES = ("vmoe_small_patch32_224", "soft_moe_small_patch16_224", "deep_vmoe_tiny_patch4_16", "vmoe_upcycled")
# rules with norms behind the MLPs' residuals and a look-ahead behind the norm, under names of their own
FORMS = {
    "released heavy ball": {"rule": "HeavyBall", "post_norm": "all"},
    "released robust": {
        "rule": {"class_path": "Robust", "init_args": {"L": 1.0, "m": 0.8, "r": 0.2, "look_ahead": "after_norm"}},
        "post_norm": "all",
    },
    "nesterov after the norm": {
        "rule": {"class_path": "Nesterov", "init_args": {"look_ahead": "after_norm"}},
        "post_norm": "dense",
    },
    "norm alone": {"rule": "Residual", "post_norm": "sparse"},
}
FORMED = [
    ("vmoe_small_every2_experts8_patch32_224", "released robust"), ("soft_moe_small_patch16_224", "norm alone"),
    ("vmoe_upcycled", "nesterov after the norm"), ("deep_vmoe_tiny_patch4_16", "released heavy ball"),
]  # fmt: skip
LONG += [(name, form) for name in FAMILIES for form in FORMS if (name, form) not in FORMED]
EVERY = pytest.mark.parametrize(
    ("name", "rule"), [*SHORT, *FORMED, *(pytest.param(*pair, marks=pytest.mark.long) for pair in LONG)]
)
TRACED = {*((FAMILIES[i % len(FAMILIES)], rule) for i, rule in enumerate(RULES[::2])), FORMED[0]}
EACH_FAMILY = pytest.mark.parametrize(
    ("name", "rule"),
    [
        pytest.param(name, rule, marks=() if (name, rule) in TRACED else pytest.mark.long)
        for name, rule in [*((name, rule) for name in NAMES for rule in RULES), *FORMED]
    ],
)


def patch_of(name: str) -> int:
    return next((int(part[5:]) for part in name.split("_") if part.startswith("patch")), 4)


def small(name: str, rule: str = "Residual", depth: int = 4, **extra) -> MomentumVisionTransformer:
    """Width 32, 9 patches, a head that is not zero. Four blocks, two of them sparse; or two, both sparse; or three."""
    depth = 3 if depth == 2 and rule in FORMS else depth  # a dense one behind a sparse one
    shape = {"embed_dim": 32, "depth": depth, "num_heads": 4, "mlp_ratio": 2.0}
    layers = "every2" if depth == 4 else [0, depth - 1]
    sparse = {"moe_layers": layers, "num_experts": 4, "num_classes": 5, **FORMS.get(rule, {"rule": rule})}
    if name == "vmoe_upcycled":
        net = timm.create_model(name, backbone_args={**shape, "patch_size": 4}, img_size=12, **sparse, **extra)
    else:
        tanh = {"representation_size": 24} if has_tanh_layer(name) else {}
        size = {"patch_size": patch_of(name), "img_size": 3 * patch_of(name)}
        net = timm.create_model(name, **shape, **size, **sparse, **tanh, **extra)
    nn.init.trunc_normal_(net.head.weight, std=0.1)
    return net


@functools.cache
def has_tanh_layer(name: str) -> bool:
    return isinstance(meta(name).pre_logits, nn.Sequential)


def images(net: MomentumVisionTransformer, count: int = 4) -> Tensor:
    return torch.randn(count, 3, *net.patch_embed.img_size)


def test_every_name_is_listed() -> None:
    assert set(timm.list_models("*moe*")) == set(NAMES)


@EVERY
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(name: str, rule: str) -> None:
    net = small(name, rule, drop_path_rate=0.1).train()
    x, gradients = images(net, 16), []
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)
        torch.manual_seed(5)
        logits, aux_loss = net.forward_with_aux(x)
        assert logits.isfinite().all()
        gradients.append(torch.autograd.grad(logits.square().sum() + aux_loss, list(net.parameters())))
    for (parameter, _), eager, recomputed in zip(net.named_parameters(), *gradients, strict=True):
        assert eager.isfinite().all(), parameter
        assert eager.abs().max() > 0, parameter
        assert torch.equal(eager, recomputed), parameter


@EACH_FAMILY
def test_compiles_whole(name: str, rule: str) -> None:
    torch._dynamo.reset()
    net = small(name, rule, depth=2).eval()
    x = images(net)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x), atol=1e-5, rtol=1e-5)


@EACH_FAMILY
def test_exports_with_a_dynamic_batch(name: str, rule: str) -> None:
    net = small(name, rule, depth=2).eval()
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    program = torch.export.export(net, (images(net, 3),), dynamic_shapes=dynamic, strict=False).module()
    for count in (1, 5):
        x = images(net, count)
        torch.testing.assert_close(program(x), net(x), atol=1e-5, rtol=1e-5)


@EVERY
def test_directory_and_safetensors_round_trips_are_bitwise(name: str, rule: str, tmp_path: Path) -> None:
    net = small(name, rule).eval()
    x = images(net)
    safetensors.torch.save_file(net.state_dict(), tmp_path / "w.safetensors")
    other = small(name, rule).eval()
    assert not torch.equal(other(x), net(x))
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"))
    assert torch.equal(other(x), net(x))
    save(net, tmp_path / "net")
    again = timm.create_model(f"local-dir:{tmp_path}/net", pretrained=True).eval()
    assert torch.equal(again(x), net(x))
    assert again.function_settings() == net.function_settings()
    assert again.pretrained_cfg["mean"] == list(net.pretrained_cfg["mean"])
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert config["architecture"] == name
    assert config["model_args"]["rule"] == to_spec(net.rule)
    assert config["model_args"].get("post_norm", "none") == net.post_norm


@EVERY
def test_the_head_goes_and_comes_back(name: str, rule: str) -> None:
    net = small(name, rule).eval()
    x = images(net)
    before = net.forward_head(net.forward_features(x), pre_logits=True)
    net.reset_classifier(0)
    assert isinstance(net.get_classifier(), nn.Identity)
    assert torch.equal(net(x), before)
    assert before.shape == (4, net.head_hidden_size)
    net.reset_classifier(9)
    assert net(x).shape == (4, 9)
    assert net.get_classifier().in_features == net.head_hidden_size
    assert net.num_classes == 9
    assert net.num_features == 32


@EVERY
def test_another_grid(name: str, rule: str, tmp_path: Path) -> None:
    """Five patches by four, forth and through a directory."""
    net = small(name, rule).eval()
    patch = net.patch_embed.patch_size[0]
    net.set_input_size((5 * patch, 4 * patch))
    x = images(net)
    assert x.shape[2:] == (5 * patch, 4 * patch)
    assert net(x).isfinite().all()
    _, taken = net.forward_intermediates(x, indices=[3])
    assert taken[0].shape == (4, 32, 5, 4)
    save(net, tmp_path / "net")
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}/net", pretrained=True).eval()(x), net(x))


@EVERY
def test_features(name: str, rule: str) -> None:
    """forward_intermediates, pruning to what it needs, and timm's features_only."""
    net = small(name, rule).eval()
    x = images(net)
    final, taken = net.forward_intermediates(x, indices=[1, 2], norm=True)
    torch.testing.assert_close(final, net.forward_features(x))
    assert [tuple(y.shape) for y in taken] == [(4, 32, 3, 3)] * 2
    assert [info["module"] for info in net.feature_info] == [f"blocks.{i}" for i in range(4)]
    early = net.forward_intermediates(x, indices=[1], stop_early=True, intermediates_only=True, norm=True)
    assert torch.equal(early[0], taken[0])
    getter = timm.models._features.FeatureGetterNet(copy.deepcopy(net), out_indices=(1, 2), norm=True)
    for actual, expected in zip(getter(x), taken, strict=True):
        assert torch.equal(actual, expected)
    assert net.prune_intermediate_layers([1, 2]) == [1, 2]
    assert len(net.blocks) == 3
    assert net.moe_layers == (1,)
    pruned = net.forward_intermediates(x, indices=[1, 2], intermediates_only=True, norm=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, taken, strict=True))
    assert net(x).shape[0] == 4


@EVERY
def test_optimizer_groups(name: str, rule: str) -> None:
    """Layer decay by block, stem lowest and head at full rate; what is spared decay exists and is spared."""
    net = small(name, rule)
    names = {id(p): n for n, p in net.named_parameters()}
    spared = net.no_weight_decay() & set(names.values())
    assert {"pos_embed", "cls_token"} & set(names.values()) <= spared
    assert {n for n in names.values() if n.endswith("router.mu")} <= spared
    groups = param_groups_layer_decay(
        net, weight_decay=0.1, layer_decay=0.5, no_weight_decay_list=net.no_weight_decay()
    )
    scale = {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert set(scale) == set(names.values())
    assert all(scale[n][1] == 0 for n in spared)
    assert scale["head.weight"] == (1.0, 0.1)
    rates = [scale[f"blocks.{i}.attn.qkv.weight"][0] for i in range(4)]
    assert rates == sorted(rates)
    assert scale["patch_embed.proj.weight"][0] < rates[0]
    create_optimizer_v2(net, "adamw", lr=1e-3, weight_decay=0.1, layer_decay=0.75)


@pytest.mark.parametrize("name", NAMES)
def test_timms_feature_tools(name: str) -> None:
    net = small(name).eval()
    x = images(net)
    config = timm.data.resolve_data_config({}, model=net)
    assert config["input_size"] == tuple(net.pretrained_cfg["input_size"])
    assert timm.data.resolve_input_data_config(net)["input_size"] == (3, *net.patch_embed.img_size)
    assert config["mean"] == tuple(net.pretrained_cfg["mean"])
    for block in net.blocks:
        block.attn.fused_attn = False  # timm's own way to see attention maps
    maps = AttentionExtract(net, method="hook")(x)
    tokens = 9 + net.num_prefix_tokens
    assert [tuple(m.shape) for m in maps.values()] == [(4, 4, tokens, tokens)] * 4
    for attention in maps.values():
        torch.testing.assert_close(attention.sum(-1), torch.ones(4, 4, tokens))


@pytest.mark.parametrize("router", ["TopKRouter", "ExpertChoiceRouter", "SoftRouter", "GShardRouter", "M6TRouter"])
@pytest.mark.parametrize("pos_embed", ["learn", "sincos2d"])
def test_timms_fx_tools(router: str, pos_embed: str, monkeypatch) -> None:
    """AttentionExtract's default method traces the network, in training mode too."""
    monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", 0)
    settings = {"router": router, "pos_embed": pos_embed, "rule": "HeavyBall"}
    net = small("vmoe_custom", **{**settings}).eval()
    x = images(net)
    maps = AttentionExtract(copy.deepcopy(net))(x)
    assert [tuple(m.shape) for m in maps.values()] == [(4, 4, 10, 10)] * 4
    with pytest.raises(ValueError, match="feature_cls=fx: blocks here return tokens and momentum"):
        small("vmoe_custom", features_only=True, feature_cls="fx")


@pytest.mark.parametrize("name", NAMES)
def test_device_and_dtype_reach_every_tensor(name: str) -> None:
    for settings in ({"device": "meta"}, {"dtype": torch.bfloat16}):
        net = small(name, "HeavyBall", **settings) if "dtype" in settings else meta_by_argument(name)
        assert {p.device.type for p in net.parameters()} == {settings.get("device", "cpu")}
        assert {p.dtype for p in net.parameters()} == {settings.get("dtype", torch.float32)}
    net.eval()
    assert net(images(net).bfloat16()).isfinite().all()


def meta_by_argument(name: str) -> nn.Module:
    extra = {"backbone_args": {"depth": 4}} if name == "vmoe_upcycled" else {}
    return timm.create_model(name, device="meta", **extra)


@pytest.mark.parametrize("rule", [HeavyBall(learn=True), HeavyBall()])
def test_from_the_meta_device_to_published_weights(rule: MomentumRule) -> None:
    """to_empty, then init_weights: every tensor starts as published."""
    with torch.device("meta"):
        net = timm.create_model("vmoe_tiny_patch4_16", rule=rule, num_classes=5)
    net = net.to_empty(device="cpu")
    for parameter in net.parameters():
        nn.init.constant_(parameter, float("nan"))
    net.init_weights()
    assert all(p.isfinite().all() for p in net.parameters())
    torch.testing.assert_close(net.head.bias, torch.full((5,), -torch.tensor(5.0).log().item()))
    experts = net.blocks[1].mlp.experts.fc1.weight
    assert torch.equal(experts[0], experts[3])
    if rule.learn:
        assert net.blocks[1].momentum()["mu"].item() == pytest.approx(0.7, abs=1e-6)
    with pytest.raises(ValueError, match="weight_init=jax"):
        net.init_weights("jax")


@pytest.mark.parametrize(
    "setting",
    [{"scale_mlp_norm": True}, {"proj_bias": False}, {"mlp_layer": timm.layers.GluMlp}, {"weight_init": "jax"}],
)
def test_settings_that_experts_do_not_have_are_refused(setting: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))}=.*not for networks with experts"):
        timm.create_model("vmoe_tiny_patch4_16", **setting)


def test_dropout_of_the_mlps_is_that_of_the_experts_where_nothing_else_is_said() -> None:
    for settings, rate in (({}, 0.3), ({"expert_drop_rate": 0.1}, 0.1)):
        net = timm.create_model("vmoe_tiny_patch4_16", proj_drop_rate=0.3, **settings)
        assert net.blocks[1].mlp.experts.drop.p == rate
        assert net.blocks[0].mlp.drop1.p == 0.3


def test_foreign_checkpoint_files_are_pointed_to_the_import(tmp_path: Path) -> None:
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="vmoe-momentum import flax"):
        timm.create_model("vmoe_tiny_patch4_16", checkpoint_path=str(tmp_path / "w.npz"))


def test_an_empty_batch() -> None:
    net = timm.create_model("vmoe_tiny_patch4_16").train()
    assert net(torch.randn(0, 3, 16, 16)).shape == (0, 1000)


def test_features_only() -> None:
    net = timm.create_model("vmoe_tiny_patch4_16", features_only=True, out_indices=(1, 3))
    assert [tuple(y.shape) for y in net(torch.randn(2, 3, 16, 16))] == [(2, 64, 4, 4)] * 2


INDUCTOR = ("Adam",)  # the one of most operators


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [rule if rule in INDUCTOR else pytest.param(rule, marks=pytest.mark.long) for rule in RULES]
)
def test_compiles_with_inductor(rule: str) -> None:
    torch._dynamo.reset()
    net = small("vmoe_tiny_patch4_16", rule, depth=2).eval()
    x = images(net)
    torch.testing.assert_close(torch.compile(net, fullgraph=True)(x), net(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_an_object_works_where_a_name_does(rule: str, tmp_path: Path) -> None:
    given = registered(MomentumRule)[rule]()
    net = small("vmoe_tiny_patch4_16", given)
    assert to_spec(net.rule) == to_spec(given)
    save(net, tmp_path / "net")
    again = timm.create_model(f"local-dir:{tmp_path}/net", pretrained=True)
    assert to_spec(again.rule) == to_spec(given)


# name: width, blocks, MLP, patch, sparse blocks, experts
SMALL, BASE, LARGE, HUGE = (512, 8, 2048), (768, 12, 3072), (1024, 24, 4096), (1280, 32, 5120)
SIZES = {
    "vmoe_small_patch32_224": (*SMALL, 32, (5, 7), 8),
    "vmoe_small_every2_patch32_224": (*SMALL, 32, range(1, 8, 2), 32),
    "vmoe_small_every2_experts8_patch32_224": (*SMALL, 32, range(1, 8, 2), 8),
    "vmoe_small_every2_experts8_patch4_28": (*SMALL, 4, range(1, 8, 2), 8),
    "vmoe_small_patch16_224": (*SMALL, 16, (5, 7), 8),
    "vmoe_base_last2_patch32_224": (*BASE, 32, (9, 11), 32),
    "vmoe_base_every2_patch32_224": (*BASE, 32, range(1, 12, 2), 32),
    "vmoe_base_every2_experts8_patch32_224": (*BASE, 32, range(1, 12, 2), 8),
    "vmoe_base_patch16_224": (*BASE, 16, range(1, 12, 2), 8),
    "vmoe_base_patch16_384": (*BASE, 16, range(1, 12, 2), 8),
    "vmoe_base_last2_patch16_224": (*BASE, 16, (9, 11), 32),
    "vmoe_large_last2_patch32_224": (*LARGE, 32, (21, 23), 32),
    "vmoe_large_every2_patch32_224": (*LARGE, 32, range(1, 24, 2), 32),
    "vmoe_large_last2_patch16_224": (*LARGE, 16, (21, 23), 32),
    "vmoe_large_every2_patch16_224": (*LARGE, 16, range(1, 24, 2), 32),
    "vmoe_huge_last5_patch14_224": (*HUGE, 14, range(23, 32, 2), 32),
    "vmoe_huge_every2_patch14_224": (*HUGE, 14, range(1, 32, 2), 32),
    "soft_moe_small_patch16_224": (384, 12, 1536, 16, range(6, 12), 128),
    "soft_moe_small_patch14_224": (384, 12, 1536, 14, range(6, 12), 256),
    "soft_moe_base_patch16_224": (*BASE, 16, range(6, 12), 128),
    "soft_moe_large_patch16_224": (*LARGE, 16, range(12, 24), 128),
    "soft_moe_huge_patch14_224": (*HUGE, 14, range(16, 32), 256),
    "deep_vmoe_small_patch16_224": (384, 56, 1536, 16, range(1, 56, 2), 8),
    "vmoe_tiny_patch4_16": (64, 8, 128, 4, range(1, 8, 2), 4),
    "vmoe_tiny_patch7_28": (64, 8, 128, 7, range(1, 8, 2), 4),
    "deep_vmoe_tiny_patch4_16": (64, 56, 128, 4, range(1, 56, 2), 4),
}


def meta(name: str, **settings) -> MomentumVisionTransformer:
    with torch.device("meta"):
        return timm.create_model(name, **settings)


def count(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_true_size(name: str) -> None:
    """Placement, and the number of parameters by hand, on the meta device; the committed table says the same."""
    width, depth, hidden, patch, sparse, experts = SIZES[name]
    soft, tanh = name.startswith("soft"), name.startswith("vmoe") and "tiny" not in name
    tanh = tanh and not name.startswith("vmoe_base_patch16_")
    side = int(name.rpartition("_")[2])
    attention, mlp, norms = 4 * width * width + 4 * width, 2 * width * hidden + hidden + width, 4 * width
    heads = {384: 6, 64: 4}.get(width, 8 if width == 512 else 12 if width == 768 else 16)
    if soft:
        attention += 2 * width // heads
    router = experts * width + soft
    total = depth * (attention + norms) + (depth - len(sparse)) * mlp + len(sparse) * (experts * mlp + router)
    total += patch * patch * 3 * width + width + ((side // patch) ** 2 + 1 - soft) * width + 2 * width
    total += (0 if soft else width) + tanh * (width * width + width) + 1000 * width + 1000
    net = meta(name)
    assert count(net) == total
    assert net.moe_layers == tuple(sparse)
    assert {block.attn.num_heads for block in net.blocks} == {heads}
    assert net.blocks[-1].mlp.experts.fc1.weight.shape == (experts, hidden, width)
    with (ROOT / "benchmarks" / "results" / "zoo.csv").open(newline="") as file:
        (row,) = [row for row in csv.DictReader(file) if row["name"] == name]
    idle = 0 if soft else len(sparse) * (experts - 2) * mlp
    assert (int(row["parameters"]), int(row["active"])) == (total, total - idle)


def test_the_committed_table_is_what_its_command_counts(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    counted = runpy.run_path(str(ROOT / "benchmarks" / "zoo.py"))["row"]
    with (ROOT / "benchmarks" / "results" / "zoo.csv").open(newline="") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    for name in ("vmoe_tiny_patch4_16", "vmoe_base_patch16_384", "soft_moe_small_patch16_224"):
        found = counted(name)
        assert float(table[name].pop("gflops")) == pytest.approx(found.pop("gflops"), rel=1e-5)
        assert table[name] == {key: str(value) for key, value in found.items()}


def test_every_sized_name_is_counted() -> None:
    assert set(SIZES) == set(NAMES) - {"vmoe_custom", "vmoe_upcycled"}
