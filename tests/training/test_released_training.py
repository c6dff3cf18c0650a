"""Norms behind the residual and a look-ahead behind the norm in training: resumed to the bit, averaged, refused."""

from pathlib import Path

import pytest
import torch
from cli_helpers import fails
from test_continuing import CONFIG, fit

from vmoe_momentum.models.saved import open_saved

RULES = CONFIG.parent / "rules"


def callbacks(folder: Path) -> list[str]:
    """Averaged weights, and a checkpoint an epoch."""
    saver = {"dirpath": f"{folder}", "filename": "'{epoch}'", "save_top_k": -1}
    told = ", ".join(f"{name}: {value}" for name, value in saver.items())
    ema = "{class_path: EMAWeightAveraging, init_args: {decay: 0.5}}"
    return [f"--trainer.callbacks=[{ema}, {{class_path: ModelCheckpoint, init_args: {{{told}}}}}]"]


@pytest.mark.long
@pytest.mark.parametrize("overlay", ["released_robust", "released_heavy_ball"])
def test_resumed_averaged_and_rebuilt(overlay: str, digits: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    form = [f"--config={RULES / overlay}.yaml", "--trainer.logger=false"]
    whole = fit(digits, *form, *callbacks(tmp_path / "whole"))
    fit(digits, *form, *callbacks(tmp_path / "rest"), f"--ckpt_path={tmp_path}/whole/epoch=0.ckpt")
    theirs, ours = (torch.load(tmp_path / name / "epoch=1.ckpt", weights_only=True) for name in ("whole", "rest"))
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(ours[part][name], value) for name, value in theirs[part].items()), part
    norms = [name for name in theirs["state_dict"] if ".norm3." in name]
    assert len(norms) == 2 * 8
    averaged, raw = (open_saved(f"{tmp_path}/whole/epoch=1.ckpt").build(raw=raw).net for raw in (False, True))
    assert averaged.post_norm == "all"
    assert averaged.function_settings() == whole.model.model.net.function_settings()
    for block, other in zip(averaged.blocks, raw.blocks, strict=True):
        assert not torch.equal(block.norm3.weight, other.norm3.weight)


def test_a_checkpoint_without_the_norm_is_refused(digits: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """And one of another look-ahead, whose tensors are the same."""
    monkeypatch.chdir(tmp_path)
    fit(digits, f"--config={RULES / 'released_robust'}.yaml", "--trainer.logger=false", *callbacks(tmp_path))
    argv = ["test", f"--config={CONFIG}", "--data=FolderDataModule", f"--data.root={digits}"]
    argv += [f"--config={RULES / 'released_robust'}.yaml", f"--ckpt_path={tmp_path}/epoch=1.ckpt"]
    told = fails([*argv, "--model.net.init_args.post_norm=dense"], capsys)
    assert "post_norm: checkpoint all, config dense" in told
    told = fails([*argv, "--model.net.init_args.rule.init_args.look_ahead=before_norm"], capsys)
    assert "look_ahead: checkpoint after_norm, config before_norm" in told


def test_checkpoints_from_before_the_setting_are_networks_without_the_norm(digits: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fit(digits, "--trainer.logger=false", *callbacks(tmp_path))
    path = tmp_path / "epoch=0.ckpt"
    saved = torch.load(path, weights_only=True)
    del saved["vmoe_momentum"]["settings"]["post_norm"]
    torch.save(saved, path)
    fit(digits, "--trainer.logger=false", *callbacks(tmp_path / "rest"), f"--ckpt_path={path}")
    assert open_saved(str(path)).build().net.post_norm == "none"
