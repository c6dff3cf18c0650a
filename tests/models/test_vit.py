"""The network: equal to timm's without experts, and equal to itself however it is run."""

import copy
import inspect

import pytest
import timm
import torch
from registered import registered
from torch import Tensor, nn

import vmoe_momentum
from vmoe_momentum import HeavyBall, Nesterov, Residual, TopKRouter, create_model
from vmoe_momentum.models import MomentumBlock, MomentumVisionTransformer
from vmoe_momentum.models.blocks import QkNormAttention
from vmoe_momentum.models.directory import save
from vmoe_momentum.momentum import Carry, MomentumRule
from vmoe_momentum.training import OptimizerSettings

RULES = {"Residual": Residual(), "HeavyBall": HeavyBall(), "HeavyBall learned": HeavyBall(learn=True)}


def tiny(rule=None, **settings) -> MomentumVisionTransformer:
    """The demo's network with a head that is not zero, so that logits say something."""
    net = create_model("vmoe_tiny_patch4_16", rule=rule, num_classes=10, **settings)
    nn.init.trunc_normal_(net.head.weight, std=0.02)
    return net


def shallow(rule) -> MomentumVisionTransformer:
    """Four blocks, two of them sparse: compiles in half the time."""
    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
    net = MomentumVisionTransformer(**shape, rule=rule, moe_layers="every2", num_experts=4, representation_size=32)
    nn.init.trunc_normal_(net.head.weight, std=0.02)
    return net


def images(count: int = 4, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size)


def test_without_experts_it_is_timms_vit_bitwise() -> None:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}
    theirs = timm.models.VisionTransformer(**shape, drop_path_rate=0.3, init_values=0.1)
    ours = MomentumVisionTransformer(**shape, drop_path_rate=0.3, init_values=0.1, moe_layers="none")
    ours.load_state_dict(theirs.state_dict())
    x = images(size=32)
    for training in (False, True):
        ours.train(training), theirs.train(training)
        outputs = []
        for net in (ours, theirs):
            torch.manual_seed(3)
            outputs.append(net(x))
        assert torch.equal(*outputs)
    gradients = [torch.autograd.grad(net.eval()(x).square().sum(), list(net.parameters())) for net in (ours, theirs)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_one_expert_that_all_tokens_take_is_the_dense_vit_of_equal_active_flops() -> None:
    """In place of each layer of K experts an MLP K times as wide, with the gradients of timm's."""
    sparse = tiny(router=TopKRouter(top_k=2))
    one = tiny(num_experts=1, expert_ratio=4.0, router=TopKRouter(top_k=1))
    moe_mlp = sparse.blocks[1].mlp.experts.fc1.weight
    assert one.blocks[1].mlp.experts.fc1.weight.shape == (1, 2 * moe_mlp.shape[1], 64)

    def block(depth: int, **settings) -> timm.models.vision_transformer.Block:
        wide = {"mlp_ratio": 4.0} if depth in one.moe_layers else {}
        return timm.models.vision_transformer.Block(**{**settings, **wide})

    shape = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "num_heads": 4, "depth": 8, "mlp_ratio": 2.0}
    act = type(one.blocks[0].mlp.act)
    dense = timm.models.VisionTransformer(**shape, num_classes=10, act_layer=act, block_fn=block)
    ours = {name: value for name, value in one.state_dict().items() if ".mlp.router." not in name}
    dense.load_state_dict(
        {name.replace(".experts", ""): value[0] if ".experts." in name else value for name, value in ours.items()}
    )
    x, gradients = images(), []
    for net in (one.train(), dense.train()):
        logits = net(x)
        logits.square().sum().backward()
        gradients.append((logits.detach(), net.blocks[0].attn.qkv.weight.grad, net.blocks[7].norm2.weight.grad))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
    assert one.forward_with_aux(x)[1] == 0


def test_depth_is_a_setting() -> None:
    named, told = create_model("deep_vmoe_tiny_patch4_16"), create_model("vmoe_tiny_patch4_16", depth=56)
    assert named.moe_layers == told.moe_layers == tuple(range(1, 56, 2))
    assert {k: v.shape for k, v in named.state_dict().items()} == {k: v.shape for k, v in told.state_dict().items()}


