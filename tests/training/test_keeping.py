"""The last checkpoint is the last, and averaging that has not begun keeps the trained weights."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from test_module import batches, classifier, trainer

from vmoe_momentum import ExpertChoiceRouter, SoftRouter, TopKRouter, create_model
from vmoe_momentum.models.saved import open_saved
from vmoe_momentum.training.keeping import add_keepers
from vmoe_momentum.training.profile import measure_cost
from vmoe_momentum.training.timing import seconds_per_batch

INTERVALS = [
    {"check_val_every_n_epoch": 2},
    {"check_val_every_n_epoch": 5},
    {"max_steps": 7, "max_epochs": -1},
    {"max_steps": 7, "max_epochs": -1, "check_val_every_n_epoch": 2},
    {"val_check_interval": 2},
    {"val_check_interval": 4, "check_val_every_n_epoch": None},
    {"limit_val_batches": 0},
]
SAVING = [
    {},
    *(
        pytest.param(settings, marks=pytest.mark.long)
        for settings in (
            {"every_n_epochs": 2},
            {"every_n_train_steps": 4},
            {"save_on_train_epoch_end": True, "every_n_epochs": 2},
        )
    ),
]


@pytest.mark.parametrize("saving", SAVING, ids=str)
@pytest.mark.parametrize("interval", INTERVALS, ids=str)
def test_last_is_the_last(interval: dict, saving: dict, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False, **saving)
    run = trainer(tmp_path, callbacks=[saver], num_sanity_val_steps=0, **{"max_epochs": 3, **interval})
    add_keepers(run.callbacks)
    module = classifier()
    run.fit(module, batches(3), batches(1))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == run.global_step == interval.get("max_steps", 9)
    assert saved["epoch"] == 2
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in module.state_dict().items())


@pytest.mark.parametrize(
    "start",
    [
        {"update_starting_at_step": 99},
        {"update_starting_at_epoch": 99, "update_every_n_steps": 0},
        {"use_buffers": False, "update_starting_at_step": 99},
    ],
    ids=str,
)
def test_raw_weights_until_averaging_begins(start: dict, tmp_path: Path) -> None:
    saver = ModelCheckpoint(tmp_path, filename="last", enable_version_counter=False)
    run = trainer(tmp_path, callbacks=[EMAWeightAveraging(**start), saver], num_sanity_val_steps=0)
    add_keepers(run.callbacks)
    module = classifier()
    built = {name: value.clone() for name, value in module.state_dict().items()}
    seen = []
    module.on_validation_batch_start = lambda *_: seen.append(module.model.net.head.weight.detach().clone())
    run.fit(module, batches(3), batches(1))
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for tensors in (saved["state_dict"], saved["current_model_state"], module.state_dict()):
        assert torch.equal(tensors["model.net.head.weight"], seen[-1])
        assert not torch.equal(tensors["model.net.head.weight"], built["model.net.head.weight"])
    opened = open_saved(str(tmp_path / "last.ckpt"))
    assert not opened.averaged and torch.equal(opened.build().net.head.weight, seen[-1])


@pytest.mark.parametrize(
    "router",
    [ExpertChoiceRouter(group_size=34), SoftRouter(group_size=34), TopKRouter(group_size=34, eval_capacity_factor=1.0)],
    ids=lambda router: type(router).__name__,
)
def test_networks_that_group_images_are_measured_whole_groups_at_a_time(router) -> None:
    """17 tokens an image: two images a group."""
    module = classifier(net=create_model("vmoe_tiny_patch4_16", router=router))
    tokens = 16 + module.model.net.num_prefix_tokens
    assert tokens == 17
    assert measure_cost(module.model, 16).gflops > 0
    module._trainer = trainer(".")
    assert seconds_per_batch(module, 6) > 0
