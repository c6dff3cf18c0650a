"""Where numbers stop being finite, a run ends before it saves, and says where it began."""

from functools import partial, partialmethod
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from cli_helpers import fails
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vmoe_momentum import HeavyBall, create_model
from vmoe_momentum.training import FiniteTraining, ImageClassifier, NotFinite, OptimizerSettings, SeededSteps

CONFIG = Path(__file__).parent.parent.parent / "configs" / "digits.yaml"
AT = 3  # the batch, counted from 0 over two epochs of 4


def batches(count: int = 4) -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.rand(count * 4, 3, 16, 16), torch.arange(count * 4) % 10), batch_size=4)


class Fault(Callback):
    """Makes one thing non-finite at training batch AT (of validation: at the first)."""

    def __init__(self, where: str, value: float, at: int = AT) -> None:
        self.where, self.value, self.at, self.handle = where, value, at, None

    def spoil(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * self.value

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        here = trainer.fit_loop.total_batch_idx == self.at
        if not here:
            return
        net = module.model.net
        if self.where == "images":
            batch[0][1] = self.value
        elif self.where == "loss":
            losses = module.main_loss
            module.main_loss = lambda *a: self.spoil(losses(*a))
        elif self.where == "weights":
            net.blocks[2].norm1.weight.data[3] = self.value
        elif self.where == "activation":
            torch.compiler.reset()  # code compiled before does not look for hooks
            self.handle = net.blocks[4].attn.register_forward_hook(lambda m, i, out: self.spoil(out))
        elif self.where == "momentum":
            rule = net.blocks[3].rule
            step = type(rule).__call__

            class Broken(type(rule)):
                def __call__(this, *args):  # noqa: N805
                    x, buffers = step(this, *args)
                    return x, tuple(self.spoil(b) for b in buffers)

            rule.__class__ = Broken
        elif self.where == "gradient":
            self.handle = net.blocks[5].norm2.weight.register_hook(self.spoil)

    def on_train_batch_end(self, trainer, module, *_) -> None:
        """The rest are faults of the update itself, or of what evaluation alone does."""
        if trainer.fit_loop.total_batch_idx != self.at:
            return
        if self.where == "update":
            module.model.net.blocks[2].norm1.weight.data[3] = self.value
        elif self.where == "optimizer":
            next(iter(trainer.optimizers[0].state.values()))["exp_avg_sq"] *= self.value
        elif self.where == "validation":
            module.model.net.head.register_forward_hook(lambda m, i, out: out if m.training else self.spoil(out))


PLACES = {
    "images": "the images",
    "loss": "the loss itself",
    "weights": "net.blocks.2.norm1.weight",
    "activation": "net.blocks.4.attn",
    "momentum": "momentum of net.blocks.1",  # the rule is shared
    "gradient": "the gradient of net.blocks.5.norm2.weight",
    "update": "net.blocks.2.norm1.weight",
    "optimizer": "the optimizer's state",
    "validation": "net.head",
}


def run(folder: Path, *callbacks: Callback, **settings) -> tuple[pl.Trainer, ImageClassifier]:
    """Two epochs of four batches, saved after every step and every validation."""
    saver = ModelCheckpoint(folder, filename="last", every_n_train_steps=1, enable_version_counter=False)
    best = ModelCheckpoint(folder, filename="best", monitor="val/loss", enable_version_counter=False)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    kept = [c for c in callbacks if isinstance(c, FiniteTraining)] or [FiniteTraining()]
    others = [c for c in callbacks if c not in kept]
    compile = settings.pop("compile", False)
    trainer = pl.Trainer(
        callbacks=[*kept, SeededSteps(), *others, saver, best],
        max_epochs=2,
        num_sanity_val_steps=0,
        **quiet,
        **settings,
    )
    module = ImageClassifier(
        create_model("vmoe_tiny_patch4_16", rule=HeavyBall()), 10, 16, optimizer=OptimizerSettings(lr=1e-3),
        compile=compile,
    )  # fmt: skip
    return trainer, module


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.long)])
@pytest.mark.parametrize("where", PLACES)
def test_wherever_it_begins_the_run_ends_and_keeps_its_last_good_checkpoint(where, value, tmp_path) -> None:
    trainer, module = run(tmp_path, Fault(where, value))
    with pytest.raises(NotFinite) as error:
        trainer.fit(module, batches(), batches(1))
    told = str(error.value)
    assert PLACES[where] in told and f"step {trainer.global_step}" in told, told
    assert "batch 3 of epoch 0" in told or where in ("update", "optimizer", "validation"), told
    assert str(tmp_path / "last.ckpt") in told
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == (4 if where == "validation" else 3)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
    assert not (tmp_path / "best.ckpt").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2},
        pytest.param({"precision": "bf16-mixed"}, marks=pytest.mark.long),
        pytest.param({"precision": "bf16-true"}, marks=pytest.mark.long),
        pytest.param({"gradient_clip_val": 1.0}, marks=pytest.mark.long),
        pytest.param({"compile": True}, marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize("where", ["activation", "gradient"])
def test_under_every_way_of_training(where, settings, tmp_path, monkeypatch) -> None:
    if "compile" in settings:  # traced, and run as traced: inductor takes minutes
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    trainer, module = run(tmp_path, Fault(where, float("nan"), at=2), **settings)
    with pytest.raises(NotFinite) as error:
        trainer.fit(module, batches(), batches(1))
    number = 3 if "accumulate_grad_batches" in settings and where == "gradient" else 2  # seen when the step is whole
    assert PLACES[where] in str(error.value) and f"batch {number} of epoch 0" in str(error.value)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == trainer.global_step


def test_so_many_steps_may_be_left_out(tmp_path) -> None:
    """Weights stay as they were in those, the count travels with the checkpoint, and one more in a row ends the run."""
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            seen.append(module.model.net.head.bias.detach().clone())

    guard = FiniteTraining(skip_steps=2)
    trainer, module = run(tmp_path, guard, Fault("images", float("nan"), 2), Fault("images", float("nan"), 3), Watch())
    with pytest.warns(UserWarning, match="step 2, batch 2 of epoch 0.*step skipped, 1 more in a row may be"):
        trainer.fit(module, batches(), batches(1))
    assert torch.equal(seen[1], seen[2]) and torch.equal(seen[2], seen[3])
    assert not torch.equal(seen[3], seen[4]) and trainer.global_step == 8 and guard.skipped == 2
    again = FiniteTraining(skip_steps=2)
    faults = [Fault("images", float("nan"), at) for at in (8, 9, 10)]
    trainer, module = run(tmp_path, again, *faults, max_steps=12)
    trainer.fit_loop.max_epochs = 3
    with pytest.raises(NotFinite, match="step 10, batch 2 of epoch 2"):
        trainer.fit(module, batches(), batches(1), ckpt_path=tmp_path / "last.ckpt")
    assert again.skipped == 4
    with pytest.raises(ValueError, match="FiniteTraining.skip_steps=-1"):
        FiniteTraining(-1)
    trainer, module = run(tmp_path / "weights", FiniteTraining(5), Fault("weights", float("nan")))
    with pytest.raises(NotFinite, match="a weight|norm1.weight"):  # skipping would not help
        trainer.fit(module, batches(), batches(1))


def scaled(scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def test_overflow_under_loss_scaling_is_mended_by_the_scaler(tmp_path) -> None:
    """Steps that overflow are left out and the scale halved; a fault that no scale mends ends the run."""
    plugin = scaled(2.0**40)  # overflows float16 at first
    trainer, module = run(tmp_path, plugins=[plugin])
    trainer.fit(module, batches(), batches(1))
    assert trainer.global_step == 8 and plugin.scaler.get_scale() < 2.0**40
    plugin = scaled(2.0**-6)
    trainer, module = run(tmp_path / "b", Fault("gradient", float("nan"), 0), plugins=[plugin])
    with pytest.raises(NotFinite, match="the gradient of net.blocks.5.norm2.weight"):
        trainer.fit(module, batches(), batches(1))
    trainer, module = run(tmp_path / "c", Fault("images", float("nan")), plugins=[scaled(2.0**10)])
    with pytest.raises(NotFinite, match="batch 3 of epoch 0.*the images"):
        trainer.fit(module, batches(), batches(1))


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_of_such_a_network_is_no_result(verb, tmp_path) -> None:
    trainer, module = run(tmp_path)
    nn.init.constant_(module.model.net.blocks[1].norm2.bias, float("nan"))
    with pytest.raises(NotFinite, match="net.blocks.1.norm2.bias.*another checkpoint"):
        getattr(trainer, verb)(module, batches(1))


def test_largest_finite_numbers_are_finite(tmp_path) -> None:
    from vmoe_momentum.training.finite import finite

    assert finite([torch.full((9,), 3e38), None, torch.tensor([1]), torch.full((9,), 6e4, dtype=torch.float16)])
    for value in (float("nan"), float("inf"), -float("inf")):
        assert not finite([torch.ones(3), torch.tensor([1.0, value, 2.0])])


def test_the_demo_with_a_rate_of_a_million(digits, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["fit", f"--config={CONFIG}", "--data=FolderDataModule", f"--data.root={digits}", "--data.num_workers=0"]
    argv += ["--model.optimizer.lr=1e6", "--trainer.gradient_clip_val=null", "--trainer.enable_progress_bar=false"]
    line = fails([*argv, "--trainer.max_epochs=3"], capsys)
    assert "is not finite" in line and "model.optimizer.lr=1e+06" in line
    assert not list(tmp_path.rglob("best.ckpt")) or "stays the last good checkpoint" in line