def test_a_directory_is_not_given_another_shape(tmp_path) -> None:
    save(tiny(), tmp_path / "net")
    for setting, value in {"depth": 4, "num_experts": 5, "expert_ratio": 1.0, "moe_layers": "none"}.items():
        with pytest.raises(ValueError, match=f"{setting}={value}: the weights in .* of another shape; .*pretrained=fa"):
            create_model(f"local-dir:{tmp_path}/net", **{setting: value})
    assert len(create_model(f"local-dir:{tmp_path}/net", depth=4, pretrained=False).blocks) == 4


def test_heavy_ball_without_momentum_is_residual_bitwise() -> None:
    plain, ball = tiny(Residual()).eval(), tiny(HeavyBall(mu=0.0, gamma=1.0)).eval()
    ball.load_state_dict(plain.state_dict())
    x = images()
    assert torch.equal(plain(x), ball(x))


def test_the_rules_share_a_state_dict_but_not_a_function() -> None:
    plain, ball = tiny(Residual()).eval(), tiny(HeavyBall()).eval()
    ball.load_state_dict(plain.state_dict())
    x = images()
    assert not torch.allclose(plain(x), ball(x))


@pytest.mark.parametrize(
    ("placement", "steps"),
    [
        ({}, (1, 2, 3, 4)),
        ({"momentum_last": 2}, (0, 0, 1, 2)),
        ({"momentum_restart": 2}, (1, 2, 1, 2)),
        ({"momentum_last": 3, "momentum_restart": 2}, (0, 1, 2, 1)),
    ],
)
def test_momentum_over_the_last_blocks_or_restarted(placement: dict, steps: tuple[int, ...]) -> None:
    """The network's loop, written out once more."""
    net, pixels = tiny(HeavyBall(mu=0.6, gamma=0.9), **placement).eval(), images()
    x, left = net._pos_embed(net.patch_embed(pixels)), list(steps)
    p = torch.zeros_like(x)
    for index, block in enumerate(net.blocks):
        x = x + block.attn(block.norm1(x))
        t = left.pop(0) if index in net.moe_layers else 0
        u = block.mlp(block.norm2(x))[0] if index in net.moe_layers else block.mlp(block.norm2(x))
        if t == 0:
            x = x + u
        else:
            p = (0.6 * p if t > 1 else 0.0) + u
            x = x + 0.9 * p
    torch.testing.assert_close(net.forward_features(pixels), net.norm(x), atol=1e-6, rtol=1e-6)
    assert net.function_settings()["momentum_steps"] == list(steps)


@pytest.mark.parametrize("setting", [{"momentum_last": 5}, {"momentum_restart": 9}])
def test_impossible_placements_of_momentum_are_named(setting: dict) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=f"{name}={setting[name]}: the network has 4 MoE blocks; use 1..4"):
        tiny(HeavyBall(), **setting)


def test_momentum_runs_through_the_sparse_blocks_only() -> None:
    """The network's loop, written out: p gathers at MoE blocks and passes dense ones unchanged."""
    net, pixels = tiny(HeavyBall(mu=0.6, gamma=0.9)).eval(), images()
    x = net._pos_embed(net.patch_embed(pixels))
    p = torch.zeros_like(x)
    for index, block in enumerate(net.blocks):
        x = x + block.attn(block.norm1(x))
        if index in (1, 3, 5, 7):
            p = 0.6 * p + block.mlp(block.norm2(x))[0]
            x = x + 0.9 * p
        else:
            x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(net.forward_features(pixels), net.norm(x), atol=1e-6, rtol=1e-6)


def test_momentum_of_dense_blocks_too_runs_from_the_first_sparse_block_on() -> None:
    net, pixels = tiny(HeavyBall(mu=0.6, gamma=0.9, dense_blocks=True)).eval(), images()
    x = net._pos_embed(net.patch_embed(pixels))
    p = torch.zeros_like(x)
    for index, block in enumerate(net.blocks):
        x = x + block.attn(block.norm1(x))
        u = block.mlp(block.norm2(x))
        u, gathered = u[0] if index % 2 else u, p if index > 1 else 0.0 * p
        p = 0.6 * gathered + u
        x = x + 0.9 * p
    torch.testing.assert_close(net.forward_features(pixels), net.norm(x), atol=1e-6, rtol=1e-6)
    start = Carry((torch.ones_like(x),), torch.zeros(()))
    last = tiny(HeavyBall(mu=0.6, gamma=0.9, dense_blocks=True), momentum_last=1).eval()
    for block in last.blocks[0:6:2]:  # where there is no momentum yet a dense block's step is the plain one
        y = x + block.attn(block.norm1(x))
        after, carry = block(x, start)
        assert torch.equal(after, y + block.mlp(block.norm2(y))) and carry == start


