"""Pairwise router consistency: its closed forms, a loop written out, and the gates it is fed with."""

import pytest
import timm
import torch
from torch import Tensor

from vmoe_momentum import ExpertChoiceRouter, SoftRouter, TopKRouter, create_model
from vmoe_momentum.moe import router_consistency
from vmoe_momentum.training import AdversarialSettings, ConsistencySettings, ImageClassifier


def one_hot(experts: list[int], num_experts: int) -> Tensor:
    return torch.eye(num_experts, dtype=torch.float64)[experts]


def test_alike_and_even_is_zero_apart_is_not() -> None:
    even = one_hot([0, 1, 2, 0, 1, 2], 3)
    assert router_consistency(even, even) == 0
    # all pairs apart: nothing on the diagonal, C_01 = C_12 = C_20 = 1 of six places off it
    apart = one_hot([1, 2, 0, 1, 2, 0], 3)
    assert float(router_consistency(even, apart)) == pytest.approx(1 + 10 * 3 / 6)
    # all with one expert: C_00 = 3
    same = one_hot([0] * 6, 3)
    assert float(router_consistency(same, same)) == pytest.approx((4 + 1 + 1) / 3)
    undecided = torch.full((4, 3), 1 / 3, dtype=torch.float64)
    assert float(router_consistency(undecided, undecided)) == pytest.approx(4 / 9 + 10 / 9)


def test_it_is_the_loop_written_out_with_gradients() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    g, h = logits.softmax(dim=-1)
    pairs, num_experts = 15, 4
    diagonal, off = [], []
    for e in range(num_experts):
        for f in range(num_experts):
            c = sum(g.reshape(-1, 4)[n, e] * h.reshape(-1, 4)[n, f] for n in range(pairs)) * num_experts / pairs
            (diagonal if e == f else off).append((c - 1) ** 2 if e == f else c**2)
    expected = sum(diagonal) / len(diagonal) + 10 * sum(off) / len(off)
    found = router_consistency(g, h)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True) for x in (found, expected)))
    assert torch.autograd.gradcheck(lambda x: router_consistency(*x.softmax(dim=-1)), logits)


def test_of_no_pairs_and_of_one_expert() -> None:
    assert router_consistency(torch.zeros(0, 5, 4), torch.zeros(0, 5, 4)) == 0
    assert router_consistency(torch.ones(3, 1), torch.ones(3, 1)) == 0


ROUTERS = [TopKRouter(capacity_factor="dropless"), TopKRouter(group_size=34), ExpertChoiceRouter(), SoftRouter()]


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("router", ROUTERS, ids=["top-k", "groups", "expert choice", "soft"])
def test_gates_are_those_of_every_sparse_block_without_noise(router, recomputed: bool) -> None:
    torch.manual_seed(0)
    net = create_model("vmoe_tiny_patch4_16", rule="HeavyBall", router=router, depth=4, num_classes=10).train()
    net.set_grad_checkpointing(recomputed)
    seen = []
    for index in net.moe_layers:
        net.blocks[index].mlp.router.register_forward_hook(lambda layer, inputs, _: seen.append((layer, inputs[0])))
    images = torch.randn(4, 3, 16, 16)
    torch.manual_seed(1)
    logits, aux_loss, gates = net.forward_with_gates(images)
    assert len(gates) == len(net.moe_layers) == 2
    for (layer, x), found in zip(seen, gates, strict=False):
        plan, _ = layer(x, None)
        torch.testing.assert_close(found, plan.gates.reshape(4, x.shape[1], -1))
    torch.manual_seed(1)
    torch.testing.assert_close(net.forward_with_aux(images), (logits, aux_loss), atol=0, rtol=0)
    loss = sum(router_consistency(g[:2], g[2:]) for g in gates)
    loss.backward()
    for index in net.moe_layers:
        gate = net.blocks[index].mlp.router
        assert sum(p.grad.abs().sum() for p in gate.parameters() if p.grad is not None) > 0


def module(consistency: ConsistencySettings | None, **settings) -> ImageClassifier:
    torch.manual_seed(0)
    router = TopKRouter(noise_std=0.0, capacity_factor="dropless")
    net = create_model("vmoe_tiny_patch4_16", rule="HeavyBall", router=router, depth=2, num_classes=10)
    torch.nn.init.normal_(net.head.weight)
    return ImageClassifier(net, 10, 16, consistency=consistency, **settings).train()


