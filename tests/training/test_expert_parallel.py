"""Experts spread over ranks, also with FSDP2: gradients, losses and checkpoints are those of DDP and one process."""

import copy
import csv
from pathlib import Path

import pytest
import timm
import torch
import torch.distributed as dist
from ranks import losses, on_ranks, run_in, run_on_ranks
from test_sharding import CHAOS, moments, weights
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from vmoe_momentum.lightning_cli import run_lightning
from vmoe_momentum.models import PixelModel
from vmoe_momentum.training.experts import check_experts, experts_mesh
from vmoe_momentum.training.meshes import ByMesh, clip_gradients
from vmoe_momentum.training.optimization import OptimizerSettings
from vmoe_momentum.training.sharding import shard

CONFIGS = Path(__file__).parents[2] / "configs"
EMA = "lightning.pytorch.callbacks.EMAWeightAveraging"
SETTING = "trainer.strategy.init_args.expert_parallel"
DROPLESS = {"class_path": "TopKRouter", "init_args": {"noise_std": 0.0, "capacity_factor": "dropless"}}
FULL = {"class_path": "TopKRouter", "init_args": {"noise_std": 0.0, "capacity_factor": 0.5}}
NETWORKS = {
    "dropless": {"router": DROPLESS},
    "dropped, twice a block": {"router": FULL, "rule": "SAM"},
    "recomputed": {"router": FULL, "checkpointing": True},
    "soft, a learned mu": {"router": "SoftRouter", "rule": {"class_path": "HeavyBall", "init_args": {"learn": True}}},
    "the rule that magnifies rounding": {"router": FULL, "rule": "Adam"},
    "expert choice": {"router": {"class_path": "ExpertChoiceRouter", "init_args": {"noise_std": 0.0}}},
}


def network(router: object, rule: object = "HeavyBall", checkpointing: bool = False) -> PixelModel:
    torch.manual_seed(0)
    net = timm.create_model("vmoe_tiny_patch4_16", router=router, rule=rule, depth=4, num_classes=10)
    net.set_grad_checkpointing(checkpointing)
    return PixelModel(net).double().train()


def loss_of(model: PixelModel, images: Tensor) -> Tensor:
    logits, aux_loss = model.forward_normalized(images)
    return logits.square().mean() + aux_loss