@pytest.mark.parametrize("name", RULES)
def test_every_parameter_gets_a_gradient_and_checkpointing_changes_none(name: str) -> None:
    net = tiny(RULES[name], drop_path_rate=0.3, expert_drop_rate=0.1).train()
    x, gradients = images(8), []
    for checkpointing in (False, True):
        net.set_grad_checkpointing(checkpointing)
        torch.manual_seed(5)
        logits, aux_loss = net.forward_with_aux(x)
        gradients.append(torch.autograd.grad(logits.square().sum() + aux_loss, list(net.parameters())))
    for (parameter, _), eager, recomputed in zip(net.named_parameters(), *gradients, strict=True):
        # the first block's mu multiplies an empty buffer
        assert eager.abs().max() > 0 or parameter == "blocks.1.momentum.raw_mu", parameter
        assert torch.equal(eager, recomputed), parameter


def test_the_router_learns_from_the_auxiliary_loss_alone() -> None:
    net = tiny().train()
    _, aux_loss = net.forward_with_aux(images())
    aux_loss.backward()
    for block in net.blocks:
        if isinstance(block, MomentumBlock):
            assert block.mlp.router.weight.grad.abs().max() > 0
    assert net.head.weight.grad is None


def test_the_auxiliary_loss_is_the_sum_over_blocks() -> None:
    net = tiny(router=TopKRouter(noise_std=0.0)).train()
    seen = []
    for block in net.blocks:
        if isinstance(block, MomentumBlock):
            block.mlp.router.register_forward_hook(lambda m, i, o: seen.append(o[1].auxiliary.mean()))
    _, aux_loss = net.forward_with_aux(images())
    assert len(seen) == 4
    torch.testing.assert_close(aux_loss, sum(seen))


def test_logits_do_not_depend_on_batch_mates() -> None:
    """To 1e-6, not bitwise: BLAS picks its kernels, hence its order of summation, by the number of rows."""
    net, x = tiny(HeavyBall()).eval(), images(8)
    together = net(x)
    for size in (1, 3, 8):
        torch.testing.assert_close(net(x[:size]), together[:size], atol=1e-6, rtol=0)


@pytest.mark.long
def test_a_learned_rule_compiles_whole_and_exports_with_a_dynamic_batch() -> None:
    """The others: test_zoo.py."""
    net, x = shallow(HeavyBall(learn=True)).eval(), images(3)
    compiled = torch.compile(copy.deepcopy(net), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), net(x), atol=1e-6, rtol=1e-6)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False)
    for size in (1, 2, 9):
        x = images(size)
        torch.testing.assert_close(program.module()(x), net(x), atol=1e-5, rtol=0)


def test_training_compiles_whole() -> None:
    net = shallow(HeavyBall()).train()
    for block in net.blocks[1::2]:
        router = block.mlp.router  # noise off: the compiled graph draws other numbers
        router.noise_std, router.batch_priority, router.capacity_factor = 0.0, True, 0.7
    compiled, gradients = torch.compile(net.forward_with_aux, fullgraph=True, backend="aot_eager"), []
    x = images()
    for forward in (net.forward_with_aux, compiled):
        logits, aux_loss = forward(x)
        gradients.append(torch.autograd.grad(logits.square().sum() + aux_loss, list(net.parameters())))
    for eager, graph in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, graph, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rule", registered(MomentumRule).values(), ids=lambda rule: rule.__name__)
def test_tokens_and_buffers_stay_float32_under_autocast(rule: type[MomentumRule]) -> None:
    net, seen = tiny(rule()), []
    for block in net.blocks:
        block.register_forward_hook(lambda m, i, o: seen.append({o[0].dtype, *(b.dtype for b in o[1].momentum)}))
    with torch.autocast("cpu", torch.bfloat16):
        net(images())
    assert seen == [{torch.float32}] * 8


def test_router_noise_and_drop_path_are_drawn_once_a_block() -> None:
    """A rule that evaluates u twice sees the same function: u(x) - u(x) = 0, also while training."""

    class Twice(Residual):
        def __call__(self, x, u, buffers, t, coefficients):
            first = u(x)
            seen.append((first - u(x)).abs().max().item())
            return x + first, buffers

    seen: list[float] = []
    net = tiny(Twice(), drop_path_rate=0.5).train()
    net(images(16))
    assert len(seen) == 4
    assert max(seen) == 0.0
    drops = [block._drop_path_mask(images(64).flatten(2)).flatten() for block in list(net.blocks)[1::2]]
    assert {0.0} < set(torch.cat(drops).tolist())


