"""The recipes of language models take steps on a small text, under every rule overlay."""

from pathlib import Path

import pytest
import torch
import yaml
from small_text import make_text

from vmoe_momentum import cli
from vmoe_momentum.models.saved import KEY

FOLDER = Path(__file__).parents[2] / "configs"
CONFIGS = sorted((FOLDER / "language").glob("*.yaml"))
# what is about the norms of vision blocks, or looks ahead behind them, has no place here
OVERLAYS = [
    path
    for path in sorted((FOLDER / "rules").glob("*.yaml"))
    if set(yaml.safe_load(path.read_text())["model"]["net"]["init_args"]) == {"rule"}
]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


def steps(config: Path, text: Path, *more: str) -> dict:
    """Two steps; the checkpoint."""
    small = [
        "--model.net.init_args.context=32",
        "--data.batch_size=2",
        "--data.block_size=16",
        "--trainer.accelerator=cpu",
        f"--data.root={text}",
    ]
    short = ["--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--model.schedule.warmup_steps=0"]
    quiet = ["--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0"]
    kept = ["--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null"]
    cli.run(["fit", f"--config={config}", *more, *small, *short, *quiet, *kept])
    return torch.load(next(Path.cwd().rglob("*best*.ckpt")), weights_only=True)


@pytest.mark.parametrize(
    "config",
    [pytest.param(path, marks=pytest.mark.long) if path.stem == "smoe_large" else path for path in CONFIGS],
    ids=lambda path: path.stem,
)
def test_recipe_takes_steps(config: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    facts = steps(config, text)[KEY]
    name = yaml.safe_load(config.read_text())["model"]["net"]["init_args"]["name"]
    assert facts["model_args"]["depth"] == {"smoe_lm_large": 12, "smoe_lm_small": 3, "smoe_lm_tiny": 3}.get(name, 6)
    assert facts["model_args"]["dense_between"] == name.startswith("glam")


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_rule_overlays_go_over_a_recipe(overlay: Path, text: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    told = yaml.safe_load(overlay.read_text())["model"]["net"]["init_args"]["rule"]
    saved = steps(FOLDER / "language" / "demo.yaml", text, f"--config={overlay}")
    assert saved[KEY]["settings"]["rule"]["class_path"] == told["class_path"]
    assert all(value.isfinite().all() for value in saved["state_dict"].values())
