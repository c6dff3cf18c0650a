"""`vmoe-momentum analyze` on a network that fit trained, and what it says when something is wrong."""

from pathlib import Path

import pytest
import timm
import torch
from analysis_helpers import tiny, write_checkpoint
from cli_helpers import fails, rows

from vmoe_momentum import cli
from vmoe_momentum.models.saved import KEY

CONFIGS = Path(__file__).parent.parent.parent / "configs"


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory) -> Path:
    """Log folder of two short epochs of HeavyBall, a checkpoint each."""
    folder = tmp_path_factory.mktemp("run")
    base = [f"--config={CONFIGS / name}.yaml" for name in ("digits", "every_epoch")]
    base += ["--data=FolderDataModule", f"--data.root={digits}", "--data.num_workers=0"]
    short = ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=6", "--trainer.max_epochs=2"]
    quiet = ["--model.schedule.warmup_steps=2", "--trainer.enable_progress_bar=false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.run(["fit", *base, *short, *quiet, "--model.net.init_args.rule=HeavyBall"])
    return folder / "runs/digits/version_0"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(digits: Path, *more: str) -> list[str]:
    return [f"--config={CONFIGS / 'digits.yaml'}", "--data=FolderDataModule", f"--data.root={digits}", *more]


@pytest.mark.parametrize(
    ("instrument", "more", "files"),
    [
        (
            "spectrum",
            ["--tokens=4"],
            ["spectrum.csv", "spectrum.png", "spectrum_eigenvalues.csv", "spectrum_epochs.png"],
        ),
        ("load", [], ["load.csv", "load.png"]),
        ("norms", ["--logs=[{run}]"], ["norms.csv", "norms.png", "norms_training.png"]),
        ("sensitivity", ["--noise=[0,8]"], ["sensitivity.csv", "sensitivity.png"]),
        ("pareto", ["--tokens=50"], ["pareto.csv", "pareto.png", "pareto_training.png"]),
    ],
)
def test_instruments(instrument: str, more: list[str], files: list[str], run: Path, digits: Path, here: Path) -> None:
    more = [word.format(run=run) for word in more]
    cli.run(["analyze", instrument, *words(digits, f"--model={run / 'checkpoints'}", "--images=20", *more)])
    out = here / "runs" / "analysis"
    assert sorted(path.name for path in out.iterdir()) == files
    found = rows(out / f"{instrument}.csv")
    assert {row["model"] for row in found} == {"HeavyBall"}
    assert {row["epoch"] for row in found} == {"1", "2"}
    assert {row["block"] for row in found} >= {"1", "3", "5", "7"}


def test_a_checkpoint_may_also_be_a_directory_and_data_need_no_config(digits: Path, here: Path) -> None:
    from vmoe_momentum.models.directory import save

    save(tiny(rule="Nesterov"), here / "net")
    data = ["--data=FolderDataModule", f"--data.root={digits}", "--data.image_size=16"]
    cli.run(["analyze", "norms", *data, "--model=n=local-dir:net", "--images=4", "--out=o"])
    assert {row["epoch"] for row in rows(here / "o" / "norms.csv")} == {""}


def test_compare_and_ablate_from_the_command_line(run: Path, digits: Path, here: Path) -> None:
    cli.run(["analyze", "compare", f"--run=HeavyBall={run}", "--target=[0.01,0.999]", "--out=o"])
    assert [row["epochs"] != "" for row in rows(here / "o" / "compare.csv")] == [True, False]
    grid = ["--x=model.net.init_args.rule.mu=0.3,0.9", "--y=model.optimizer.lr=0.001", "--seeds=[3]", "--out=g"]
    fit = [*words(digits, "--data.num_workers=0"), "--trainer.max_epochs=1", "--trainer.limit_train_batches=2"]
    fit += ["--trainer.limit_val_batches=1", "--model.schedule.warmup_steps=0", "--trainer.enable_progress_bar=false"]
    fit += ["--model.net.init_args.rule=HeavyBall"]
    cli.run(["analyze", "ablate", *grid, "--", *fit])
    found = rows(here / "g" / "ablate.csv")
    assert [row["model.net.init_args.rule.mu"] for row in found] == ["0.3", "0.9"]
    assert {(row["seed"], row["epochs"]) for row in found} == {("3", "1")}
    saved = torch.load(next((here / "g").rglob("mu=0.9*/**/last.ckpt")), weights_only=True)["vmoe_momentum"]
    assert saved["settings"]["rule"]["init_args"]["mu"] == 0.9


def test_a_grid_with_one_bad_value_is_refused_before_training(digits: Path, here: Path, capsys) -> None:
    fit = [*words(digits), "--model.net.init_args.rule=HeavyBall"]
    line = fails(["analyze", "ablate", "--x=model.net.init_args.rule.mu=0.3,1.5", "--out=g", "--", *fit], capsys)
    assert "HeavyBall.mu=1.5: use a number in [0, 1)" in line
    line = fails(["analyze", "ablate", "--out=g", "--", *words(digits)], capsys)  # the config's rule is Residual
    assert "Residual takes no 'mu'" in line
    for more, message in (
        (["--x=model.optimizer.name=adamw,nonsense"], "model.optimizer.name=nonsense"),
        (["--x=model.schedule.warmup_steps=0,100000"], "model.schedule.warmup_steps=100000"),
        (["--x=data.batch_size=4,5000"], "data.batch_size=5000"),
        (["--x=model.net.init_args.router.group_size=17,19"], "router.group_size=19 does not divide"),
    ):
        line = fails(
            ["analyze", "ablate", *more, "--out=g", "--", *fit, "--model.net.init_args.router=TopKRouter"], capsys
        )
        assert message in line
    line = fails(["analyze", "ablate", "--out=g", "--x=data.batch_size=4,5", "--", *fit, "--model.mixup=0.2"], capsys)
    assert "data.batch_size=5: mixup and cutmix pair" in line
    assert not list(here.iterdir())


def test_several_configs_are_merged_as_fit_does(digits: Path, here: Path) -> None:
    write_checkpoint(tiny(), here / "moe.ckpt")
    (here / "over.yaml").write_text(f"data: {{class_path: FolderDataModule, init_args: {{root: {digits}}}}}\n")
    (here / "more.yaml").write_text("data: {init_args: {eval_batch_size: 7}}\nmodel: {}\n")
    configs = [
        f"--config={path}" for path in (CONFIGS / "digits.yaml", "over.yaml", "more.yaml", CONFIGS / "every_epoch.yaml")
    ]
    cli.run(["analyze", "load", *configs, "--model=moe.ckpt", "--images=10", "--out=o"])
    assert (here / "o" / "load.csv").exists()


def test_ablate_without_validation_says_so(digits: Path, here: Path, capsys) -> None:
    fit = [*words(digits, "--data.num_workers=0"), "--trainer.max_epochs=1", "--trainer.limit_train_batches=1"]
    fit += ["--model.schedule.warmup_steps=0", "--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false"]
    fit += ["--trainer.callbacks=null"]  # a checkpoint that watches val/top1 is refused earlier
    grid = ["--x=model.optimizer.lr=0.001", "--y=model.label_smoothing=0.0", "--seeds=[0]", "--out=g"]
    assert "val/top1 was not logged" in fails(["analyze", "ablate", *grid, "--", *fit], capsys)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["spectrum", "{data}"], "--model: none given; use --model"),
        (["spectrum", "{data}", "--model=none.ckpt"], "none.ckpt: no such file"),
        (["load", "{data}", "--model=empty"], "--model=empty: no .ckpt in this folder"),
        (["norms", "{data}", "--model=dense.ckpt"], "dense.ckpt: this network has no MoE layers"),
        (["sensitivity", "{data}", "--model=moe.ckpt", "--model=dense.ckpt"], "dense.ckpt: this network has no MoE"),
        (["pareto", "{data}", "--model=dense.ckpt"], "dense.ckpt: this network has no MoE layers"),
        (["pareto", "{data}", "--model=moe.ckpt", "--model=s=soft.ckpt"], "soft.ckpt: SoftRouter gives experts"),
        (["pareto", "{data}", "--model=moe.ckpt", "--tokens=0"], "--tokens=0: use a whole number from 1"),
        (["load", "{data}", "--model=poison.ckpt"], "poison.ckpt: not a checkpoint that can be read safely"),
        (["load", "{data}", "--model=moe.ckpt", "--model=moe2.ckpt"], "moe2.ckpt are both Residual"),
        (["load", "{data}", "--model=moe.ckpt", "--data.image_size=32"], "moe.ckpt takes 16 pixels"),
        (["load", "{data}", "--model=moe.ckpt", "--data.root=nowhere"], "data.root=nowhere: no such folder"),
        (["load", "{data}", "--model=moe.ckpt", "--images=0"], "--images=0: use a whole number from 1"),
        (["load", "{data}", "--model=moe.ckpt", "--device=cuda:77"], "--device=cuda:77: not on this machine"),
        (["load", "{data}", "--model=moe.ckpt", "--device=gpuu"], "--device=gpuu: not on this machine"),
        (["spectrum", "{data}", "--model=moe.ckpt", "--tokens=-3"], "--tokens=-3: use a whole number from 1"),
        (["sensitivity", "{data}", "--model=moe.ckpt", "--noise=[1,-2]"], "--noise=[1.0, -2.0]: use a number in ["),
        (["sensitivity", "{data}", "--model=moe.ckpt", "--noise=[]"], "--noise=[]: give a standard deviation"),
        (["norms", "{data}", "--model=moe.ckpt", "--logs=[nowhere]"], "nowhere: no metrics.csv in it"),
        (["load", "--model=moe.ckpt"], "data"),
        (["load", "--config=nowhere.yaml", "--model=moe.ckpt"], "config=nowhere.yaml: no such file"),
        (["load", "--config=rule.yaml", "--model=moe.ckpt"], "config=rule.yaml: no data section in it"),
        (["load", "{data}", "--model=moe.ckpt", "--", "x"], "nothing can follow --"),
        (["load", "{data}", "--modell=moe.ckpt"], "modell"),
        (["load", "{data}", "--model=moe.ckpt", "--out=moe.ckpt"], "--out=moe.ckpt: cannot be written"),
        (["compare"], "--run: none given"),
        (["compare", "--run=nowhere"], "nowhere: no metrics.csv"),
        (["compare", "--run=x", "--target=[0]"], "--target=[0.0]: use a number in (0, 1e9]; an accuracy as a share"),
        (["compare", "--run=x", "--target=[0.9,95]"], "--target=[0.9, 95.0]: use accuracies, which are shares, or"),
        (["compare", "--run=x", "--target=[]"], "--target=[]: give an accuracy"),
        (["ablate", "--out=g"], "say how to train after --"),
        (["ablate"], "out"),
        (["ablate", "--out=g", "--seeds=[]", "--", "x"], "--seeds=[]: use different numbers from 0"),
        (["ablate", "--out=g", "--x=mu", "--", "x"], "mu: use KEY=VALUE"),
        (["ablate", "--out=g", "--seeds=[1,1]", "--", "x"], "--seeds=[1, 1]: use different numbers"),
        (["ablate", "--out=g", "--seeds=[5000000000]", "--", "x"], "--seeds=[5000000000]: use a whole number"),
        (["ablate", "--out=g", "--", "--print_config"], "--print_config: not among the options of fit here"),
        (["ablate", "--out=g", "--", "--trainer.logger.name=x"], "ablate sets seeds and loggers itself"),
        (["ablate", "--out=g", "--x=data.seed=1,2", "--", "x"], "ablate sets data.seed itself"),
        (["compare", "--run=empty", "--run=./empty"], "given twice; it would count as two runs"),
        (["load", "{data}", "--model=a=moe.ckpt", "--model=a=moe2.ckpt"], "are both a, epoch 1; give each network"),
        (["load", "{data}", "--model=a=moe.ckpt", "--model=a=other.ckpt"], "are different networks, both called a"),
        (["load", "{data}", "--model=moe.ckpt", "--model=moe.ckpt"], "moe.ckpt and moe.ckpt are both Residual"),
        (["load", "{data}", "--model=mixed"], "mixed: checkpoints of different networks in one folder"),
        (["load", "{data}", "--model=old.ckpt"], "old.ckpt: written by a version that did not yet store"),
        (["load", "{data}", "--model=moe.ckpt", "--model=b=less.ckpt"], "less.ckpt: its tensors do not fit"),
        (["load", "{data}", "--model=text.ckpt"], "text.ckpt: not a checkpoint that can be read safely"),
        (["load", "{data}", "--model=facts.ckpt"], "facts.ckpt: not written by vmoe-momentum fit"),
        (["load", "{data}", "--model=$x=moe.ckpt"], "a label is of letters, digits"),
        (["load", "{data}", "--model=a/b=moe.ckpt"], "a label is of letters, digits"),
        (["load", "{data}", "--model=moe.ckpt", "--device=meta"], "--device=meta: not on this machine"),
        (["load", "{data}", "--model=moe.ckpt", "--out=/proc"], "--out=/proc: cannot be written"),
        (["load", "--data=lightning.pytorch.LightningDataModule", "--model=moe.ckpt"], "subclass of ImageDataModule"),
        (["spectrumm"], "spectrumm"),
        ([], "command"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_one_line_and_write_nothing(
    argv: list[str], message: str, digits: Path, here: Path, capsys
) -> None:
    write_checkpoint(tiny(), here / "moe.ckpt")
    write_checkpoint(tiny(), here / "moe2.ckpt")
    write_checkpoint(timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1), here / "dense.ckpt")
    torch.save({"x": Path}, here / "poison.ckpt")
    write_checkpoint(tiny(router="SoftRouter"), here / "soft.ckpt", epoch=4)
    (here / "empty").mkdir()
    write_checkpoint(tiny(rule="HeavyBall"), here / "other.ckpt", epoch=3)
    write_checkpoint(tiny(), here / "mixed" / "a.ckpt", epoch=1)
    write_checkpoint(tiny(rule="HeavyBall"), here / "mixed" / "b.ckpt", epoch=2)
    content = torch.load(here / "other.ckpt", weights_only=True)
    torch.save({**content, KEY: {k: v for k, v in content[KEY].items() if k != "model_args"}}, here / "old.ckpt")
    tensors = {k: v for k, v in content["state_dict"].items() if k != "model.net.cls_token"}
    torch.save({**content, "state_dict": tensors}, here / "less.ckpt")
    torch.save({**content, KEY: []}, here / "facts.ckpt")
    (here / "text.ckpt").write_text("e\nnot a checkpoint\n")
    (here / "rule.yaml").write_text("model: {}\n")
    before = {path for path in here.rglob("*") if path.is_file()}
    expanded = [word for each in argv for word in (words(digits) if each == "{data}" else [each])]
    assert message in fails(["analyze", *expanded], capsys)
    assert {path for path in here.rglob("*") if path.is_file()} == before


def test_help_teaches(capsys) -> None:
    for argv in (["analyze", "--help"], *(["analyze", name, "--help"] for name in ("spectrum", "pareto", "ablate"))):
        with pytest.raises(SystemExit) as stopped:
            cli.main(argv)
        assert not stopped.value.code
        text = capsys.readouterr().out
        assert "examples:" in text and "vmoe-momentum analyze" in text