def test_the_layer_count_reaches_the_rule() -> None:
    class Counting(Residual):
        def __call__(self, x, u, buffers, t, coefficients):
            seen.append(t)
            return super().__call__(x, u, buffers, t, coefficients)

    seen: list[int] = []
    tiny(Counting())(images())
    assert seen == [1, 2, 3, 4]


def test_weight_decay_spares_what_it_should() -> None:
    net = tiny(HeavyBall(learn=True))
    groups = OptimizerSettings(weight_decay=0.1).build(net).param_groups
    names = {id(p): n for n, p in net.named_parameters()}
    decayed_names, spared_names = (
        {names[id(p)] for group in groups if group["weight_decay"] == decay for p in group["params"]}
        for decay in (0.1, 0)
    )
    assert "blocks.1.mlp.router.weight" in decayed_names  # as published: every kernel, the router's too
    assert {"blocks.1.mlp.experts.fc1.bias", "blocks.1.momentum.raw_mu", "cls_token", "pos_embed"} <= spared_names
    assert all(n.endswith("weight") for n in decayed_names)


def test_published_initialisation() -> None:
    net = create_model("vmoe_tiny_patch4_16", num_classes=10)
    experts = net.blocks[1].mlp.experts
    assert torch.equal(experts.fc1.weight[0], experts.fc1.weight[3])
    assert net.head.weight.abs().max() == 0
    torch.testing.assert_close(net.head.bias, torch.full((10,), -torch.tensor(10.0).log().item()))
    bound = (6 / (64 + 64)) ** 0.5  # xavier of each of q, k, v by itself
    assert 0.95 * bound < net.blocks[0].attn.qkv.weight.abs().max() <= bound
    apart = create_model("vmoe_tiny_patch4_16", share_expert_init=False).blocks[1].mlp.experts
    assert not torch.equal(apart.fc1.weight[0], apart.fc1.weight[3])
    assert net.blocks[0].norm1.eps == 1e-6
    gelu = net.blocks[1].mlp.experts.act(torch.tensor([1.5]))
    torch.testing.assert_close(gelu, nn.functional.gelu(torch.tensor([1.5]), approximate="tanh"))


def test_timm_contract() -> None:
    assert set(timm.list_models("*moe*")) >= {
        "vmoe_tiny_patch4_16",
        "vmoe_small_patch32_224",
        "vmoe_small_patch16_224",
        "vmoe_base_patch16_224",
    }
    net = timm.create_model("vmoe_tiny_patch4_16", rule="HeavyBall", num_classes=5).eval()
    x = images(2)
    final, intermediates = net.forward_intermediates(x, indices=[1, 3])
    assert [tuple(y.shape) for y in intermediates] == [(2, 64, 4, 4)] * 2
    torch.testing.assert_close(final, net.forward_features(x))
    assert net.forward_head(final, pre_logits=True).shape == (2, 64)
    net.reset_classifier(0)
    assert net(x).shape == (2, 64)
    net.set_input_size((32, 32))
    net.reset_classifier(9)
    assert net(images(2, 32)).shape == (2, 9)


def test_the_representation_layer_is_a_tanh_before_the_head() -> None:
    net = tiny(representation_size=24).eval()
    features = net.forward_head(net.forward_features(images()), pre_logits=True)
    assert features.shape == (4, 24)
    assert features.abs().max() < 1
    assert net.head_hidden_size == net.head.in_features == 24
    torch.testing.assert_close(net.pre_logits.fc.bias, torch.zeros(24))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"moe_layers": [3, 8]}, r"moe_layers=\[3, 8\]: index 8 is past depth=8; use 0..7"),
        ({"moe_layers": "first2"}, "moe_layers='first2'"),
        ({"depth": 0}, "moe_layers='every2': a network of depth 0"),
        ({"expert_ratio": 0.01}, "expert_ratio=0.01: leaves an expert no hidden unit; use at least 0.015625"),
        ({"moe_layers": "last9"}, "moe_layers='last9'"),
        ({"moe_layers": [1, 1]}, "names a block twice"),
        ({"image_size": 18}, "image_size=18 is not a multiple of the patch size 4; use 16 or 20"),
        ({"num_experts": 0}, "num_experts=0"),
        ({"num_experts": 1}, "router.top_k=2 is more than num_experts=1"),
    ],
)
def test_impossible_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("vmoe_tiny_patch4_16", **settings)