def gradients(rank: int, parallels: list[int]) -> None:
    """The mean over ranks is what one process finds on all images; norms, steps and the expert without rows, too."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks,))
    for name, settings in NETWORKS.items():
        for parallel in parallels:
            whole = network(**settings)
            idle = settings["router"] is DROPLESS
            if idle:
                with torch.no_grad():
                    whole.net.blocks[1].mlp.router.weight[1:3] = whole.net.blocks[1].mlp.router.weight[:1]
            part = copy.deepcopy(whole)
            shard(part, mesh, experts=experts_mesh("cpu", ranks, parallel) if parallel > 1 else None)
            images = torch.randn(2 * ranks, 3, 16, 16, dtype=torch.float64)
            for half in (images, images.flip(0)):  # two batches before a step
                loss_of(whole, half).backward()
                loss_of(part, half[2 * rank : 2 * rank + 2]).backward()
            if idle:  # on a tie the first two of the three alike
                assert whole.net.blocks[1].mlp.experts.fc1.weight.grad[2].abs().max() == 0
            told = f"{name}, {parallel} of {ranks}"
            compare(told, part, whole, lambda weight: weight.grad)
            clip_gradients(list(part.parameters()), 0.01, None)
            nn.utils.clip_grad_norm_(whole.parameters(), 0.01)
            compare(told, part, whole, lambda weight: weight.grad)
            for model in (part, whole):
                OptimizerSettings(name="momentum", lr=0.1).build(model.net).step()
            compare(told, part, whole, lambda weight: weight)


def compare(told: str, part: nn.Module, whole: nn.Module, what) -> None:
    for (name, ours), theirs in zip(part.named_parameters(), whole.parameters(), strict=True):
        assert ours.grad is not None, (told, name)
        mine = what(ours).full_tensor() if hasattr(ours, "full_tensor") else what(ours)
        torch.testing.assert_close(mine, what(theirs), atol=1e-11, rtol=1e-9, msg=lambda m, n=name: f"{told}, {n}: {m}")


MORE = [(2, [1]), (4, [4, 2, 1])]


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "parallels"), [(2, [2]), *MORE])
def test_gradients_are_those_of_one_process(ranks: int, parallels: list[int], tmp_path: Path) -> None:
    on_ranks(ranks, gradients, tmp_path, parallels)


def words(digits: Path, ranks: int, way: str, steps: int = 20, rough: bool = True, **settings: object) -> list[str]:
    """A run of `steps` steps of two batches, 16 images in all; rough: mixup and whatever else draws at random."""
    given = {
        "data": "FolderDataModule", "data.root": digits, "data.num_workers": 0, "data.batch_size": 16 // ranks,
        "trainer.accelerator": "cpu", "trainer.devices": ranks, "trainer.max_epochs": 1,
        "trainer.limit_train_batches": 2 * steps, "trainer.accumulate_grad_batches": 2,
        "trainer.limit_val_batches": 1, "trainer.enable_progress_bar": "false", "trainer.num_sanity_val_steps": 0,
        "model.schedule.warmup_steps": 1, "trainer.gradient_clip_val": 0.5, "trainer.callbacks+": EMA,
    }  # fmt: skip
    if rough:
        given |= {"model.mixup": 0.4, "model.net.init_args.drop_path_rate": 0.1}
    else:
        given |= {"model.net.init_args.router": "TopKRouter", "model.net.init_args.router.noise_std": 0.0}
    overlay = {"one": None, "ddp": "ddp", "1": "fsdp2"}.get(way, "expert_parallel")
    scale = [f"--config={CONFIGS / 'scale' / overlay}.yaml"] if overlay else []
    given |= {SETTING: way} if overlay == "expert_parallel" else {}
    told = [f"--{name}={value}" for name, value in (given | settings).items()]
    return ["fit", f"--config={CONFIGS / 'digits.yaml'}", *scale, *told, "--trainer.callbacks+=ranks.Losses"]


def last(folder: Path) -> dict:
    return torch.load(next(folder.rglob("last.ckpt")), weights_only=True)


CASES = [
    *(pytest.param(2, rule, ["1", "2"], marks=pytest.mark.long) for rule in ("HeavyBall", "Residual", "Robust")),
    pytest.param(2, "Adam", ["1", "2"], marks=CHAOS),
    *(pytest.param(4, rule, ["2", "4"], marks=pytest.mark.long) for rule in ("HeavyBall", "Residual", "Robust")),
]


@pytest.mark.parametrize(("ranks", "rule", "ways"), CASES)
def test_loss_curves_are_those_of_ddp(ranks: int, rule: str, ways: list[str], digits: Path, tmp_path: Path) -> None:
    """With mixup, accumulation, clipping and averaged weights."""
    settings = {"model.net.init_args.rule": rule}
    run_on_ranks(ranks, tmp_path, [(way, words(digits, ranks, way, **settings)) for way in ("ddp", *ways)])
    expected, whole = losses(tmp_path / "ddp", ranks), last(tmp_path / "ddp")
    assert expected.shape[1] == 40 and expected.std() > 0.01
    for way in ways:
        torch.testing.assert_close(losses(tmp_path / way, ranks), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(moments(last(tmp_path / way)), moments(whole), atol=1e-6, rtol=0)
        assert weights(last(tmp_path / way)).keys() == weights(whole).keys()


WAYS = {
    "bfloat16": {"trainer.precision": "bf16-mixed"},
    "compiled": {"model.compile": "true"},
    "compiled in bfloat16": {"model.compile": "true", "trainer.precision": "bf16-mixed"},
    "recomputed": {"model.net.init_args.grad_checkpointing": "true"},
}


@pytest.mark.long
@pytest.mark.timeout(1200)  # compiling
@pytest.mark.parametrize("way", WAYS)
def test_ways_to_compute_change_no_loss(way: str, digits: Path, tmp_path: Path) -> None:
    """Ten steps of DDP's, of FSDP2's and of spread experts; in bfloat16 to its precision."""
    settings = {"model.net.init_args.rule": "HeavyBall", **WAYS[way]}
    if "bfloat16" in way:  # a token between two experts goes where rounding says
        settings |= {"model.net.init_args.router": "SoftRouter"}
    if "compiled" in way:  # random numbers come in another order, and AdamW makes steps of sums fused otherwise
        settings |= {"rough": False, "model.optimizer.name": "momentum"}
    programs = [(name, words(digits, 2, name, steps=10, **settings)) for name in ("ddp", "1", "2")]
    run_on_ranks(2, tmp_path, programs)
    whole = losses(tmp_path / "ddp", 2)
    for name in ("1", "2"):
        close = {"atol": 1e-5, "rtol": 0} if "bfloat16" not in way else {"atol": 0, "rtol": 2**-7}
        torch.testing.assert_close(losses(tmp_path / name, 2), whole, **close)


@pytest.mark.long
@pytest.mark.parametrize("rule", ["Residual", "HeavyBall", "Robust", pytest.param("Adam", marks=CHAOS)])
def test_loss_curves_are_those_of_one_process(rule: str, digits: Path, tmp_path: Path) -> None:
    """Of batches that hold the same images; without what a rank draws by itself."""
    settings = {"rough": False, "model.net.init_args.rule": rule}
    run_in(tmp_path / "one", words(digits, 1, "one", **settings))
    one = losses(tmp_path / "one", 1)[0]
    for ranks, ways in ((2, ["ddp", "1", "2"]), (4, ["2"])):
        folder = tmp_path / str(ranks)
        run_on_ranks(ranks, folder, [(way, words(digits, ranks, way, **settings)) for way in ways])
        for way in ways:
            torch.testing.assert_close(losses(folder / way, ranks).mean(dim=0), one, atol=1e-5, rtol=0)


@pytest.mark.long
def test_any_number_of_devices_goes_on_from_its_checkpoint(digits: Path, pictures: Path, tmp_path: Path) -> None:
    short = {"steps": 2, "rough": False}
    more = {"trainer.max_epochs": 2, "ckpt_path": tmp_path / "first/runs/digits/version_0/checkpoints/last.ckpt"}
    # 5 and 4 images, in batches of 4 and 1, and of 3 and 1
    sizes = {"data.root": pictures, "data.eval_batch_size": 4, "trainer.limit_val_batches": 1.0}
    programs = [("first", words(digits, 2, "2", **short))]
    programs += [(way, words(digits, 2, way, **short, **more)) for way in ("2", "1")]
    programs.append(("uneven", ["validate", *words(pictures, 2, "2", **short, **sizes)[1:-1]]))
    run_on_ranks(2, tmp_path, programs)
    run_in(tmp_path / "one", words(digits, 1, "one", **short, **more))
    run_in(tmp_path / "even", ["validate", *words(pictures, 1, "one", **short, **sizes)[1:-1]])
    one = last(tmp_path / "one")
    for way in ("2", "1"):
        assert last(tmp_path / way)["global_step"] == one["global_step"] == 4
        torch.testing.assert_close(weights(last(tmp_path / way)), weights(one), atol=1e-5, rtol=0)
        torch.testing.assert_close(moments(last(tmp_path / way)), moments(one), atol=1e-6, rtol=0)
    ours, theirs = (scores(tmp_path / name) for name in ("uneven", "even"))
    assert ours == pytest.approx(theirs, abs=1e-5) and len(ours) == 2


@pytest.mark.long
@pytest.mark.parametrize("way", ["ddp", "1", "2"])
def test_four_ranks_two_one_and_four_again(way: str, digits: Path, tmp_path: Path) -> None:
    """Saved inside an epoch, sharded where weights are: losses are those of a run that never stopped."""
    saver = "lightning.pytorch.callbacks.ModelCheckpoint"
    more = {
        "steps": 6, "rough": False, "model.net.init_args.drop_rate": 0.0, "trainer.callbacks+": saver,
        "trainer.callbacks.every_n_train_steps": 2, "trainer.callbacks.save_top_k": -1,
        "trainer.callbacks.filename": "at{step}", "trainer.callbacks.auto_insert_metric_name": "false",
    }  # fmt: skip
    sharded = {} if way == "ddp" else {"trainer.strategy.init_args.checkpoints": "sharded"}

    def going_on(ranks: int, here: str, saved: Path | None) -> list[str]:
        own = {} if here == "one" else sharded
        return words(digits, ranks, here, **more, **own, **({} if saved is None else {"ckpt_path": saved}))

    def saved(name: str, step: int) -> Path:
        return next((tmp_path / name).rglob(f"at{step}.ckpt"))

    run_on_ranks(4, tmp_path, [("whole", going_on(4, way, None))])
    run_on_ranks(2, tmp_path, [("two", going_on(2, way, saved("whole", 2)))])
    run_on_ranks(4, tmp_path, [("again", going_on(4, way, saved("two", 4)))])
    run_in(tmp_path / "one", going_on(1, "one", saved("two", 4)))
    expected = losses(tmp_path / "whole", 4).mean(dim=0)
    for name, ranks, done in (("two", 2, 4), ("again", 4, 8), ("one", 1, 8)):
        found = losses(tmp_path / name, ranks).mean(dim=0)
        torch.testing.assert_close(found, expected[done:], atol=1e-5, rtol=0)
    if way != "ddp":
        assert saved("whole", 2).is_dir()


@pytest.mark.long
def test_with_other_images_a_step_the_next_epoch_comes(digits: Path, tmp_path: Path, capfd) -> None:
    saver = "lightning.pytorch.callbacks.ModelCheckpoint"
    more = {
        "rough": False, "trainer.callbacks+": saver, "trainer.callbacks.every_n_train_steps": 2,
        "trainer.callbacks.save_top_k": -1, "trainer.callbacks.filename": "at{step}", "trainer.max_epochs": 2,
        "trainer.callbacks.auto_insert_metric_name": "false",
    }  # fmt: skip
    run_on_ranks(2, tmp_path, [("first", words(digits, 2, "ddp", steps=3, **more))])
    at = next((tmp_path / "first").rglob("at2.ckpt"))
    more |= {"data.batch_size": 8, "ckpt_path": at}
    run_in(tmp_path / "one", words(digits, 1, "one", steps=3, **more))
    told = (
        "lies inside epoch 0, in steps of 16 images on 2 devices; here they are 8 on 1: training goes on with the next"
    )
    assert told in capfd.readouterr().err
    assert losses(tmp_path / "one", 1).shape[1] == 6
    assert last(tmp_path / "one")["global_step"] == 5


def scores(folder: Path) -> dict[str, float]:
    with next(folder.rglob("metrics.csv")).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: float(row[name]) for row in rows for name in ("val/loss", "val/top1") if row[name]}


REFUSED = [
    ({"router": DROPLESS}, 4, 3, "=3: it does not divide the run's 4 ranks .*; use 1 or 2 or 4"),
    ({"num_experts": 6}, 4, 4, "=4: it does not divide a layer's num_experts=6; use one of 2, 3, 6"),
    ({"moe_layers": "none"}, 2, 2, "=2: MomentumVisionTransformer has no experts as built; use 1, or"),
    ({"mlp_ratio": 0.3125}, 6, 2, "=2 on 6 ranks: 3 of them share each weight of an expert, and its 20 rows do not"),
]


@pytest.mark.parametrize(("settings", "ranks", "parallel", "told"), REFUSED)
def test_experts_that_cannot_be_spread_are_refused(settings: dict, ranks: int, parallel: int, told: str) -> None:
    net = timm.create_model("vmoe_tiny_patch4_16", depth=2, **settings)
    check_experts(net, ranks, 1)
    with pytest.raises(ValueError, match=f"^{SETTING}{told}"):
        check_experts(net, ranks, parallel)


RUNS = [
    ({SETTING: 8}, "=8: it does not divide the run's 2 ranks"),
    ({SETTING: 0}, "=0: "),
    ({"model.net.init_args.moe_layers": "none"}, "=2: MomentumVisionTransformer has no experts as built"),
]


@pytest.mark.parametrize(("settings", "told"), RUNS)
def test_a_run_is_refused_before_it_starts(settings: dict, told: str, digits: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{SETTING}{told}"):
        run_lightning(words(digits, 2, "2", rough=False, **settings)[1:-1], start=False)


def test_on_one_mesh_the_optimizer_is_torchs_own() -> None:
    net = timm.create_model("vmoe_tiny_patch4_16", depth=2)
    assert not isinstance(OptimizerSettings().build(net), ByMesh)
