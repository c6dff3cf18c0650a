"""The command line on real data, and what it says when something is wrong."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cli_helpers import fails
from dataset_helpers import decoding_threads, requires_ffcv

from vmoe_momentum import cli
from vmoe_momentum.datasets.beton import FIELD, HEADER, RECORD

CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"
RULE = "--model.net.init_args.rule"


def arguments(root: Path, backend: str = "FolderDataModule", *extra: str) -> list[str]:
    """The demo's config on little data, in the current folder."""
    short = ["--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2", "--trainer.max_epochs=2"]
    quiet = ["--model.schedule.warmup_steps=2", "--trainer.enable_progress_bar=false", "--data.num_workers=0"]
    return [f"--config={CONFIG}", f"--data={backend}", f"--data.root={root}", *short, *quiet, *extra]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def checkpoint(digits: Path, tmp_path_factory) -> Path:
    """last.ckpt of a short HeavyBall run."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.run(["fit", *arguments(digits), RULE, "HeavyBall"])
    return folder / "runs/digits/version_0/checkpoints/last.ckpt"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([RULE, "HeavyBal"], r"model.net.init_args.rule=HeavyBal: no such MomentumRule; did you mean HeavyBall?"),
        ([RULE, "HeavyBall", f"{RULE}.mu", "1.5"], "HeavyBall.mu=1.5: use a number in [0, 1)"),
        ([f"{RULE}.nu", "1"], "takes no 'nu'"),
        (["--model.net.init_args.rul", "X"], "takes no 'rul'; did you mean rule?"),
        (["--model.net.init_args.moe_layers=[3,9]"], "moe_layers=[3, 9]: index 9 is past depth=8; use 0..7"),
        (
            ["--model.net.init_args.router=TopKRouter", "--model.net.init_args.router.top_k=9"],
            "router.top_k=9 is more than num_experts=4; use 1..4",
        ),
        (["--model.net.init_args.name=vmoe_tiny_patch4_1"], "did you mean vmoe_tiny_patch4_16?"),
        (["--data.image_size=18"], "image_size=18 is not a multiple of the patch size 4; use 16 or 20"),
        (["--data.root=nowhere"], "data.root=nowhere: no such folder; prepare one with"),
        (
            ["--data=FolderDataModul"],
            "data.class_path=FolderDataModul: no such ImageDataModule; did you mean Folder",
        ),
        (["--data.rooot=x"], "takes no 'rooot'; did you mean root?"),
        (["--data.batch_size=5000"], "data.batch_size=5000"),
        (["--model.bogus=1"], "model.bogus: no such setting; valid:"),
        (["--model.optimizer.lrr=1"], "model.optimizer.lrr: no such setting; did you mean lr?"),
        (["--model.optimizer.name=adamv"], "model.optimizer.name=adamv; did you mean"),
        (["--data.progressive.start_size=8"], "data.init_args.progressive: also say start_epoch, end_epoch"),
        (["--data.progressive=3"], "data.init_args.progressive=3: use {start_size: ..., start_epoch: ..., "),
        (["--model.mixup=0.2", "--data.batch_size=33"], "data.batch_size=33: mixup and cutmix pair"),
        (["--model.label_smoothing=1.5"], "model.label_smoothing=1.5: use a number in [0, 1)"),
        (["--model.aux_loss_weight=-1"], "model.aux_loss_weight=-1"),
        (["--trainer.max_epochs=-1"], "trainer.max_epochs=-1: the schedule decays to the last step"),
        (["--trainer.max_epochs=many"], "trainer.max_epochs=many: expected int or null"),
        (["--trainer.max_epoch=2"], "trainer.max_epoch: no such setting; did you mean max_epochs?"),
        (["--ckpt_path=nowhere.ckpt"], "ckpt_path=nowhere.ckpt: no such file"),
        (["--ckpt_path=http://example.org/a.ckpt"], "local files only"),
        (["--config=nowhere.yaml"], "nowhere.yaml: no such file"),
    ],
    ids=lambda value: " ".join(value).replace("--", "") if isinstance(value, list) else "",
)
def test_mistakes_are_one_line(extra: list[str], message: str, digits: Path, here: Path, capsys) -> None:
    assert message in fails(["fit", *arguments(digits), *extra], capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {nett: 3}", "model.nett: no such setting; did you mean net?"),
        ("optimiser: 3", "optimiser: no such setting"),
        ("model: {schedule: 3}", "model.schedule=3: use {decay: ..., warmup_steps: ..., min_lr: ...}"),
        ("model: {optimizer: {name: null}}", "model.optimizer.name=null: expected str; leave it out for the default"),
        (
            "model: {net: {init_args: {rule: {class_path: HeavyBall, init_args: {learn: null}}}}}",
            "model.net.init_args.rule.init_args.learn=null: expected bool",
        ),
        ("data: {init_args: {root: null}}", "data.init_args.root=null: expected str"),
        (
            "model: {net: {init_args: {rule: {class_path: Robust, init_args: {L: 3, m: 0.25, r: 0.6}}}}}",
            "Robust.r=0.6: use a number in [1 - 1/sqrt(k), 1 - 1/k] = [0.711325, 0.916667], where k = L/m = 3.0/0.25",
        ),
        (
            "model: {net: {init_args: {rule: {class_path: Robust, init_args: {L: 3, m: 0.25, r: null}}}}}",
            "Robust: L=3.0, m=0.25, r=null; give L, m and r, or gamma, mu and alpha",
        ),
        (
            "trainer: {callbacks: [ModelCheckpoint, ModelCheckpoint]}",
            "trainer.callbacks[0] and trainer.callbacks[1] keep their state in checkpoints under one name, Mod",
        ),
        ("trainer: {callbacks: [3]}", "trainer.callbacks[0]=3: use the name of a Callback, or {class_path: NAME"),
        ("trainer: 3", "trainer=3: use {NAME: VALUE, ...} of its settings"),
        ("trainer: {max_epochs: 1}\ntrainer: {max_epochs: 2}", "not valid YAML: the key trainer is there twice"),
        ("trainer: {gradient_clip_val: .nan}", "trainer.gradient_clip_val=nan: use a number in [0, 1e6]"),
        ("[model]", "config=bad.yaml: holds ['model'] where settings are needed"),
        ("model: [", "config=bad.yaml: not valid YAML"),
    ],
)
def test_mistakes_in_a_file_are_one_line(text: str, message: str, digits: Path, here: Path, capsys) -> None:
    (here / "bad.yaml").write_text(text)
    assert message in fails(["fit", *arguments(digits), "--config=bad.yaml"], capsys)


def test_unknown_commands_are_one_line(capsys) -> None:
    assert "command=fitt; did you mean fit?" in fails(["fitt"], capsys)
    assert "--outt: no such option" in fails(["data", "prepare", "digits", "--outt=x"], capsys)


def test_a_new_rule_is_one_class(digits: Path, here: Path) -> None:
    """No other edit: YAML finds it by name, its setting travels with the checkpoint."""
    (here / "toy.py").write_text(
        "from vmoe_momentum.momentum import Residual\n"
        "class Half(Residual):\n"
        "    def __init__(self, share: float = 0.5) -> None:\n"
        "        super().__init__()\n"
        "        self.share = share\n"
        "    def __call__(self, x, u, buffers, t, coefficients):\n"
        "        return x + self.share * u(x), buffers\n"
    )
    (here / "run.py").write_text("import sys, toy\nfrom vmoe_momentum import cli\ncli.main(sys.argv[1:])\n")
    words = ["fit", *arguments(digits), RULE, "Half", f"{RULE}.share", "0.25"]
    subprocess.run([sys.executable, "run.py", *words], check=True, capture_output=True)
    checkpoint = torch.load(next(here.rglob("last.ckpt")), weights_only=True)
    told = {"class_path": "Half", "init_args": {"share": 0.25}}
    assert checkpoint["vmoe_momentum"]["settings"]["rule"] == told


SAMPLE = str(Path(__file__).parent / "oracles" / "official_checkpoint" / "small_pieces")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flax", "--source=nowhere", "--router=TopKRouter"], "source=nowhere: no file nowhere.index"),
        (["flax", f"--source={SAMPLE}"], "say, for example, --router TopKRouter --router.top_k 2"),
        (["flax", f"--source={SAMPLE}", "--router=TopKRoute"], "no such Router; did you mean TopKRouter?"),
        (
            ["flax", f"--source={SAMPLE}", "--router=TopKRouter", "--router.topk=2"],
            "takes no 'topk'; did you mean top_k?",
        ),
        (
            ["flax", f"--source={SAMPLE}", "--router.top_k=9"],
            "router.top_k=9: say which class it is for, with --router",
        ),
        (["flax", f"--source={SAMPLE}", "--router=TopKRouter", "--router.top_k=x"], "router.top_k=x: expected int"),
        (
            ["flax", f"--source={SAMPLE}", "--router=TopKRouter", "--router.capacity_factor=abc"],
            "router.capacity_factor=abc: expected float or 'dropless'",
        ),
        (["flax", f"--source={SAMPLE}", "--router=TopKRouter", "--router.top_k=9"], "router.top_k=9 is more than"),
        (
            ["flax", f"--source={SAMPLE}", "--router=TopKRouter", "--image_size=33"],
            "image_size=[33, 33] is not a multiple",
        ),
        (["flax", f"--source={SAMPLE}", "--router=TopKRouter", "--image_size=big"], "image_size=big: expected"),
        (["flax", f"--source={SAMPLE}", "--router=TopKRouter", "--pos_embed=x"], "pos_embed"),
        (["flax", f"--source={SAMPLE}", "--router=TopKRouter", "--num_classes=-1"], "num_classes=-1"),
        (["timm", "--source=vit_tiny_patch16_22"], "source=vit_tiny_patch16_22: no such timm model; did you mean"),
        (["timm", "--source=local-dir:nowhere"], "nowhere/config.json"),
        (["timm", "--source=vit_tiny_patch16_224", "--pretrained=false", "--moe_layers=last9"], "moe_layers='last9'"),
        (["timm", "--source=vit_tiny_patch16_224", "--pretrained=false", "--num_experts=0"], "num_experts=0"),
        (["timm", "--source=vit_tiny_patch16_224", "--pretrained=false", "--rule=Heavy"], "no such MomentumRule"),
        (["timm", "--source=vit_tiny_patch16_224", "--pretrained=false", "--num_classes=-3"], "num_classes=-3"),
        (["timm", "--source=vit_tiny_patch16_224", "--pretrained=false", "--image_size=30"], "image_size=30"),
        (["timm", "--source=vit_tiny_patch16_224", "--pretrained=false", "--image_size=0"], "image_size=0: use"),
        (["timm", "--source=x", f"--out={__file__}/y"], "test_cli.py is no folder that can be written"),
        (["timm", "--sorce=x"], "--sorce"),
    ],
    ids=lambda value: " ".join(value).replace(SAMPLE, "S").replace(__file__, "F") if isinstance(value, list) else "",
)
def test_mistakes_of_import_are_one_line_and_write_nothing(words: list[str], message: str, here: Path, capsys) -> None:
    assert message in fails(["import", words[0], "--out=w", *words[1:]], capsys)
    assert not list(here.iterdir())


def test_fit_takes_an_upcycled_backbone(digits: Path, here: Path, capsys) -> None:
    """The class by its bare name, from a file; its checkpoint is refused under another backbone."""
    net = {"class_path": "UpcycledViT", "init_args": {
        "backbone": "vit_tiny_patch16_224", "pretrained": False, "moe_layers": "every2", "num_experts": 4,
        "rule": "HeavyBall", "backbone_args": {"patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 4},
    }}  # fmt: skip
    (here / "up.yaml").write_text(yaml.safe_dump({"model": {"net": net}}))
    command = [*arguments(digits), "--config=up.yaml"]
    cli.run(["fit", *command])
    trained = "--ckpt_path=runs/digits/version_0/checkpoints/last.ckpt"
    cli.run(["test", *command, trained])
    line = fails(["test", *command, trained, "--model.net.init_args.backbone=deit_tiny_patch16_224"], capsys)
    assert "backbone: checkpoint vit_tiny_patch16_224, config deit_tiny_patch16_224" in line


def test_ffcv_asked_for_and_missing(digits: Path, here: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("vmoe_momentum.datasets.datamodules.ffcv_available", lambda: False)
    line = fails(["fit", *arguments(digits, "FFCVDataModule")], capsys)
    assert "data.class_path=FFCVDataModule: the package ffcv is not installed; pip install" in line
    assert "FolderDataModule" in line


@requires_ffcv
@pytest.mark.parametrize("damage", ["truncated", "label"])
def test_a_damaged_beton_is_refused_before_the_first_step(damage: str, digits: Path, here: Path, capsys) -> None:
    root = Path(shutil.copytree(digits, here / "data"))
    beton = root / "train.beton"
    if damage == "truncated":
        beton.write_bytes(beton.read_bytes()[: beton.stat().st_size // 2])
    else:
        records = np.memmap(beton, RECORD, "r+", offset=HEADER.itemsize + 2 * FIELD.itemsize, shape=(1437,))
        records["label"][7] = 10
        records.flush()
    line = fails(["fit", *arguments(root, "FFCVDataModule")], capsys)
    assert "train.beton: not a sound beton" in line
    assert ("bytes where manifest.json says" if damage == "truncated" else "labels from 0 to 10") in line
    assert "data prepare" in line
    assert not list(here.rglob("*.ckpt"))


@requires_ffcv
def test_a_decoding_error_ends_fit_within_seconds(pictures: Path, here: Path, capsys) -> None:
    """A JPEG that rots without a trace in the file's time is found while decoding, in FFCV's thread."""
    root = Path(shutil.copytree(pictures, here / "data"))
    beton = root / "train.beton"
    data, was = beton.read_bytes(), beton.stat()
    start = data.index(b"\xff\xd8\xff")  # the first JPEG: its header stays, its tables go
    beton.write_bytes(data[: start + 2] + bytes(300) + data[start + 302 :])
    os.utime(beton, ns=(was.st_atime_ns, was.st_mtime_ns))
    started = time.perf_counter()
    line = fails(["fit", *arguments(root, "FFCVDataModule"), "--data.batch_size=8", "--data.eval_batch_size=9"], capsys)
    assert time.perf_counter() - started < 30
    assert "decoding failed" in line
    assert "do not decode" in line
    assert decoding_threads() == []


def test_a_broken_or_foreign_checkpoint_is_refused(checkpoint: Path, digits: Path, here: Path, capsys) -> None:
    (here / "cut.ckpt").write_bytes(checkpoint.read_bytes()[:5000])
    (here / "text.ckpt").write_text("not a checkpoint")
    torch.save({"state_dict": {}}, here / "foreign.ckpt")
    for name, message in (
        ("cut", "not a checkpoint"),
        ("text", "not a checkpoint"),
        ("foreign", "foreign.ckpt: not written by vmoe-momentum fit"),
    ):
        assert message in fails(["test", *arguments(digits), f"--ckpt_path={name}.ckpt"], capsys)


def test_a_poisoned_checkpoint_runs_no_code(here: Path, digits: Path, capsys) -> None:
    class Bomb:
        def __reduce__(self):
            return Path.touch, (here / "exploded",)

    torch.save({"state_dict": {}, "hyper_parameters": Bomb()}, here / "bomb.ckpt")
    assert "is never run" in fails(["test", *arguments(digits), "--ckpt_path=bomb.ckpt"], capsys)
    assert not (here / "exploded").exists()


def test_another_rule_is_refused_with_both_values(checkpoint: Path, digits: Path, here: Path, capsys) -> None:
    line = fails(["test", *arguments(digits), f"--ckpt_path={checkpoint}"], capsys)
    saved = "HeavyBall(mu=0.7, gamma=1.0, learn=False, dense_blocks=False)"
    assert f"rule: checkpoint {saved}, config Residual(gamma=1.0)" in line
    assert "--override-model" in line
    cli.main(["test", *arguments(digits), f"--ckpt_path={checkpoint}", "--override-model"])
    cli.main(["test", *arguments(digits), f"--ckpt_path={checkpoint}", RULE, "HeavyBall"])
    assert "test/top1" in capsys.readouterr().out


def test_fit_leaves_logs_checkpoints_and_a_summary(digits: Path, here: Path, capsys) -> None:
    cli.main(["fit", *arguments(digits)])
    printed = capsys.readouterr().out
    for words in ("472,778 in all, 340,170 active", "GFLOPs", "hours", "Residual(gamma=1.0)", "last checkpoint"):
        assert words in printed, words
    folder = here / "runs/digits/version_0"
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert (folder / "config.yaml").is_file()
    assert list(folder.glob("events.out.tfevents*"))
    saved = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    assert saved["epoch"] == 1  # the last epoch, not the best
    assert saved["vmoe_momentum"]["class_names"] == [str(digit) for digit in range(10)]
    assert saved["vmoe_momentum"]["class_ids"] == [str(digit) for digit in range(10)]
    assert saved["vmoe_momentum"]["crop_pct"] == 1.0
    json.dumps(saved["vmoe_momentum"])
    with (folder / "metrics.csv").open() as file:
        columns = csv.DictReader(file).fieldnames
    assert {"train/loss_epoch", "val/top1", "val/block7/load_3", "val/block7/update_norm"} <= set(columns)


def test_predict_writes_probabilities(checkpoint: Path, digits: Path, here: Path) -> None:
    cli.main(["predict", *arguments(digits), f"--ckpt_path={checkpoint}", RULE, "HeavyBall"])
    (path,) = here.rglob("predictions.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 360
    assert float(rows[0]["probability_1"]) >= float(rows[0]["probability_2"]) > 0
    assert rows[0]["class_1"] in {str(digit) for digit in range(10)}


def test_later_configs_and_flags_win_and_print_config_shows_it(digits: Path, here: Path, capsys) -> None:
    (here / "overlay.yaml").write_text("model: {label_smoothing: 0.25}\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit", *arguments(digits), "--config=overlay.yaml", RULE, "HeavyBall", "--print_config"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "label_smoothing: 0.25" in printed
    assert "class_path: vmoe_momentum.HeavyBall" in printed
    assert "num_classes" not in yaml.safe_load(printed)["model"]  # linked to the data, not repeated


def test_help_lists_every_command(capsys) -> None:
    cli.main(["--help"])
    printed = capsys.readouterr().out
    for command in ("data", "fit", "validate", "test", "predict", "--debug"):
        assert command in printed


@pytest.mark.parametrize(
    "backend", [pytest.param("FFCVDataModule", marks=[requires_ffcv, pytest.mark.long]), "FolderDataModule"]
)
def test_a_whole_process_ends_with_one_line(backend: str, here: Path) -> None:
    """The console script itself: exit code, and the last line of stderr."""
    command = [sys.executable, "-m", "vmoe_momentum", "fit", *arguments(here / "nowhere", backend)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("vmoe-momentum: error: data.root=")
    assert "Traceback" not in done.stdout + done.stderr


def test_a_bug_says_so(capsys, monkeypatch) -> None:
    def broken(argv: list[str]) -> None:
        raise KeyError("state")

    monkeypatch.setattr(cli, "run", broken)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit"])
    assert stopped.value.code == 1
    assert "KeyError: 'state'; this is a bug: run again with --debug" in capsys.readouterr().err


def test_debug_restores_the_traceback(digits: Path, here: Path) -> None:
    with pytest.raises(ValueError, match="past depth"):
        cli.main(["fit", *arguments(digits), "--model.net.init_args.moe_layers=[9]", "--debug"])


ENDING = """
import atexit, multiprocessing.util, os, sys, threading, time
import torch
from vmoe_momentum import cli