CHANGES = {
    "name": "vmoe_small_patch32_224",
    "rule": Nesterov(),
    "momentum_last": 2,
    "momentum_restart": 2,
    "router": TopKRouter(top_k=1),
    "depth": 4,
    "moe_layers": "last2",
    "num_experts": 5,
    "expert_ratio": 1.0,
    "representation_size": 24,
    "pos_embed": "sincos2d",
    "expert_drop_rate": 0.5,
    "share_expert_init": False,
    "drop_rate": 0.5,
    "drop_path_rate": 0.5,
    "global_pool": "avg",
    "num_classes": 7,
    "image_size": 32,
    "post_norm": "dense",
    "grad_checkpointing": True,
}


@pytest.mark.parametrize("setting", CHANGES)
def test_every_setting_changes_something(setting: str) -> None:
    """The training-mode logits of the same pixels, their shape, or what happens in the backward pass.

    dynamic_img_size: tests/training/test_augmentation.py.
    """
    assert set(CHANGES) | {"pretrained", "dynamic_img_size"} == set(inspect.signature(create_model).parameters)
    outputs, nets = [], []
    for changed in ({}, {setting: CHANGES[setting]}):
        torch.manual_seed(2)
        net = create_model(**{"name": "vmoe_tiny_patch4_16", "num_classes": 10, "rule": HeavyBall(), **changed}).train()
        torch.manual_seed(2)
        nn.init.normal_(net.head.weight)
        pixels = torch.linspace(-1, 1, 4 * 3 * net.patch_embed.img_size[0] ** 2)
        outputs.append(net(pixels.view(4, 3, *net.patch_embed.img_size)))
        nets.append(net)
    same_logits = outputs[0].shape == outputs[1].shape and torch.equal(*outputs)
    assert not same_logits or nets[0].grad_checkpointing != nets[1].grad_checkpointing


def test_weights_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ValueError, match="no weights are published for vmoe_tiny_patch4_16"):
        create_model("vmoe_tiny_patch4_16", pretrained=True)


def test_other_timm_models_take_no_sparse_settings() -> None:
    with pytest.raises(ValueError, match="rule=HeavyBall.*has no sparse layers"):
        create_model("vit_tiny_patch16_224", rule=HeavyBall())
    with pytest.raises(ValueError, match="did you mean vmoe_tiny_patch4_16"):
        create_model("vmoe_tiny_patch4_1")
    assert isinstance(create_model("vit_tiny_patch16_224", num_classes=3), timm.models.VisionTransformer)


def test_unknown_rules_are_named_when_they_come_from_data() -> None:
    with pytest.raises(ValueError, match="rule=HeavyBal: no such MomentumRule; did you mean HeavyBall"):
        timm.create_model("vmoe_tiny_patch4_16", rule="HeavyBal")
    with pytest.raises(ValueError, match="os.path|no such MomentumRule"):
        timm.create_model("vmoe_tiny_patch4_16", rule={"class_path": "os.path"})
    with pytest.raises(ValueError, match="takes no 'gama'; did you mean gamma"):
        timm.create_model("vmoe_tiny_patch4_16", rule={"class_path": "HeavyBall", "init_args": {"gama": 1}})


def test_public_names() -> None:
    net = vmoe_momentum.create_model("vmoe_tiny_patch4_16", rule=vmoe_momentum.HeavyBall(mu=0.7), num_classes=10)
    model = vmoe_momentum.PixelModel(net).eval()
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(model(pixels), model(pixels / 255), atol=1e-6, rtol=0)
    torch.testing.assert_close(model(pixels), net(pixels / 127.5 - 1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("pool", ["", "avg", "avgmax", "max", "token", "map", "prr"])
def test_every_pooling_of_timm_works(pool: str, qk_norm: bool) -> None:
    """prr has attention of its own, too, without norms of queries and keys."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    attention = {"attn_layer": QkNormAttention, "qk_norm": True} if qk_norm else {}
    net = MomentumVisionTransformer(
        moe_layers=[1], num_experts=2, class_token=pool == "token", global_pool=pool, **sizes, **attention
    )
    out = net(torch.rand(2, 3, 16, 16))
    assert out.shape == ((2, 4, 3) if pool == "" else (2, 3))
    out.sum().backward()
