"""Guards of long runs: steps that are left out, experts that learn nothing, gates that have collapsed."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from faults import Job
from lightning.pytorch.callbacks import Callback
from test_faults import words
from test_finite import Fault, batches, run
from test_interrupted import checkpoint

from vmoe_momentum import TopKRouter, create_model
from vmoe_momentum.training import FiniteTraining, ImageClassifier, OptimizerSettings, RouterGuard, RouterStats


def test_clipping_by_an_infinite_norm_is_no_step(tmp_path) -> None:
    """Each gradient is finite, their norm is not: every one would become zero."""

    class Huge(Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer) -> None:
            if trainer.global_step == 2:
                module.model.net.head.weight.grad.fill_(1e30)

    trainer, module = run(tmp_path, gradient_clip_val=1.0)
    trainer.callbacks.insert(0, Huge())
    with pytest.raises(FloatingPointError, match="step 2, batch 2 .*the norm of all, each of which is finite"):
        trainer.fit(module, batches(), batches(1))


def test_averages_and_the_schedule_go_on_over_a_skipped_step(tmp_path) -> None:
    """Weights, moments and their average are those before it."""
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, module, *_) -> None:
            (average,) = (c._average_model for c in trainer.callbacks if hasattr(c, "_average_model"))
            state = trainer.optimizers[0].state[module.model.net.head.weight]
            parts = (module.model.net.head.weight, state["exp_avg"], average.module.model.net.head.weight)
            seen.append([part.detach().clone() for part in parts])

    average = pl.callbacks.EMAWeightAveraging(decay=0.0)  # the average is the weights: what a skip changes would show
    guard = FiniteTraining(skip_steps=1)
    trainer, module = run(tmp_path, guard, Fault("loss", float("nan"), 2), average, Watch())
    loss = module.main_loss

    class Mend(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
            if trainer.fit_loop.total_batch_idx > 2:
                module.main_loss = loss

    trainer.callbacks.append(Mend())
    with pytest.warns(UserWarning, match="step skipped, 0 more in a row may be"):
        trainer.fit(module, batches(), batches(1))
    assert all(torch.equal(a, b) for a, b in zip(seen[1], seen[2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(seen[2], seen[3], strict=True))
    assert trainer.global_step == 8 and guard.skipped == 1 and guard.in_a_row == 0
    assert trainer.callback_metrics["train/skipped_steps"] == 1


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_skip_a_step_together(strategy, pictures, tmp_path) -> None:
    """Though one of them alone met what is not finite. Then the run ends, with more of it than may be skipped."""
    argv = [
        *words(pictures, tmp_path, "loss", strategy=strategy, **{"trainer.max_epochs": 3}),
        "--trainer.callbacks+=FiniteTraining",
    ]
    with Job(tmp_path, [*argv, "--trainer.callbacks.skip_steps=2"]) as job:
        code, told = job.end(200)
    assert code == 1 and "step 4, batch 1 of epoch 1" in told and "step skipped, 0 more in a row may be" in told, told
    assert "step 6, batch 0 of epoch 2" in told and "is not finite" in told
    saved = checkpoint(tmp_path)
    assert saved["global_step"] == 6 and all(value.isfinite().all() for value in saved["state_dict"].values())
    (state,) = (value for key, value in saved["callbacks"].items() if "FiniteTraining" in key)
    assert state == {"skipped": 2, "in_a_row": 2}


class Starve(Callback):
    """Expert 1 of the first block is chosen by nobody, or all gates are sure of expert 0."""

    def __init__(self, sure: bool = False) -> None:
        self.sure = sure

    def on_fit_start(self, trainer, module) -> None:
        router = module.model.net.blocks[1].mlp.router
        logits = router.logits

        def spoiled(x: torch.Tensor) -> torch.Tensor:
            clean = logits(x)
            aside = torch.zeros_like(clean)
            aside[..., 0 if self.sure else 1] = 1e3 if self.sure else -1e3
            return clean + aside

        router.logits = spoiled


def train(*callbacks: Callback) -> list[str]:
    """What two epochs of four batches warn of."""
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
    trainer = pl.Trainer(
        callbacks=list(callbacks), max_epochs=2, num_sanity_val_steps=0, enable_checkpointing=False, **quiet
    )
    net = create_model("vmoe_tiny_patch4_16", router=TopKRouter(noise_std=0.0))
    module = ImageClassifier(net, 10, 16, optimizer=OptimizerSettings(lr=1e-3))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        trainer.fit(module, batches(), batches(1))
    return [str(w.message) for w in found if str(w.message).startswith("step ")]


@pytest.fixture
def look(monkeypatch) -> None:
    """Every other step."""
    monkeypatch.setattr("vmoe_momentum.training.routing_guard._EVERY", 2)


def test_experts_that_learn_nothing_are_named_once(look) -> None:
    (line,) = train(Starve(), RouterGuard(unused_steps=3))
    assert line.startswith("step 4: experts without a gradient for 3 steps or more") and "block1: 1;" in line
    assert "importance_loss_weight" in line
    assert not train(Starve(), RouterGuard(unused_steps=9)) and not train(Starve(), RouterGuard(unused_steps=0))
    # in the last block one token of an image counts, and a batch has four
    assert not any("block1" in line for line in train(RouterGuard(unused_steps=3)))


def test_gates_that_have_collapsed_are_named_once() -> None:
    (line,) = train(RouterStats(), Starve(sure=True), RouterGuard(unused_steps=0))
    assert "gates have collapsed" in line and "block1: 0 of 1.4 nats" in line and "block3" not in line
    assert not train(RouterStats(), Starve(sure=True), RouterGuard(unused_steps=0, entropy_floor=0.0))
    for wrong in ({"unused_steps": -1}, {"entropy_floor": 2.0}):
        with pytest.raises(ValueError, match="RouterGuard."):
            RouterGuard(**wrong)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_sharded_gradients_tell_of_experts_too(strategy, pictures, tmp_path) -> None:
    more = {"trainer.max_epochs": 20, "model.net.init_args.router": "TopKRouter"}
    argv = [*words(pictures, tmp_path, strategy=strategy, **more), "--trainer.callbacks+=test_guards.Starve"]
    argv += ["--trainer.callbacks+=RouterGuard", "--trainer.callbacks.unused_steps=40"]
    with Job(tmp_path, argv) as job:
        code, told = job.end(200)
    assert code == 0 and told.count("experts without a gradient for 40 steps or more") == 1 and "block1: 1" in told, (
        told
    )
