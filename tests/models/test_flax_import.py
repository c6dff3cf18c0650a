"""Imported V-MoE networks against the reference's numbers, and against float64 loops where there are none."""

import math
from pathlib import Path

import naive_vmoe
import numpy as np
import pytest
import timm
import torch
from flax_files import random_params, write_official
from oracle_files import FOLDER, Oracle, assert_gradient
from torch import Tensor

from vmoe_momentum import (
    ExpertChoiceRouter,
    GShardRouter,
    HeavyBall,
    Residual,
    SoftRouter,
    TopKRouter,
    cli,
    create_model,
    from_flax,
    read_flax,
)
from vmoe_momentum.models import MomentumBlock, MomentumVisionTransformer
from vmoe_momentum.models.directory import save
from vmoe_momentum.models.flax_import import read_shape
from vmoe_momentum.models.flax_layout import layout

TINY = Oracle("vit_moe_tiny.npz")
CASES = list(TINY.meta["cases"])


def params_of(oracle: Oracle, case: str) -> dict[str, np.ndarray]:
    prefix = f"{case}/params/"
    return {name.removeprefix(prefix): oracle.arrays[name] for name in oracle.arrays.files if name.startswith(prefix)}


def router_of(model: dict) -> TopKRouter:
    moe = model["encoder"]["moe"]
    settings, dispatcher = moe["router"], moe["router"]["dispatcher"]
    return TopKRouter(
        settings["num_selected_experts"],
        eval_capacity_factor=dispatcher["capacity_factor"],
        capacity_multiple_of=dispatcher.get("capacity_multiple_of", 4) or 1,
        batch_priority=dispatcher["batch_priority"],
        group_size=moe["group_size"],
        importance_loss_weight=settings["importance_loss_weight"],
        load_loss_weight=settings["load_loss_weight"],
        gshard_loss_weight=settings["gshard_loss_weight"],
    )


def nchw(images: Tensor | np.ndarray) -> Tensor:
    return torch.as_tensor(images).permute(0, 3, 1, 2)


@pytest.fixture(params=CASES)
def case(request) -> str:
    return request.param


@pytest.fixture
def net(case: str) -> MomentumVisionTransformer:
    router = router_of(TINY.meta["cases"][case]["model"])
    return from_flax(params_of(TINY, case), router).eval()


def test_tiny_logits_and_train_loss_with_every_gradient(case: str, net: MomentumVisionTransformer) -> None:
    images, labels = nchw(TINY[f"{case}/images"]), TINY[f"{case}/labels"].long()
    logits, aux_loss = net.forward_with_aux(images)
    torch.testing.assert_close(logits, TINY[f"{case}/logits"], atol=2e-5, rtol=0)
    expected_aux = TINY[f"{case}/metrics/auxiliary_loss"].mean()
    torch.testing.assert_close(aux_loss, expected_aux, atol=1e-5, rtol=0)
    loss = torch.nn.functional.cross_entropy(logits, labels) + aux_loss
    torch.testing.assert_close(loss, TINY[f"{case}/train_loss"], atol=1e-5, rtol=0)
    loss.backward()
    shape = read_shape(params_of(TINY, case), None)
    ours, checked = dict(net.named_parameters()), 0
    for key, source in layout(shape).items():
        expected = source.build(*(TINY.arrays[f"{case}/grad_train_loss/{name}"] for name in source.arrays))
        assert_gradient(ours[key].grad, torch.from_numpy(np.ascontiguousarray(expected)))
        checked += len(source.arrays)
    assert checked == len(params_of(TINY, case))


