"""Training on attacked pictures, against steps written out here in float64; and what it must leave alone."""

import copy
import random
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from ranks import losses, run_on_ranks
from test_expert_parallel import words
from test_module import CLASSES, batches, classifier, trainer
from torch import Tensor, nn

from vmoe_momentum import TopKRouter, create_model
from vmoe_momentum.models import PixelModel
from vmoe_momentum.robustness import Budget
from vmoe_momentum.training import (
    AdversarialSettings,
    ImageClassifier,
    OptimizerSettings,
    RobustnessCheck,
    adversarial,
    pairs,
)
from vmoe_momentum.training.robustness import robust_share

EPS, STEPS = 8 / 255, 3


def network(noise_std: float = 0.0, **settings) -> nn.Module:
    router = TopKRouter(noise_std=noise_std, capacity_factor="dropless")
    torch.manual_seed(0)
    net = create_model("vmoe_tiny_patch4_16", rule="HeavyBall", router=router, depth=2, num_classes=CLASSES, **settings)
    nn.init.normal_(net.head.weight)  # it starts at zero, and so would every gradient of pixels
    return net


def module(settings: AdversarialSettings, net: nn.Module | None = None, **more) -> ImageClassifier:
    return classifier(net=network() if net is None else net, adversarial=settings, **more).double().train()


