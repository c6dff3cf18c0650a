"""What a run needs of memory is counted before it starts, and refused where there is too little."""

import resource
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from vmoe_momentum import create_model
from vmoe_momentum.training import FSDP2Strategy, ImageClassifier, OptimizerSettings
from vmoe_momentum.training.budget import MOMENTS, Budget, budget, refuse_too_large, size
from vmoe_momentum.training.profile import measure_cost, saved_bytes

WHOLE = SimpleNamespace(root_device=torch.device("cpu"))


def trainer(strategy: object, ranks: int, averaged: bool = False) -> pl.Trainer:
    return SimpleNamespace(
        strategy=strategy, world_size=ranks, num_nodes=1, datamodule=SimpleNamespace(batch_size=8),
        callbacks=[EMAWeightAveraging()] if averaged else [],
    )  # fmt: skip


def module(name: str = "adamw", **net: object) -> ImageClassifier:
    return ImageClassifier(
        create_model("vmoe_tiny_patch4_16", **net), num_classes=10, image_size=16, optimizer=OptimizerSettings(name)
    )


@pytest.mark.parametrize("name", [*MOMENTS, "lamb"])
def test_moments_are_what_the_optimizer_keeps(name: str) -> None:
    made = module(name)
    needed = budget(trainer(WHOLE, 1, averaged=True), made)
    weights = sum(p.numel() * 4 for p in made.model.parameters())
    assert needed.weights == needed.gradients == needed.averages == weights and needed.gathered == 0
    if name == "lamb":
        assert needed.optimizer is None and "optimizer unknown" in needed.line()
        return
    optimizer = made.optimizer_settings.build(made.model.net)
    for parameter in made.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k != "step" and v is not None)
    assert needed.optimizer == kept


def test_activations_grow_with_images_and_fall_with_checkpointing() -> None:
    """Saved for the backward pass, as autograd says it of a real one, within a quarter: rows are filled otherwise."""
    made = module().model.train()
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        made(torch.zeros(4, 3, 16, 16, dtype=torch.uint8))
    own = {p.untyped_storage().data_ptr() for p in made.parameters()}
    real = sum(nbytes for pointer, nbytes in kept.items() if pointer not in own) / 4
    assert saved_bytes(made, 16) == pytest.approx(real, rel=0.25)
    assert saved_bytes(module(grad_checkpointing=True).model, 16) < saved_bytes(made, 16) / 4


def test_what_is_counted_is_not_compiled() -> None:
    """Inductor writes no code for what has no numbers, and a run that is compiled is counted before it begins."""
    made = module()
    eager = saved_bytes(made.model, 16), measure_cost(made.model, 16)
    made.model.compile()
    assert (saved_bytes(made.model, 16), measure_cost(made.model, 16)) == eager


def test_shares_are_what_each_of_several_devices_holds() -> None:
    made, whole = module(), budget(trainer(WHOLE, 4), module())
    shared = budget(trainer(FSDP2Strategy(), 4), made)
    assert shared.certain == pytest.approx(whole.certain / 4, abs=16)
    kept = budget(trainer(FSDP2Strategy(reshard_after_forward=False), 4), made)
    apart = budget(trainer(FSDP2Strategy(expert_parallel=4), 4), made)
    assert apart.gathered < shared.gathered < kept.gathered == whole.weights


def test_what_has_no_room_is_refused_with_a_way_out(monkeypatch) -> None:
    needed = Budget(10**15, 10**15, 2 * 10**15, 0, 0, None)
    with pytest.raises(ValueError, match="model.net: .* need 4e.03 TB on each of 2 devices .*, which spreads them"):
        refuse_too_large(needed, trainer(WHOLE, 2))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10**6, 10**6))
    with pytest.raises(ValueError, match=r"each process \(ulimit -v\) has"):
        refuse_too_large(Budget(10**6, 0, 0, 0, 0, None), trainer(WHOLE, 1))


def test_sizes_read_well() -> None:
    assert [size(n) for n in (12, 34_500, 5_600_000, 7_890_000_000)] == ["12 B", "34.5 kB", "5.6 MB", "7.89 GB"]