class Cleared:  # what a module holds goes while the interpreter is cleared up
    def __del__(self, write=os.write):
        write(1, b"cleared up\\n")

def late():
    time.sleep(0.5)
    print("thread done", flush=True)

def run(words):
    atexit.register(print, "library done")
    threading.Thread(target=late).start()
    if "works" in words:
        multiprocessing.get_context("fork").Process(target=late).start()
    if "alone" not in words:
        torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
    if "fails" in words:
        raise ValueError("data.root=3: no such folder")
    if "leaves" in words:
        raise SystemExit(7)

kept, cli.run = Cleared(), run
cli.main()
"""


@pytest.mark.parametrize("where", ["rank", "alone"])
@pytest.mark.parametrize(("how", "code"), [("works", 0), ("fails", 2), ("leaves", 7), ("fails --debug", 1)])
def test_a_rank_ends_before_its_interpreter_is_cleared_up(how: str, code: int, where: str, tmp_path: Path) -> None:
    """gloo's threads may abort it then: threads and what libraries registered come first, and the exit code stays."""
    words = [sys.executable, "-c", ENDING, str(tmp_path / "meeting"), *how.split(), where]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stderr
    assert done.stdout.count("thread done") == 1 + (how == "works") and "library done" in done.stdout
    assert ("cleared up" in done.stdout) == (where == "alone")
    assert ("data.root=3" in done.stderr) == ("fails" in how)


def test_who_calls_the_command_goes_on_without_a_group(tmp_path: Path, capsys) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        cli.main(["--version"])
        assert not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