def batch(size: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    images[0, :, :4] = 0.0  # at the border of the box, where clipping shows
    images[1, :, :4] = 1.0
    return images, torch.arange(size) % CLASSES


def random_start(images: Tensor, norm: str, seed: int = 7) -> Tensor:
    """As training draws it, so that the rest can be compared."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if norm == "near":
            return (images + (0.001 * torch.randn_like(images)).clamp(-EPS, EPS)).clamp(0, 1)
        return (images + EPS * (2 * torch.rand_like(images) - 1)).clamp(0, 1)


def written_out(model: nn.Module, images: Tensor, x: Tensor, objective, norm: str, size: float) -> Tensor:
    """Image by image, pixel by pixel where that is short enough."""
    for _ in range(STEPS):
        found = []
        for i in range(len(images)):
            one = x[i : i + 1].clone().requires_grad_()
            objective(model(one), i).backward()
            g = one.grad[0]
            if norm == "Linf":
                moved = x[i] + size * torch.where(g > 0, 1.0, torch.where(g < 0, -1.0, 0.0)).double()
                moved = torch.minimum(torch.maximum(moved, images[i] - EPS), images[i] + EPS)
            else:
                moved = x[i] + size * g / g.square().sum().sqrt() - images[i]
                moved = images[i] + moved * min(1.0, EPS / float(moved.square().sum().sqrt()))
            found.append(moved.clamp(0, 1))
        x = torch.stack(found)
    return x


def cross_entropy(labels: Tensor):
    return lambda logits, i: -logits[0].log_softmax(-1)[labels[i]]


def kl(clean: Tensor, other: Tensor) -> Tensor:
    p = clean.exp() / clean.exp().sum(-1, keepdim=True)
    q = other.exp() / other.exp().sum(-1, keepdim=True)
    return (p * (p.log() - q.log())).sum(-1)


def compare(ours: ImageClassifier, by_hand) -> None:
    """Loss and every gradient."""
    images, labels = batch()
    theirs = copy.deepcopy(ours.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)  # initial_seed, to which the step (0) is added
        loss = ours.training_losses((images, labels))[0].loss
    expected = by_hand(theirs, images, labels)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=1e-10)
    gradients = torch.autograd.grad(loss, list(ours.model.parameters()), allow_unused=True)
    wanted = torch.autograd.grad(expected, list(theirs.parameters()), allow_unused=True)
    for (name, _), one, other in zip(ours.model.named_parameters(), gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def pgd_by_hand(norm: str, start: str, size: float, share: int = 5):
    def run(model: PixelModel, images: Tensor, labels: Tensor) -> Tensor:
        model.eval()
        few = images[:share]
        x = few if start == "picture" else random_start(few, norm)
        found = written_out(model, few, x, cross_entropy(labels), norm, size)
        model.zero_grad()
        model.train()
        logits, aux_loss = model.forward_with_aux(torch.cat([found, images[share:]]))
        return -logits.log_softmax(-1)[range(len(labels)), labels].mean() + aux_loss

    return run


def trades_by_hand(beta: float):
    def run(model: PixelModel, images: Tensor, labels: Tensor) -> Tensor:
        model.eval()
        clean = model(images).detach()
        size = 2.5 * EPS / STEPS
        start = random_start(images, "near")
        found = written_out(model, images, start, lambda logits, i: kl(clean[i], logits[0]), "Linf", size)
        model.train()
        logits, aux_loss = model.forward_with_aux(torch.cat([images, found]))
        first, second = logits.split(len(images))
        main = -first.log_softmax(-1)[range(len(labels)), labels].mean()
        return main + beta * kl(first, second).mean() + aux_loss

    return run


PGD = {
    "a random start": (
        {"eps": "8/255", "steps": STEPS}, pgd_by_hand("Linf", "ball", 2.5 * EPS / STEPS)
    ),
    "in L2, a step size": (
        {"eps": EPS, "norm": "L2", "steps": STEPS, "start": "picture", "step_size": "5/255"},
        pgd_by_hand("L2", "picture", 5 / 255),
    ),
    "three of the five": (
        {"eps": "8/255", "steps": STEPS, "start": "picture", "share": 0.6},
        pgd_by_hand("Linf", "picture", 2.5 * EPS / STEPS, share=3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PGD)
def test_pgd_training_is_that_written_out(case: str) -> None:
    settings, by_hand = PGD[case]
    compare(module(AdversarialSettings(**settings)), by_hand)


@pytest.mark.parametrize("beta", [None, 2.5])
def test_trades_is_that_written_out(beta: float | None) -> None:
    settings = AdversarialSettings("trades", eps="8/255", steps=STEPS, start="near", beta=beta)
    compare(module(settings), trades_by_hand(beta or 6.0))


MUTATIONS = {
    "eps in units of 255": (adversarial, "parse_eps", lambda parse: lambda text: 255 * parse(text) / 256),
    "no projection": (adversarial, "project", lambda _: lambda images, found, budget: found.clamp(0, 1)),
    "no box": (
        adversarial, "project",
        lambda _: lambda images, found, budget: images + (found - images).clamp(-budget.eps, budget.eps),
    ),
    "the other sign": (adversarial, "direction", lambda direction: lambda gradient, norm: -direction(gradient, norm)),
    "train flags": (nn.Module, "eval", lambda _: lambda self: self),
    "half the step": (adversarial, "step_size", lambda size: lambda budget: size(budget) / 2),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_the_comparison_sees_mistakes(mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, name, made = MUTATIONS[mutation]
    settings, by_hand = PGD["a random start"]
    router = {"num_experts": 4, "drop_path_rate": 0.5} if mutation == "train flags" else {}
    ours = module(AdversarialSettings(**settings), network(**router))
    if mutation == "train flags":  # by the pictures: dropped paths are drawn anew in the step itself
        images, labels = batch()
        pixels = attack_of(ours, images, labels)
        monkeypatch.setattr(place, name, made(getattr(place, name)))
        assert not torch.equal(attack_of(ours, images, labels), pixels)
        return
    monkeypatch.setattr(place, name, made(getattr(place, name)))
    with pytest.raises(AssertionError):
        compare(ours, by_hand)


def attack_of(ours: ImageClassifier, images: Tensor, labels: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return ours.training_losses((images, labels))[1].found


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_the_attack_sees_the_network_as_it_is_evaluated(method: str, loss: str) -> None:
    """Drop path, dropout and the router's noise are off in it, and on in the step."""
    net = network(noise_std=5.0, drop_path_rate=0.5, drop_rate=0.5)
    settings = AdversarialSettings(method, eps="8/255", steps=STEPS)
    ours = module(settings, net, loss=loss)
    still = module(settings, copy.deepcopy(net), loss=loss).eval()
    images, labels = batch()
    assert torch.equal(attack_of(ours, images, labels), attack_of(still, images, labels))
    steps = [ours.training_losses((images, labels))[0].loss for _ in range(2)]
    assert not torch.equal(*steps)


class Drawing(nn.Module):
    """A user's network that draws in evaluation, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fixed, self.head = nn.BatchNorm2d(4).eval(), nn.Linear(4, CLASSES)
        self.num_classes = CLASSES

    def forward(self, x: Tensor) -> Tensor:
        x = self.fixed(self.norm(self.conv(x))).mean(dim=(2, 3))
        return self.head(F.dropout(x, 0.2, training=True))


@pytest.mark.parametrize("settings", [{}, {"method": "trades"}, {"norm": "L2"}], ids=str)
def test_the_attack_leaves_everything_as_it_was(settings: dict) -> None:
    ours = classifier(net=Drawing(), adversarial=AdversarialSettings(**settings))
    ours.train()
    ours.model.net.fixed.eval()
    for weight in ours.parameters():
        weight.grad = torch.randn_like(weight)
    ours.model.net.head.requires_grad_(False)
    before = copy.deepcopy(ours.state_dict())
    gradients = [weight.grad.clone() for weight in ours.parameters()]
    flags = [part.training for part in ours.modules()]
    wanted = [weight.requires_grad for weight in ours.parameters()]
    generators = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    images, labels = batch()
    views = ours.pairing.views(ours.model, ours.model.normalize(images.float()), F.one_hot(labels, 10).float(), 0)
    assert (views.attacked.found - images.float()).abs().amax() > 0
    assert torch.equal(torch.get_rng_state(), generators[0]) and random.getstate() == generators[1]
    assert np.array_equal(np.random.get_state()[1], generators[2])
    assert flags == [part.training for part in ours.modules()]
    assert wanted == [weight.requires_grad for weight in ours.parameters()]
    assert all(torch.equal(weight.grad, was) for weight, was in zip(ours.parameters(), gradients, strict=True))
    assert all(torch.equal(value, before[name]) for name, value in ours.state_dict().items())


def test_the_attack_is_within_its_budget_which_grows() -> None:
    images, labels = batch()
    for norm, eps in (("Linf", 8 / 255), ("L2", 0.5)):
        settings = AdversarialSettings(eps=eps, norm=norm, steps=5, eps_warmup=4, step_size=eps / 2)
        ours = module(settings)
        for step, grown in ((0, 0.25), (1, 0.5), (3, 1.0), (9, 1.0)):
            normalized = ours.model.normalize(images)
            found = ours.pairing.views(ours.model, normalized, F.one_hot(labels, 10).double(), step).attacked
            change = found.found - found.clean
            size = change.abs().amax() if norm == "Linf" else change.flatten(1).norm(dim=1).amax()
            assert 0.7 * grown * eps < size <= grown * eps * (1 + 1e-6)
            assert found.found.amin() >= 0 and found.found.amax() <= 1


CHANGES = {
    "method": "trades", "norm": "L2", "eps": "4/255", "steps": 2, "step_size": "1/255", "start": "near",
    "eps_warmup": 10, "share": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", [*CHANGES, "beta"])
def test_every_setting_changes_the_step(name: str) -> None:
    base = {"eps": "8/255"} if name != "beta" else {"eps": "8/255", "method": "trades"}
    other = {**base, name: CHANGES.get(name, 3.0)}
    images, labels = batch()
    found = []
    for settings in (base, other):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            found.append(module(AdversarialSettings(**settings)).training_losses((images, labels))[0].loss)
    assert not torch.equal(*found)


@pytest.mark.parametrize(
    "settings, told",
    [
        ({"eps": "8"}, "model.adversarial.eps=8: use a number in (0, 1]"),
        ({"eps": 0}, "model.adversarial.eps=0: use a number in (0, 1]"),
        ({"eps": "four"}, "model.adversarial.eps=four: use a number in (0, 1]"),
        ({"step_size": -0.1}, "model.adversarial.step_size=-0.1: use a number in (0, 1]"),
        ({"share": 0}, "model.adversarial.share=0: use a number in (0, 1]"),
        ({"beta": 3}, "model.adversarial.beta=3: is TRADES's"),
        ({"method": "trades", "start": "picture"}, "model.adversarial.start=picture: the divergence"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, told: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        AdversarialSettings(**settings)
    assert str(error.value).startswith(told)


def test_erasing_is_refused_beside_it_as_its_noise_is_no_pixel() -> None:
    with pytest.raises(ValueError, match=r"model.random_erasing=0.2: its noise lies outside \[0, 1\]"):
        classifier(adversarial=AdversarialSettings(), random_erasing=0.2)


def test_mixed_pictures_are_attacked_with_their_mixed_labels() -> None:
    ours = module(AdversarialSettings(eps="8/255"), mixup=20.0, label_smoothing=0.1)
    images, labels = batch(4)
    _, pair = ours.training_losses((images, labels))
    assert ((pair.targets > 0.2).sum(dim=1) == 2).any()
    assert (pair.found - pair.clean).abs().amax() <= EPS + 1e-9
    before, after = (ours.eval().main_loss(ours.model(each), pair.targets) for each in (pair.clean, pair.found))
    assert after > before


def test_accumulated_batches_make_the_same_step(tmp_path: Path) -> None:
    steps = []
    for size, accumulate in ((8, 1), (4, 2)):
        ours = classifier(
            net=network(), adversarial=AdversarialSettings(eps="8/255", start="picture"),
            optimizer=OptimizerSettings("sgd", lr=0.1, weight_decay=0),
        )  # fmt: skip
        torch.manual_seed(3)
        loader = batches(8 // size, size)
        runs = trainer(tmp_path, accumulate_grad_batches=accumulate, max_steps=1)
        runs.fit(ours, loader)
        steps.append(ours.state_dict())
    torch.testing.assert_close(*steps, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_bfloat16_gives_the_gradients_of_float32_roughly(method: str) -> None:
    """Weights that autocast keeps cast from the attack, or from a pass without gradients, would have none."""
    net = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, num_classes=CLASSES)
    images, labels = batch()
    found = []
    for enabled in (False, True):
        ours = classifier(net=copy.deepcopy(net), adversarial=AdversarialSettings(method, start="near", steps=1))
        with torch.random.fork_rng(devices=[]), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            torch.manual_seed(7)
            loss = ours.train().training_losses((images.float(), labels))[0].loss
        loss.backward()
        found.append([weight.grad for weight in ours.parameters()])
    for one, other in zip(*found, strict=True):
        assert F.cosine_similarity(one.flatten(), other.flatten(), dim=0) > 0.9 or one.norm() < 1e-6


def test_the_log_tells_clean_and_robust_accuracy_and_routing(tmp_path: Path) -> None:
    ours = classifier(net=network(), adversarial=AdversarialSettings(eps="32/255"))
    logged: dict[str, float] = {}
    runs = trainer(tmp_path, log_every_n_steps=1, max_steps=1)
    runs.fit(ours, batches(1, 16))
    logged = {name: float(value) for name, value in runs.callback_metrics.items()}
    assert 0 <= logged["train/robust_top1"] <= logged["train/clean_top1"] <= 1
    changes = [value for name, value in logged.items() if name.startswith("train/routing_change/block")]
    assert len(changes) == 1 and 0 < changes[0] < 1
    assert {f"train/{name}" for name in ours.pairing.logged()} <= set(logged)


class Linear(nn.Module):
    """Two classes by a plane: an image stands an attack in Linf where |margin| > eps * sum |w|."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(1, 3, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        margin = (self.weight * x).sum(dim=(1, 2, 3))
        return torch.stack([-margin, margin], dim=1)


def test_robust_accuracy_on_a_plane_is_the_closed_form() -> None:
    model = classifier(net=Linear(), num_classes=2, image_size=2)
    images = 0.5 + 0.2 * (torch.rand(200, 3, 2, 2) - 0.5)
    weight, eps = model.model.net.weight.detach(), 0.01
    normalized = (images - 0.5) / 0.5
    margin = (weight * normalized).sum(dim=(1, 2, 3))
    labels = (margin > 0).long()
    labels[::5] = 1 - labels[::5]  # wrong before the attack, so never robust
    stands = (margin.abs() > 2 * eps * weight.abs().sum()) & (labels == (margin > 0))
    assert 20 < int(stands.sum()) < 140
    found = robust_share(model, images, labels, Budget(eps, "Linf", 10), seed=0)
    assert found == pytest.approx(float(stands.float().mean()), abs=1e-6)


def test_validation_picks_the_checkpoint_and_stops_by_robust_accuracy(digits: Path, tmp_path: Path) -> None:
    from vmoe_momentum.datasets import FolderDataModule

    data = FolderDataModule(root=str(digits), image_size=16, batch_size=8, eval_batch_size=8, num_workers=0)
    check = RobustnessCheck(val_eps="2/255", val_steps=2, val_limit=12)
    best = ModelCheckpoint(tmp_path, "best", monitor="val/robust_top1", mode="max")
    stop = EarlyStopping("val/robust_top1", mode="max", patience=1, min_delta=1.0)  # never so much better
    ours = classifier(net=network(), adversarial=AdversarialSettings(eps="2/255", steps=1))
    quiet = {"enable_checkpointing": True, "callbacks": [check, best, stop], "limit_train_batches": 2}
    runs = trainer(tmp_path, max_epochs=5, limit_val_batches=3, **quiet)
    runs.fit(ours, datamodule=data)
    assert runs.current_epoch == 2 and stop.stopped_epoch == 1
    assert float(best.best_model_score) in [count / 12 for count in range(13)]
    assert Path(best.best_model_path).is_file()


@pytest.mark.slow
def test_ddp_and_fsdp2_make_the_same_steps(digits: Path, tmp_path: Path) -> None:
    """Also what validation finds, and in bfloat16 it runs."""
    check = {"trainer.callbacks+": "RobustnessCheck", "trainer.callbacks.val_eps": "4/255"}
    settings = {"model.adversarial.method": "trades", "model.adversarial.eps": "4/255", "rough": False, **check}
    programs = [(way, words(digits, 2, way, steps=3, **settings)) for way in ("ddp", "1")]
    run_on_ranks(2, tmp_path, programs)
    torch.testing.assert_close(losses(tmp_path / "ddp", 2), losses(tmp_path / "1", 2), atol=1e-5, rtol=0)


def test_pairs_are_only_made_where_they_are_wanted() -> None:
    pairing = pairs.pairing(network(), AdversarialSettings(share=0.5), None, "softmax", 1.0, 0.0)
    assert pairing.others(8) == 0
    assert pairs.pairing(network(), None, None, "softmax", 1.0, 0.0) is None


@pytest.mark.long
@pytest.mark.timeout(900)  # compiling, the attack's pass and the step's
@pytest.mark.parametrize("method", ["pgd", "trades"])
def test_compiled_it_is_the_same_step(method: str) -> None:
    found = []
    for compiled in (False, True):
        settings = AdversarialSettings(method, eps="8/255", start="near")
        ours = classifier(net=network(), adversarial=settings, compile=compiled).train()
        images, labels = batch()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            loss = ours.training_losses((images.float(), labels))[0].loss
        loss.backward()
        found.append([loss.detach(), *(weight.grad for weight in ours.parameters())])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-3)