def test_tiny_intermediates(case: str, net: MomentumVisionTransformer) -> None:
    """Patches, every block, gates and losses of every sparse layer, the final norm, the head's input."""
    images, seen = nchw(TINY[f"{case}/images"]), {}
    for index, block in enumerate(net.blocks):
        block.register_forward_hook(lambda m, i, o, k=index: seen.__setitem__(k, o[0]))
        if isinstance(block, MomentumBlock):
            block.mlp.router.register_forward_hook(lambda m, i, o, k=index: seen.__setitem__(f"router{k}", o))
    features = net.forward_features(images)
    at = f"{case}/intermediates"
    embedding = net.patch_embed(images)
    torch.testing.assert_close(embedding, TINY[f"{at}/embedding"].flatten(1, 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(features, TINY[f"{at}/encoder_norm"], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        net.forward_head(features, pre_logits=True), TINY[f"{at}/representation"], atol=2e-5, rtol=0
    )
    for index in range(4):
        torch.testing.assert_close(seen[index], TINY[f"{at}/encoderblock_{index}/output"], atol=1e-4, rtol=0)
    dropped = TINY.meta["cases"][case]["num_dropped_per_moe_layer"]
    for index in (1, 3):
        plan, losses = seen[f"router{index}"]
        torch.testing.assert_close(plan.gates, TINY[f"{at}/encoderblock_{index}/gates_softmax"], atol=1e-5, rtol=0)
        assert int((~plan.kept).sum()) == dropped[str(index)] > 0
        weights = TINY[f"{at}/encoderblock_{index}/combine_weights"]
        assert torch.equal(plan.assigned(), (weights > 0).any(-1))
        for name, value in {"auxiliary": losses.auxiliary, **losses.parts}.items():
            expected = TINY[f"{case}/metrics/encoderblock_{index}/{name}_loss"]
            torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["released_layout", "small_pieces", "train_state"])
def test_official_checkpoints_give_their_logits_through_a_directory(prefix: str, tmp_path: Path) -> None:
    official = FOLDER / "official_checkpoint"
    expected = np.load(official / "expected.npz")
    grouping = {"group_size": 34, "eval_capacity_factor": 1.05, "capacity_multiple_of": 1, "batch_priority": "true"}
    flags = [f"--router.{name}={value}" for name, value in {"top_k": 2, **grouping}.items()]
    cli.run(["import", "flax", f"--source={official / prefix}", f"--out={tmp_path}/w", "--router=TopKRouter", *flags])
    net = timm.create_model(f"local-dir:{tmp_path}/w", pretrained=True).eval()
    logits = net(nchw(expected["images"]))
    torch.testing.assert_close(logits, torch.from_numpy(expected["logits"]), atol=2e-5, rtol=0)


def slots(tokens: int, k: int, factor: float, experts: int, multiple: int = 1) -> int:
    return math.ceil(math.ceil(tokens * k * factor / experts) / multiple) * multiple


VARIATIONS = {
    "token, dropless": ({}, TopKRouter(2), naive_vmoe.top_k(2, None), {}),
    "renormalised": ({"seed": 1}, TopKRouter(3, renormalize=True), naive_vmoe.top_k(3, None, renormalize=True), {}),
    "map head": (
        {"classifier": "map", "heads": 4, "moe": (0, 2)},
        TopKRouter(1),
        naive_vmoe.top_k(1, None),
        {},
    ),
    "map head, normalised queries": (
        {"classifier": "map", "qk_norm": True, "representation": 7},
        TopKRouter(1),
        naive_vmoe.top_k(1, None),
        {},
    ),
    "gap, small capacity": (
        {"classifier": "gap", "experts": 3, "hidden": 37},
        TopKRouter(2, eval_capacity_factor=0.5, capacity_multiple_of=1),
        naive_vmoe.top_k(2, slots(9, 2, 0.5, 3)),
        {},
    ),
    "groups that cut through images": (  # 4 images of 10 tokens in groups of 8
        {"seed": 2},
        TopKRouter(2, eval_capacity_factor=0.8, group_size=8, batch_priority=True),
        naive_vmoe.top_k(2, slots(8, 2, 0.8, 4, 4), batch_priority=True),
        {"group_size": 8},
    ),
    "one group, capacity given": (
        {"seed": 3, "representation": 11},
        TopKRouter(2, capacity=3, group_size=40),
        naive_vmoe.top_k(2, 3),
        {"group_size": 40},
    ),
    "expert choice": (
        {"seed": 4, "experts": 6, "classifier": "gap", "moe": (0, 1, 2)},
        ExpertChoiceRouter(1.5, capacity_multiple_of=1, capacity_rounding="round"),
        naive_vmoe.expert_choice(round(9 * 1.5 / 6)),
        {},
    ),
    "expert choice across images": (
        {"seed": 5},
        ExpertChoiceRouter(2.0, group_size=20),
        naive_vmoe.expert_choice(12),
        {"group_size": 20},
    ),
    "soft": ({"slots": 2, "classifier": "gap", "moe": (1, 2)}, None, naive_vmoe.soft, {}),
    "soft across images": (
        {"slots": 1, "experts": 5, "qk_norm": True},
        SoftRouter(group_size=5),
        naive_vmoe.soft,
        {"group_size": 5},
    ),
    "sincos": ({"positions": False, "classifier": "gap"}, TopKRouter(2), naive_vmoe.top_k(2, None), {"sincos": True}),
    "sincos with class token": ({"positions": False}, TopKRouter(2), naive_vmoe.top_k(2, None), {"sincos": True}),
    "oblong": (
        {"image": (8, 20), "patch": (4, 5), "width": 12, "heads": 3},
        TopKRouter(2),
        naive_vmoe.top_k(2, None),
        {},
    ),
    "no experts": ({"moe": ()}, None, naive_vmoe.soft, {}),
    "gshard evaluates as renormalised top 2": (
        {"seed": 6},
        GShardRouter(),
        naive_vmoe.top_k(2, None, renormalize=True),
        {},
    ),
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_variations_against_float64_loops(name: str) -> None:
    shape, router, route, options = VARIATIONS[name]
    params = random_params(**shape)
    image = shape.get("image", (12, 12))
    images = np.random.default_rng(7).uniform(-1, 1, (4, *image, 3))
    positions = {"pos_embed": "sincos2d", "image_size": image} if options.get("sincos") else {"native_size": image}
    net = from_flax(params, router, **positions).double().eval()
    expected = naive_vmoe.forward(params, images, route, **options)
    tolerance = 1e-6 if options.get("sincos") else 1e-11  # the sines are float32, as in the reference
    torch.testing.assert_close(net(nchw(images)), torch.from_numpy(expected), atol=tolerance, rtol=0)


def test_flat_attention_kernels_need_the_number_of_heads() -> None:
    params = random_params(classifier="map")
    flat = dict(params)
    for name, array in params.items():
        if "/query/" in name or "/key/" in name or "/value/" in name:
            flat[name] = array.reshape(16, 16) if name.endswith("kernel") else array.reshape(16)
        elif "/out/kernel" in name:
            flat[name] = array.reshape(16, 16)
    x = torch.randn(2, 3, 12, 12)
    split = from_flax(params, TopKRouter(2)).eval()
    assert torch.equal(from_flax(flat, TopKRouter(2), num_heads=2).eval()(x), split(x))
    with pytest.raises(ValueError, match="num_heads: the shape of .*query/kernel does not say it"):
        from_flax(flat, TopKRouter(2))
    with pytest.raises(ValueError, match="num_heads=3 does not divide the width 16"):
        from_flax(flat, TopKRouter(2), num_heads=3)
    with pytest.raises(ValueError, match="num_heads=4: the tensors have 2"):
        from_flax(params, TopKRouter(2), num_heads=4)


def test_another_image_size_resamples_the_positions_as_timm_does() -> None:
    params = random_params()
    native, larger = from_flax(params, TopKRouter(2)), from_flax(params, TopKRouter(2), image_size=20)
    assert larger.patch_embed.grid_size == (5, 5)
    expected = timm.layers.resample_abs_pos_embed(native.pos_embed, (5, 5), (3, 3), num_prefix_tokens=1)
    torch.testing.assert_close(larger.pos_embed, expected)
    assert larger(torch.randn(2, 3, 20, 20)).isfinite().all()


def test_an_oblong_grid_of_as_many_patches_is_resampled_too() -> None:
    """16 patches read as 4 x 4 become 2 x 8; positions made for 2 x 8 stay as they are."""
    params = random_params(image=(16, 16))
    square = from_flax(params, TopKRouter(2))
    oblong = from_flax(params, TopKRouter(2), image_size=(8, 32))
    expected = timm.layers.resample_abs_pos_embed(square.pos_embed, (2, 8), (4, 4), num_prefix_tokens=1)
    torch.testing.assert_close(oblong.pos_embed, expected)
    native = from_flax(params, TopKRouter(2), native_size=(8, 32))
    assert torch.equal(native.pos_embed, square.pos_embed)
    assert native.patch_embed.grid_size == oblong.patch_embed.grid_size == (2, 8)
    both = from_flax(params, TopKRouter(2), native_size=(8, 32), image_size=16)
    expected = timm.layers.resample_abs_pos_embed(square.pos_embed, (4, 4), (2, 8), num_prefix_tokens=1)
    torch.testing.assert_close(both.pos_embed, expected)


def test_the_head_can_be_dropped_or_replaced() -> None:
    params = random_params(representation=7)
    kept, dropped, fresh = (from_flax(params, TopKRouter(2), num_classes=n).eval() for n in (None, 0, 9))
    x = torch.randn(2, 3, 12, 12)
    assert kept(x).shape == (2, 5)
    torch.testing.assert_close(dropped(x), kept.forward_head(kept.forward_features(x), pre_logits=True))
    torch.testing.assert_close(fresh(x), torch.full((2, 9), -math.log(9)))
    headless = {name: array for name, array in params.items() if not name.startswith("head/")}
    assert torch.equal(from_flax(headless, TopKRouter(2)).eval()(x), dropped(x))


def test_a_momentum_rule_may_be_put_on_top() -> None:
    params = random_params(moe=(0, 1, 2))
    x = torch.randn(2, 3, 12, 12)
    plain, ball, off = (
        from_flax(params, TopKRouter(2), rule).eval()(x) for rule in (None, HeavyBall(learn=True), HeavyBall(mu=0.0))
    )
    assert torch.equal(plain, off)
    assert not torch.allclose(plain, ball)


def test_a_learned_rule_goes_on_and_off_a_directory(tmp_path: Path) -> None:
    plain = from_flax(random_params(moe=(0, 1, 2)), TopKRouter(2)).eval()
    x = torch.randn(2, 3, 12, 12)
    save(plain, tmp_path / "plain")
    learned = create_model(f"local-dir:{tmp_path}/plain", rule=HeavyBall(mu=0.5, learn=True)).eval()
    expected = create_model(f"local-dir:{tmp_path}/plain", rule=HeavyBall(mu=0.5)).eval()
    torch.testing.assert_close(learned(x), expected(x), atol=1e-5, rtol=0)
    save(learned, tmp_path / "learned")
    assert torch.equal(create_model(f"local-dir:{tmp_path}/learned").eval()(x), learned(x))
    assert torch.equal(create_model(f"local-dir:{tmp_path}/learned", rule=Residual()).eval()(x), plain(x))


def test_damaged_directories_are_named(tmp_path: Path) -> None:
    save(from_flax(random_params(), TopKRouter(2)), tmp_path / "w")
    weights, config = tmp_path / "w" / "model.safetensors", tmp_path / "w" / "config.json"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        create_model(f"local-dir:{tmp_path}/w")
    for text in ("{}", "[]", "{"):
        config.write_text(text)
        with pytest.raises(ValueError, match="config.json is damaged, or no timm config"):
            create_model(f"local-dir:{tmp_path}/w")


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in random_params().items() if key != name}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (without("Encoder/encoderblock_2/SelfAttention/key/bias"), ["1 missing", "block_2/SelfAttention/key/bias"]),
        (without("Encoder/encoderblock_1/Moe/Router/dense/kernel"), ["1 missing", "Moe/Router/dense/kernel"]),
        (random_params() | {"extra/kernel": np.zeros(3, np.float32)}, ["1 unknown: extra/kernel"]),
        (random_params() | {"head/bias": np.zeros(6, np.float32)}, ["1 misshapen: head/bias (6,) for (5,)"]),
        (without("embedding/kernel"), ["embedding/kernel is missing"]),
        ({"Encoder/x": np.zeros(3, np.float32)}, ["embedding/kernel is missing"]),
        (random_params() | {"cls": np.zeros(3, np.float32)}, ["cls (3,) for (1, 1, 16)"]),
        (
            {k: v for k, v in random_params().items() if "encoderblock_1" not in k},
            ["missing: Encoder/encoderblock_1, where others follow"],
        ),
        (random_params() | {"head/kernel": np.zeros(5, np.float32)}, ["head/kernel has shape (5,)"]),
    ],
)
def test_tensors_that_do_not_fit_are_named(params: dict, words: list[str]) -> None:
    with pytest.raises(ValueError, match="missing|unknown|misshapen|shape") as caught:
        from_flax(params, TopKRouter(2))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ({}, {}, "router: how many experts a token takes"),
        ({}, {"router": SoftRouter()}, "router=SoftRouter: the file's routers are linear gates"),
        ({"slots": 2}, {"router": TopKRouter(2)}, "router=TopKRouter: the file's routers are soft"),
        ({"slots": 2}, {"router": SoftRouter(5)}, "router.slots_per_expert=5: the file has 2"),
        ({"moe": ()}, {"router": TopKRouter(99)}, "router=TopKRouter: the file has no sparse blocks"),
        ({}, {"router": TopKRouter(2), "native_size": (12, 13)}, r"native_size=\[12, 13\] is not a multiple"),
        ({}, {"router": TopKRouter(2), "native_size": (12, 16)}, "positions for 9 patches"),
        ({}, {"router": TopKRouter(5)}, "router.top_k=5 is more than num_experts=4"),
        ({}, {"router": TopKRouter(2), "image_size": 13}, "is not a multiple of the patch size"),
        ({"image": (8, 20)}, {"router": TopKRouter(2)}, "native_size=None: the file has positions for 10 patches"),
        ({"positions": False}, {"router": TopKRouter(2)}, "pos_embed: the file has no learned positions"),
        ({"positions": False}, {"router": TopKRouter(2), "pos_embed": "none"}, "image_size: without learned positions"),
        ({}, {"router": TopKRouter(2), "pos_embed": "none"}, "pos_embed=none: the file has learned positions"),
    ],
)
def test_settings_that_lie_in_no_tensor_are_asked_for(shape: dict, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_flax(random_params(**shape), **settings)


def test_nothing_is_written_when_something_is_wrong(tmp_path: Path) -> None:
    np.savez(tmp_path / "p.npz", **without("cls"))
    with pytest.raises(ValueError, match="positions for 10 patches.*is the class token, cls, missing"):
        cli.run(["import", "flax", f"--source={tmp_path / 'p.npz'}", f"--out={tmp_path / 'w'}", "--router=TopKRouter"])
    assert [path.name for path in tmp_path.iterdir()] == ["p.npz"]


def test_overwrite_replaces_only_such_directories(tmp_path: Path) -> None:
    write_official(tmp_path / "c", random_params(), 2)
    command = ["import", "flax", f"--source={tmp_path / 'c'}", f"--out={tmp_path / 'w'}", "--router=TopKRouter"]
    cli.run(command)
    with pytest.raises(ValueError, match="it exists"):
        cli.run(command)
    cli.run([*command, "--overwrite", "--num_classes=3"])
    assert timm.create_model(f"local-dir:{tmp_path / 'w'}", pretrained=True).num_classes == 3
    (tmp_path / "w" / "config.json").unlink()
    with pytest.raises(ValueError, match="not written by this command"):
        cli.run([*command, "--overwrite"])


def test_no_jax_is_needed(tmp_path: Path) -> None:
    import sys

    write_official(tmp_path / "c", random_params(), 2)
    read_flax(str(tmp_path / "c"))
    assert "jax" not in sys.modules
