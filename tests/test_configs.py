"""Every config parses, instantiates and takes one training step on small data."""

from pathlib import Path

import pytest
import torch
import yaml
from dataset_helpers import HAS_FFCV
from registered import registered

from vmoe_momentum import TopKRouter, cli, create_model
from vmoe_momentum.lightning_cli import run_lightning
from vmoe_momentum.models import PixelModel
from vmoe_momentum.models.directory import save
from vmoe_momentum.momentum import MomentumRule
from vmoe_momentum.training.profile import measure_cost

FOLDER = Path(__file__).parent.parent / "configs"
OVERLAYS = sorted((FOLDER / "rules").glob("*.yaml"))
CONFIGS = sorted(path for path in FOLDER.rglob("*.yaml") if "data" in yaml.safe_load(path.read_text()))

TEXT = sorted((FOLDER / "language").glob("*.yaml"))  # tests/language/test_recipes.py


# up to half a minute each, and networks that other recipes have, too
LARGE = (
    "fashion_small",
    "adversarial_vmoe_small_patch32",
    "vmoe_base_patch16",
    "finetune_384",
    "momentum_vmoe_small_every2_patch32",
    "vmoe_small_patch16",
    "upcycled",
)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.long) if path.stem in LARGE else path
        for path in CONFIGS
        if path not in TEXT
    ],
    ids=lambda p: p.stem,
)
def test_config_takes_a_step(path: Path, digits: Path, pictures: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = yaml.safe_load(path.read_text())
    if settings["data"]["class_path"] == "FFCVDataModule" and not HAS_FFCV:
        pytest.skip("the package ffcv is not installed")
    root = digits if settings["data"]["init_args"]["root"] == "data/digits" else pictures
    small = ["--data.batch_size=8", "--data.num_workers=0", f"--data.root={root}", "--trainer.accelerator=cpu"]
    net = settings["model"]["net"]["init_args"]
    if path.parent.name == "imagenet" and "group_size" not in path.read_text():  # groups fit whole images of one size
        small.append("--data.image_size=64")
    if net.get("name") == "soft_moe_small_patch16_224":  # a gigabyte otherwise
        small.append("--model.net.init_args.num_experts=4")
    if net.get("pretrained"):
        small.append("--model.net.init_args.pretrained=false")
    if net.get("name", "").startswith("local-dir:"):  # the export that the header says to make
        export_network(tmp_path / net["name"].partition(":")[2])
    if "progressive" in settings["data"]["init_args"]:
        small += ["--data.progressive.start_size=32"]
    short = ["--trainer.fast_dev_run=true", "--model.schedule.warmup_steps=0"]
    cli.run(["fit", f"--config={path}", *small, *short])


def export_network(folder: Path) -> None:
    """What `export --to hf` of vmoe_small_patch32.yaml's checkpoint writes, untrained."""
    net = create_model("vmoe_small_patch32_224", router=TopKRouter(group_size=400), num_classes=1000)
    save(net, folder)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_is_a_lab_note(path: Path) -> None:
    lines = path.read_text().splitlines()
    header = "\n".join(line for line in lines if line.startswith("#"))
    assert len(lines) <= 60
    for fact in ("Command:", "Hardware:", "Expected:", "easured"):
        assert fact in header, fact


# one of each kind trains; the others only in `make test-all`
TRAINED = ("adam", "complex", "heavy_ball_learned", "robust", "sam")


@pytest.mark.parametrize(
    "path",
    [path if path.stem in TRAINED else pytest.param(path, marks=pytest.mark.long) for path in OVERLAYS],
    ids=lambda p: p.stem,
)
def test_rule_overlays_go_over_a_config_and_train_roughly(path: Path, digits: Path, tmp_path, monkeypatch) -> None:
    """Three steps with drop path 0.5 and capacity factor 0.5: finite, and the rule is the one the file names."""
    monkeypatch.chdir(tmp_path)
    told = yaml.safe_load(path.read_text())["model"]["net"]["init_args"]["rule"]
    base = [
        f"--config={FOLDER / 'digits.yaml'}",
        f"--config={path}",
        "--data=FolderDataModule",
        f"--data.root={digits}",
    ]
    rough = ["drop_path_rate=0.5", "router=TopKRouter", "router.capacity_factor=0.5"]
    rough = [f"--model.net.init_args.{setting}" for setting in rough]
    short = ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1"]
    quiet = ["--model.schedule.warmup_steps=1", "--trainer.enable_progress_bar=false", "--data.num_workers=0"]
    cli.run(["fit", *base, *rough, *short, *quiet])
    checkpoint = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    saved = checkpoint["vmoe_momentum"]["settings"]["rule"]
    assert saved["class_path"] == told["class_path"]
    assert told.get("init_args", {}).items() <= saved["init_args"].items()
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())


def test_every_overlay_says_how_to_use_it_and_builds() -> None:
    for path in OVERLAYS:
        assert "--config configs/rules/" + path.name in path.read_text()
        settings = yaml.safe_load(path.read_text())["model"]["net"]["init_args"]
        net = create_model("vmoe_tiny_patch4_16", **settings)
        assert net.function_settings()["rule"]["class_path"] == settings["rule"]["class_path"]


def test_every_rule_has_an_overlay() -> None:
    named = {yaml.safe_load(path.read_text())["model"]["net"]["init_args"]["rule"]["class_path"] for path in OVERLAYS}
    assert named == set(registered(MomentumRule))


def test_the_dense_baseline_of_the_evidence_has_the_same_active_flops() -> None:
    """But for the routers, a few products of which are left out or there for nothing."""
    files = [yaml.safe_load((FOLDER / name).read_text()) for name in ("fashion.yaml", "fashion_dense.yaml")]
    told = [file["model"]["net"]["init_args"] for file in files]
    sparse, dense = create_model(**told[0]), create_model(**{**told[0], **told[1]})
    assert sparse.moe_layers == dense.moe_layers == (1, 3, 5, 7)
    tokens, width = 17, sparse.embed_dim
    routers = [2e-9 * 4 * tokens * width * experts for experts in (4, 1)]
    costs = [
        measure_cost(PixelModel(net), 28).gflops - gate for net, gate in zip((sparse, dense), routers, strict=True)
    ]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3)


def test_the_overlay_for_gpus_goes_over_a_recipe(digits: Path, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    configs = [f"--config={FOLDER / name}" for name in ("digits.yaml", "gpu.yaml")]
    data = ["--data=FolderDataModule", f"--data.root={digits}", "--data.num_workers=0"]
    short = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--model.schedule.warmup_steps=0"]
    built = run_lightning([*configs, *data, *short], start=False)
    weight = built.model.model.net.patch_embed.proj.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    built.trainer.fit(built.model, datamodule=built.datamodule)
    assert built.trainer.precision == "bf16-mixed"
    assert weight.is_contiguous(memory_format=torch.channels_last)
    saved = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)["state_dict"]
    assert torch.equal(saved["model.net.patch_embed.proj.weight"], weight)
