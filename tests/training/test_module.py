"""Losses, schedules, weight updates and checkpoints of the LightningModule."""

import math
from functools import partial, partialmethod

import lightning.pytorch as pl
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vmoe_momentum import HeavyBall, Residual, TopKRouter, create_model
from vmoe_momentum.training import EpochSeconds, ImageClassifier, OptimizerSettings, RouterStats, ScheduleSettings
from vmoe_momentum.training.profile import measure_cost

CLASSES = 10


def classifier(rule=None, net: nn.Module | None = None, **settings) -> ImageClassifier:
    settings = {"num_classes": CLASSES, "image_size": 16, **settings}
    return ImageClassifier(net or create_model("vmoe_tiny_patch4_16", rule=rule), **settings)


def batches(count: int = 3, size: int = 8) -> DataLoader:
    images = torch.randint(0, 256, (count * size, 3, 16, 16), dtype=torch.uint8)
    return DataLoader(TensorDataset(images, torch.arange(count * size) % CLASSES), batch_size=size)


def trainer(tmp_path, **settings) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    return pl.Trainer(**{**quiet, "default_root_dir": tmp_path, "max_epochs": 1, **settings})


def test_sigmoid_and_softmax_losses_by_their_definitions() -> None:
    logits, labels = torch.randn(5, CLASSES), torch.tensor([0, 3, 9, 9, 1])
    targets = F.one_hot(labels, CLASSES).float() * 0.9 + 0.1 / CLASSES
    softmax = -(targets * logits.log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(classifier(loss="softmax").main_loss(logits, targets), softmax)
    p = logits.double().sigmoid()
    sigmoid = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum(-1).mean()
    torch.testing.assert_close(classifier(loss="sigmoid").main_loss(logits, targets).double(), sigmoid)


def test_label_smoothing_is_torchs() -> None:
    module = classifier(label_smoothing=0.2, aux_loss_weight=0.0).eval()
    module.log = lambda *_, **__: None
    images, labels = next(iter(batches(1)))
    expected = F.cross_entropy(module(images), labels, label_smoothing=0.2)
    torch.testing.assert_close(module.training_step((images, labels), 0), expected)


def test_the_auxiliary_loss_has_its_weight_and_dense_networks_have_none() -> None:
    router = TopKRouter(noise_std=0.0)
    net = create_model("vmoe_tiny_patch4_16", router=router)
    images, labels = next(iter(batches(1)))
    losses = {}
    for weight in (0.0, 1.0, 3.0):
        module = classifier(net=net, aux_loss_weight=weight)
        module.log = lambda *_, **__: None
        losses[weight] = module.training_step((images, labels), 0)
    aux_loss = net.forward_with_aux(images / 127.5 - 1)[1]
    torch.testing.assert_close(losses[1.0] - losses[0.0], aux_loss)
    torch.testing.assert_close(losses[3.0] - losses[0.0], 3 * aux_loss)
    dense = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=CLASSES)
    assert classifier(net=dense).model.forward_with_aux(images)[1] == 0


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 0.5}])
def test_mixing_leaves_the_batch_alone_and_changes_the_loss(settings: dict) -> None:
    net = create_model("vmoe_tiny_patch4_16", router=TopKRouter(noise_std=0.0))
    images, labels = next(iter(batches(1)))
    before, losses = images.clone(), []
    for module in (classifier(net=net), classifier(net=net, **settings)):
        nn.init.normal_(net.head.weight)
        torch.manual_seed(0)
        module.log = lambda *_, **__: None
        losses.append(module.training_step((images, labels), 0))
    assert torch.equal(images, before)
    assert not torch.equal(*losses)


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_the_schedule_is_its_closed_form(decay: str) -> None:
    """Rate of the step to come, after each of 20 steps: 5 of warm-up from 0, then down to min_lr at step 20."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = ScheduleSettings(decay, warmup_steps=5, min_lr=0.1).build(optimizer, total_steps=20)
    for step in range(21):
        done = (step - 5) / 15
        shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[decay]
        expected = 0.4 * step / 5 if step < 5 else 0.1 + 0.3 * shape
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, abs=1e-12), step
        scheduler.step_update(step + 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": ScheduleSettings(min_lr=0.1)}, "model.schedule.min_lr=0.1: the rate decays from .*lr=0.001"),
        ({"schedule": ScheduleSettings(warmup_steps=3)}, "model.schedule.warmup_steps=3: this run has 3 steps"),
        ({"optimizer": OptimizerSettings(name="adamv")}, "model.optimizer.name=adamv; did you mean"),
    ],
)
def test_impossible_settings_stop_before_the_first_step(settings: dict, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path).fit(classifier(**settings), batches())


def test_optimizer_settings_reach_the_optimizer() -> None:
    net = create_model("vmoe_tiny_patch4_16")
    optimizer = OptimizerSettings("adamw", lr=0.5, weight_decay=0.2, betas=(0.7, 0.8)).build(net)
    assert type(optimizer).__name__ == "AdamW"
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.2}
    assert all(group["betas"] == (0.7, 0.8) and group["lr"] == 0.5 for group in optimizer.param_groups)
    layered = OptimizerSettings(layer_decay=0.5).build(net)
    assert len({group["lr_scale"] for group in layered.param_groups}) >= 9


def test_logs_scores_and_router_statistics(tmp_path) -> None:
    module, data = classifier(HeavyBall()), batches(3)
    run = trainer(tmp_path, callbacks=[RouterStats(), EpochSeconds()], enable_checkpointing=False)
    run.fit(module, data, data)
    logged = run.callback_metrics
    for block in (1, 3, 5, 7):
        shares = [float(logged[f"val/block{block}/load_{expert}"]) for expert in range(4)]
        assert sum(shares) == pytest.approx(1.0)
        assert logged[f"val/block{block}/dropped"] == 0.0
        assert 0 < logged[f"val/block{block}/entropy"] <= math.log(4) + 1e-6
        assert logged[f"val/block{block}/momentum_norm"] > 0
    assert {"train/loss", "train/aux_loss", "val/loss", "val/top1", "val/top5", "train/epoch_seconds"} <= set(logged)
    assert not any(block._forward_hooks for block in module.model.net.modules())


def test_accuracy_is_over_the_whole_set_not_a_mean_of_batches(tmp_path) -> None:
    module = classifier()
    images = torch.zeros(5, 3, 16, 16, dtype=torch.uint8)
    with torch.no_grad():
        module.model.net.head.bias[7] = 9.0
    data = DataLoader(TensorDataset(images, torch.tensor([7, 7, 7, 7, 1])), batch_size=4)
    (scores,) = trainer(tmp_path).test(module, data, verbose=False)
    assert scores["test/top1"] == pytest.approx(4 / 5)


def fit_and_save(tmp_path, module: ImageClassifier, **settings) -> str:
    path = tmp_path / "last.ckpt"
    run = trainer(tmp_path, max_steps=2, enable_checkpointing=False, **settings)
    run.fit(module, batches())
    run.save_checkpoint(path)
    return str(path)


def test_a_checkpoint_of_another_rule_is_refused_with_both_values(tmp_path) -> None:
    path = fit_and_save(tmp_path, classifier(HeavyBall(mu=0.6)))
    torch.load(path, weights_only=True)  # plain data only
    same = classifier(HeavyBall(mu=0.6))
    trainer(tmp_path).test(same, batches(), ckpt_path=path, verbose=False)
    with pytest.raises(ValueError, match=r"checkpoint HeavyBall\(mu=0.6.*config Residual\(gamma=1.0\).*override-model"):
        trainer(tmp_path).test(classifier(Residual()), batches(), ckpt_path=path, verbose=False)
    with pytest.raises(ValueError, match=r"rule.mu: checkpoint 0.6, config 0.7"):
        trainer(tmp_path).test(classifier(HeavyBall()), batches(), ckpt_path=path, verbose=False)
    other = classifier(net=create_model("vmoe_tiny_patch4_16", rule=HeavyBall(mu=0.6), router=TopKRouter(top_k=1)))
    with pytest.raises(ValueError, match="router.top_k: checkpoint 2, config 1"):
        trainer(tmp_path).test(other, batches(), ckpt_path=path, verbose=False)
    trainer(tmp_path).test(classifier(override_model=True), batches(), ckpt_path=path, verbose=False)


def test_a_checkpoint_of_another_network_is_refused_even_when_overridden(tmp_path) -> None:
    path = fit_and_save(tmp_path, classifier())
    with pytest.raises(ValueError, match="num_classes: checkpoint 10, config 7"):
        trainer(tmp_path).test(classifier(num_classes=7, override_model=True), batches(), ckpt_path=path)
    wider = create_model("vmoe_tiny_patch4_16", num_experts=5)
    with pytest.raises(ValueError, match=r"experts.fc1.weight \[4, 128, 64\] for \[5, 128, 64\]"):
        trainer(tmp_path).test(classifier(net=wider), batches(), ckpt_path=path)
    torch.save({"state_dict": {}}, tmp_path / "foreign.ckpt")
    with pytest.raises(ValueError, match="not written by vmoe-momentum fit"):
        classifier().on_load_checkpoint(torch.load(tmp_path / "foreign.ckpt", weights_only=True))


def test_resuming_continues_as_if_never_stopped(tmp_path) -> None:
    """Two epochs in one go, or one and one: the same weights, without router noise."""
    settings = {"optimizer": OptimizerSettings(lr=1e-2), "schedule": ScheduleSettings(warmup_steps=1)}

    def fresh() -> ImageClassifier:
        torch.manual_seed(0)
        return classifier(net=create_model("vmoe_tiny_patch4_16", router=TopKRouter(noise_std=0.0)), **settings)

    data, straight, halted, resumed = batches(), fresh(), fresh(), fresh()
    trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(straight, data)
    stop = ModelCheckpoint(
        dirpath=tmp_path, filename="half", every_n_epochs=1, save_top_k=-1, auto_insert_metric_name=False
    )
    trainer(tmp_path, max_epochs=2, callbacks=[stop], limit_val_batches=0, enable_checkpointing=True).fit(halted, data)
    trainer(tmp_path, max_epochs=2, enable_checkpointing=False).fit(resumed, data, ckpt_path=tmp_path / "half.ckpt")
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ema_weights_can_be_had(tmp_path) -> None:
    data, path = batches(), tmp_path / "ema.ckpt"
    callbacks = [EMAWeightAveraging(decay=0.5), ModelCheckpoint(dirpath=tmp_path, filename="ema")]
    trainer(tmp_path, callbacks=callbacks).fit(classifier(HeavyBall()), data, data)
    saved = torch.load(path, weights_only=True)
    raw, averaged = saved["current_model_state"], saved["state_dict"]
    assert any(not torch.equal(averaged[name], raw[name]) for name in averaged)
    trainer(tmp_path).test(classifier(HeavyBall()), data, ckpt_path=path, verbose=False)


@pytest.mark.long
def test_compile_is_in_place_in_training_too_and_changes_nothing(monkeypatch) -> None:
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend))
    torch._dynamo.reset()
    net = create_model("vmoe_tiny_patch4_16", router=TopKRouter(noise_std=0.0), share_expert_init=False)
    plain, compiled = classifier(net=net), classifier(net=net, compile=True)
    assert plain.state_dict().keys() == compiled.state_dict().keys()
    batch = next(iter(batches(1)))
    for module in (plain, compiled):
        module.log = lambda *_, **__: None
    loss = compiled.training_step(batch, 0)
    assert len(graphs) == 1
    torch.testing.assert_close(loss, plain.training_step(batch, 0))
    torch.testing.assert_close(compiled.eval()(batch[0]), plain.eval()(batch[0]))
    assert len(graphs) == 2


def test_cost_by_hand() -> None:
    """Parameters that one token touches, and the multiply-adds of one image, of the tiny network."""
    net = create_model("vmoe_tiny_patch4_16", num_classes=10)
    cost = measure_cost(classifier(net=net).model, 16)
    d, f, e, k, n = 64, 128, 4, 2, 17
    expert = 2 * d * f + f + d
    assert cost.parameters == sum(p.numel() for p in net.parameters())
    assert cost.active == cost.parameters - 4 * (e - k) * expert
    attention = n * (4 * d * d) + 2 * n * n * d
    dense, sparse = n * 2 * d * f, n * (k * 2 * d * f + d * e + k * d)
    stem, head = 16 * 48 * d, 10 * d
    products = 8 * attention + 4 * dense + 4 * sparse + stem + head
    assert cost.gflops * 1e9 == pytest.approx(2 * products, rel=1e-6)


@pytest.mark.parametrize("image_size", [15, 30])
def test_image_sizes_that_do_not_fit_are_named(image_size: int) -> None:
    with pytest.raises(ValueError, match=f"image_size={image_size} is not a multiple of the patch size 4"):
        classifier(image_size=image_size)


def test_the_network_follows_the_data() -> None:
    module = classifier(num_classes=7, image_size=32)
    assert module(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 7)


def test_a_short_robustness_report_after_test(digits, tmp_path) -> None:
    """By the callback: clean, a corruption and FGSM on the pictures of the data module, logged; modes restored."""
    pytest.importorskip("torchattacks")
    pytest.importorskip("cv2")
    from vmoe_momentum.datasets import FolderDataModule
    from vmoe_momentum.training import RobustnessCheck

    module = classifier(class_names=[str(i) for i in range(CLASSES)])
    nn.init.normal_(module.model.net.head.weight)
    data = FolderDataModule(str(digits), image_size=16, batch_size=8, num_workers=0, eval_crop_ratio=1.0)
    check = RobustnessCheck(corruptions=["contrast"], severities=[2, 3], eps=["8/255"], limit=20)
    runner = trainer(tmp_path, limit_test_batches=1, callbacks=[check])
    (scores,) = runner.test(module, datamodule=data, verbose=False)
    names = ("clean/top1", "contrast_2/top1", "contrast_3/top1", "fgsm_8/robust_top1", "uniform-noise_8/top1")
    logged = {name: scores[f"test/robustness/{name}"] for name in names}
    assert all(0 <= value <= 1 for value in logged.values())
    assert logged["fgsm_8/robust_top1"] <= logged["clean/top1"]
    assert (tmp_path / "robustness" / "report.html").exists()
