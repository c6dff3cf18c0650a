"""What the pages tell to type works: each page's commands run in their order, on little data and cut short."""

from __future__ import annotations

import functools
import glob
import inspect
import re
import runpy
import shlex
from pathlib import Path

import jsonargparse
import pytest
from dataset_helpers import draw_pictures
from idx_files import write_set
from imagenet_files import tree
from PIL import Image
from test_shell import lines, texts
from text_helpers import counting, write_texts

from vmoe_momentum import cli
from vmoe_momentum.datasets import prepare_digits

ROOT = Path(__file__).parent.parent
NAMES = sorted({name for name, _ in texts() if name.endswith(".md")})
PAGES = {name: list(dict.fromkeys(lines().get(name, []))) for name in NAMES}
FENCED = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
BLOCKS = {name: FENCED.findall((ROOT / name).read_text()) for name in NAMES}

DIGITS = "--data FolderDataModule --data.root data/digits "
FIRST_STEPS = "--trainer.fast_dev_run true --model.schedule.warmup_steps 0 "
# How a command is cut short that the pattern finds, the first that does; None: it is an outline of one, or needs what
# other tests have (shards that several processes wrote).
CUT: dict[str, str | None] = {
    r"\.\.\.|INSTRUMENT|=N$|^vmoe-momentum \w+( --\w+)?$|consolidate": None,
    r"configs/scale/|model.compile": "--print_config",
    r"^vmoe-momentum data prepare idx --out data/fashion": "--source path/KMNIST",
    r"^vmoe-momentum data prepare text --out data/bible": "--source path/wikitext-103",
    r"^vmoe-momentum import timm": "--pretrained false",
    r"^vmoe-momentum fit .*configs/imagenet": FIRST_STEPS + (
        "--data FolderDataModule --data.root data/imagenet --data.batch_size 2 --data.eval_batch_size 2 "
        "--data.num_workers 0 --trainer.accelerator cpu --model.net.init_args.router.group_size image"
    ),
    r"^vmoe-momentum fit .*language": (
        "--data.batch_size 4 --model.schedule.warmup_steps 0 --trainer.max_epochs 1 --trainer.limit_train_batches 1"
    ),
    r"^vmoe-momentum fit": DIGITS + FIRST_STEPS,
    r"^vmoe-momentum test .*language": "--trainer.limit_test_batches 2",
    r"^vmoe-momentum test": DIGITS + "--trainer.limit_test_batches 2",
    r"^vmoe-momentum robustness": "--limit 8 --corruptions '[fog]' --severities '[1]' --attacks '[pgd]' --steps 1",
    r"^vmoe-momentum analyze ablate": DIGITS + FIRST_STEPS,
    r"^vmoe-momentum analyze": DIGITS + "--images 4 --tokens 4",
    r"^vmoe-momentum export": "--limit 8",
    r"": "",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with data/digits and, of a run of two steps, runs/digits/version_0 and exported/hf."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        prepare_digits("data/digits")
        short = "--trainer.limit_train_batches 2 --trainer.limit_val_batches 1 --trainer.max_epochs 1"
        own = f"{DIGITS} --model.net.init_args.rule HeavyBall --model.schedule.warmup_steps 0"
        cli.run(["fit", "--config", str(ROOT / "configs/digits.yaml"), *f"{own} {short}".split()])
        export = "export --ckpt_path runs/digits/version_0 --to hf --out exported/hf --data data/digits --limit 8"
        cli.run(export.split())
    return folder


def make_stand_ins(commands: str, trained: Path) -> None:
    """What a page's commands take as given; what it calls /path/to/X is path/X here."""
    for name in ("configs", "tests", "benchmarks"):
        Path(name).symlink_to(ROOT / name)
    for name in ("data", "runs", "exported", "path"):
        Path(name).mkdir()
    if "prepare digits" not in commands or "--exist_ok" in commands:
        Path("data/digits").symlink_to(trained / "data/digits")
    for name in ("runs/digits", "exported/hf"):
        Path(name).symlink_to(trained / name)
    Path("runs/demo/HeavyBall_seed0").mkdir(parents=True)
    Path("runs/demo/HeavyBall_seed0/fit").symlink_to(trained / "runs/digits/version_0")
    for name in ("a.ckpt", "b.ckpt"):
        Path(name).symlink_to(trained / "runs/digits/version_0/checkpoints/last.ckpt")
    Image.new("RGB", (16, 16)).save("some.png")
    Image.new("RGB", (16, 16)).save("some.jpg")
    tree(Path("path/ILSVRC2012"))
    draw_pictures(Path("path/pictures"), per_class=12)
    text = counting(600) + "AAA\n"  # the word that the demo swaps in
    write_texts(Path("path/wikitext-103"), dict.fromkeys(("train", "valid", "test"), text))
    write_set(Path("path/KMNIST"))
    write_set(Path("path/EMNIST"), prefix="emnist-letters-", val="test")


def words_of(command: str) -> list[str]:
    """As a shell splits it, the program left out."""
    grid = "--x model.net.init_args.rule.mu=0.5 --y model.net.init_args.rule.gamma=1.0 --seeds '[0]' --"
    command = command.replace(" -- ", f" {grid} ")
    command = command.replace("/path/to/", "path/").replace("--source DIR", "--source path/pictures")
    return [name for word in shlex.split(command)[1:] for name in (glob.glob(word) if "*" in word else [word])]


@pytest.mark.parametrize("page", [page for page in NAMES if PAGES[page] or BLOCKS[page]])
def test_commands_and_code_run(page: str, tmp_path: Path, monkeypatch, capsys, trained: Path) -> None:
    commands = [command for command in PAGES[page] if command.startswith("vmoe-momentum ")]
    monkeypatch.chdir(tmp_path)
    make_stand_ins(" ".join(commands), trained)
    for command in commands:
        added = next(added for pattern, added in CUT.items() if re.search(pattern, command))
        if added is None:
            name = command.split()[1]
            assert name in (*cli.LIGHTNING, *cli.COMMANDS) or name.startswith("--"), command
        elif added == "--print_config":
            with pytest.raises(SystemExit, match="^0$"):
                cli.run([*words_of(command), added])
        else:
            cli.run([*words_of(command), *shlex.split(added)])
    for block in BLOCKS[page]:
        capsys.readouterr()
        exec(block, {})
        said = re.findall(r"^# prints: (.*)$", block, flags=re.MULTILINE)
        assert not said or capsys.readouterr().out.splitlines() == said


SCRIPTS = sorted({command for those in PAGES.values() for command in those if command.startswith("python benchmarks/")})


@pytest.mark.parametrize("command", SCRIPTS)
def test_benchmarks_take_what_the_pages_give_them(command: str, monkeypatch) -> None:
    script, *words = shlex.split(command)[1:]
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    main = runpy.run_path(str(ROOT / script)).get("main")
    if main is None or not inspect.signature(main).parameters:
        text = (ROOT / script).read_text()
        assert all(word.lstrip("-") in text for word in words if word.startswith("--"))
        return
    taken: list[dict[str, object]] = []
    stub = functools.wraps(main)(lambda **given: taken.append(given))
    words = ["--pictures=true" if word == "--pictures" else word for word in words]  # as evidence.py reads it
    jsonargparse.auto_cli(stub, args=words, as_positional=words[:1] == [w for w in words[:1] if w[0] != "-"])
    assert len(taken) == 1 and len(taken[0]) >= len(words) // 2


def test_there_is_something_to_run() -> None:
    assert sum(map(len, PAGES.values())) > 60 and sum(map(len, BLOCKS.values())) >= 5


def test_targets_are_those_of_the_makefile() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    named = {command.split()[1] for those in PAGES.values() for command in those if command.startswith("make ")}
    assert len(named) >= 5 and named <= set(targets)