def batch() -> tuple[Tensor, Tensor]:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(6)


ATTACK = {"adversarial": AdversarialSettings(eps="8/255", start="picture")}


@pytest.mark.parametrize(
    "consistency, settings",
    [
        (ConsistencySettings(), {}),
        (ConsistencySettings(view="attack"), ATTACK),
        (ConsistencySettings(view="attack"), {"adversarial": AdversarialSettings("trades", eps="8/255")}),
    ],
    ids=["augmentation", "pgd", "trades"],
)
def test_the_loss_has_its_weight_and_is_of_pairs(consistency: ConsistencySettings, settings: dict) -> None:
    found = []
    for weight in (0.005, 1.0):
        torch.manual_seed(3)
        changed = ConsistencySettings(weight=weight, view=consistency.view)
        found.append(module(changed, **settings).training_losses(batch())[0])
    one, other = found
    assert one.consistency_loss > 0 and torch.equal(one.consistency_loss, other.consistency_loss)
    torch.testing.assert_close(other.loss - one.loss, 0.995 * one.consistency_loss)


def test_under_pgd_the_clean_pictures_come_along_for_their_routing_only() -> None:
    paired = module(ConsistencySettings(view="attack"), **ATTACK).training_losses(batch())[0]
    alone = module(None, **ATTACK).training_losses(batch())[0]
    torch.testing.assert_close(paired.main_loss, alone.main_loss)


def test_augmented_pictures_keep_their_box_and_change_by_what_is_set() -> None:
    pixels = torch.rand(64, 3, 8, 8)
    assert torch.equal(ConsistencySettings(noise=0.0, contrast=1e-9).augmented(pixels), pixels) or torch.allclose(
        ConsistencySettings(noise=0.0, contrast=1e-9).augmented(pixels), pixels, atol=1e-6
    )
    noisy = ConsistencySettings(noise=0.02, contrast=0.0).augmented(torch.full_like(pixels, 0.5))
    assert float((noisy - 0.5).std()) == pytest.approx(0.02, rel=0.05)
    light = ConsistencySettings(noise=0.0, contrast=0.4).augmented(torch.full_like(pixels, 0.5))
    assert 0.3 <= float(light.min()) < 0.35 and 0.65 < float(light.max()) <= 0.7
    assert torch.equal(light, light[:, :1, :1, :1].expand_as(light))  # one draw a picture
    strong = ConsistencySettings(noise=1.0).augmented(pixels)
    assert strong.min() >= 0 and strong.max() <= 1


def test_what_cannot_be_paired_is_refused() -> None:
    dense = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=10)
    with pytest.raises(ValueError, match="model.consistency: .* has no sparse blocks"):
        ImageClassifier(dense, 10, 16, consistency=ConsistencySettings())
    with pytest.raises(ValueError, match="view=attack without model.adversarial; set"):
        module(ConsistencySettings(view="attack"))
    with pytest.raises(ValueError, match="view=augmentation beside model.adversarial; use view=attack"):
        module(ConsistencySettings(), **ATTACK)
    with pytest.raises(ValueError, match="noise=0 and contrast=0"):
        ConsistencySettings(noise=0, contrast=0)


def test_routing_groups_must_fit_the_pairs_too() -> None:
    module = ImageClassifier(
        create_model("vmoe_tiny_patch4_16", router=TopKRouter(group_size=4 * 17), depth=2), 10, 16,
        adversarial=AdversarialSettings("trades", share=0.5),
    )  # fmt: skip
    module.check_groups([16], 8)  # 8 + 4 images in groups of 4
    with pytest.raises(ValueError, match="data.batch_size=12"):  # 12 + 6
        module.check_groups([16], 12)


@pytest.mark.long
def test_compiled_it_is_the_same() -> None:
    torch.manual_seed(3)
    plain = module(ConsistencySettings(noise=0.0)).training_losses(batch())[0]
    torch.manual_seed(3)
    compiled = module(ConsistencySettings(noise=0.0), compile=True).training_losses(batch())[0]
    torch.testing.assert_close(compiled.consistency_loss, plain.consistency_loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(compiled.loss, plain.loss, atol=1e-5, rtol=1e-5)
