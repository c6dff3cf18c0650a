"""A config with one mistake is refused in one line that names the key, the value and the way out; or it is none.

In one process: parsing, building and the rehearsal of `fit`; of the configs that are accepted some take one step.
"""

import re
import time
from pathlib import Path

import mutations
import pytest
import yaml
from mutations import CONFIGS, FOLDER, Mutation

from vmoe_momentum import cli, lightning_cli

FREE = r"(name|filename|save_dir|version)$"
HARMLESS = {  # kind and key of structural mutations that may be accepted, and why
    ("drop", r"^(?!.*class_path)"): "every setting that may be left out has a default, and the others are refused",
    ("drop", r"rule\.class_path$"): "in an overlay: the rule below stays, with the settings that are left",
    ("word|list for scalar", FREE): "any text is a name",
    ("empty", FREE): "no name: Lightning's own",
    ("null", r"(name|filename|save_dir|monitor|version|pretrained|image_size|num_experts|moe_layers|router|rule)$"):
        "null is the default of these",
    ("null", r"(adam_layers|post_norm)$"): "null is all of them, and the named network's own",
    ("null", r"(crop|betas|randaugment|max_steps|max_epochs|gradient_clip_val|devices|log_every_n_steps|logger)$"):
        "Lightning's and the data modules' null: their default",
    ("null", r"(every_n_train_steps|every_n_epochs|callbacks\+?|init_args|progressive)$"): "as above",
    ("path that is not there", r"save_dir$"): "a folder for logs is made",
    ("wrong class", r"rule(.init_args)?(.class_path)?$"): "a rule may be another rule",
}  # fmt: skip
PER_CONFIG = {"structural": 36, "numeric": 14}  # 20 configs: 720 and 280, less where an overlay has no number


def words(path: Path, config: dict, file: Path, data: Path) -> list[str]:
    """fit's; an overlay lies over the demo's config."""
    demo = [f"--config={FOLDER / 'digits.yaml'}", "--data=FolderDataModule", f"--data.root={data}"]
    below = [] if "data" in config else [*demo, "--data.num_workers=0"]
    return ["fit", *below, f"--config={file}"]


def outcome(argv: list[str], capsys) -> str:
    """The one line of a refusal, "" where there is none."""
    start = time.perf_counter()
    try:
        cli.main(argv)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert time.perf_counter() - start < 60
    assert "Traceback" not in captured.out + captured.err
    if not code:
        return ""
    line = captured.err.strip().splitlines()[-1]
    assert code == 2, line
    assert line.startswith("vmoe-momentum: error: ")
    assert "bug" not in line, line
    assert captured.err.count("vmoe-momentum: error") == 1
    return line.removeprefix("vmoe-momentum: error: ")


def check(mutation: Mutation, line: str) -> None:
    if not line:
        if mutation.kind != "number":
            reasons = [key for kind, key in HARMLESS if re.fullmatch(kind, mutation.kind)]
            assert any(re.search(key, mutation.key) for key in reasons), "accepted"
        else:
            assert not nonsense(mutation), "accepted"
        return
    keys = mutation.key.split(".")
    parents = [".".join(keys[:end]) for end in range(2, len(keys))]
    named = [keys[-1].removesuffix("+"), *parents, re.sub(r"\+?\.(\d+)\b", r"[\1]", ".".join(keys[:-1])) or "?"]
    assert any(name in line for name in named), f"the key is not in {line}"
    shown = [str(mutation.value), str(mutation.value)[:40], "null" if mutation.value is None else ""]
    if mutation.kind in ("drop", "rename", "extra") or not any(shown):
        return
    if isinstance(mutation.value, dict):
        shown += list(mutation.value)
    assert any(text in line for text in shown if text), f"the value is not in {line}"


def nonsense(mutation: Mutation) -> bool:
    """Numbers that mean something nowhere, or not there."""
    value, key = mutation.value, mutation.key.rpartition(".")[2]
    if value != value or abs(value) > 1e9:
        return True
    return value == -1 and key not in ("max_steps", "max_epochs", "save_top_k", "num_workers", "num_sanity_val_steps")


def sweep(path: Path, counts: dict[str, int], data: Path, folder: Path, capsys, monkeypatch, steps: int) -> None:
    """Of the accepted ones the first `steps` are trained for one step."""
    monkeypatch.chdir(folder)
    fit = lightning_cli.VMoECLI._run_subcommand
    monkeypatch.setattr(
        lightning_cli.VMoECLI, "_run_subcommand", lambda built, subcommand: lightning_cli.rehearse(built)
    )
    config, file, wrong = mutations.small(path, data), folder / "mutated.yaml", []
    file.write_text(yaml.safe_dump(config))
    assert not outcome(words(path, config, file, data), capsys)
    seed = CONFIGS.index(path)
    for mutation in [
        *mutations.structural(config, counts["structural"], seed),
        *mutations.numeric(config, counts["numeric"], seed),
    ]:
        file.write_bytes(mutation.text)
        argv = words(path, config, file, data)
        try:
            line = outcome(argv, capsys)
            check(mutation, line)
            if not line and steps > 0:
                steps -= 1
                with monkeypatch.context() as real:
                    real.setattr(lightning_cli.VMoECLI, "_run_subcommand", fit)
                    short = ["--trainer.fast_dev_run=true", "--model.schedule.warmup_steps=0"]
                    assert not outcome([*argv, *short], capsys), "accepted, but its first step fails"
        except AssertionError as error:
            wrong.append(f"{mutation.name}: {str(error).partition(chr(10))[0] or 'no message'}")
    assert not wrong, "\n".join(wrong)


def test_some_mistakes_are_named(digits: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    sweep(FOLDER / "digits.yaml", {"structural": 5, "numeric": 2}, digits, tmp_path, capsys, monkeypatch, steps=0)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_mistake_is_named(path: Path, digits: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    sweep(path, PER_CONFIG, digits, tmp_path, capsys, monkeypatch, steps=2)


@pytest.mark.long
def test_there_are_as_many_as_promised(digits: Path) -> None:
    found = {"structural": 0, "number": 0}
    for seed, path in enumerate(CONFIGS):
        config = mutations.small(path, digits)
        found["structural"] += len(list(mutations.structural(config, PER_CONFIG["structural"], seed)))
        found["number"] += len(list(mutations.numeric(config, PER_CONFIG["numeric"], seed)))
    assert found["structural"] >= 600
    assert found["number"] >= 240
