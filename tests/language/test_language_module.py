"""Language models on the command line: perplexity by hand, resuming, ranks, swapped words, what is refused."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from analysis_helpers import tiny, write_checkpoint
from cli_helpers import fails
from ranks import run_on_ranks
from recording import read
from small_text import make_text

from vmoe_momentum import cli
from vmoe_momentum.datasets import TextDataModule
from vmoe_momentum.datasets.text import TextBatch
from vmoe_momentum.files.checksums import verify_folder
from vmoe_momentum.language import LanguageModule, create_language_model
from vmoe_momentum.language.intervals import resampled
from vmoe_momentum.language.looking import open_language_model
from vmoe_momentum.language.module import PAST, joined, share_of
from vmoe_momentum.models.saved import KEY

TESTS = Path(__file__).parent.parent
BLOCK, STREAMS = 8, 4
SWAP = {"data.word_swap": 0.1, "data.word_swap_token": "cat"}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


def arguments(command: str, text: Path, folder: Path, **settings: object) -> list[str]:
    net = {"name": "smoe_lm_tiny", "rule": "HeavyBall", "width": 16, "hidden": 16, "num_experts": 4, "context": 10,
           "dropout": 0.1, "num_heads": 2}  # fmt: skip
    given = {
        "data": "TextDataModule", "data.root": text, "data.block_size": BLOCK, "data.batch_size": STREAMS,
        "model.net": "vmoe_momentum.language.create_language_model",
        **{f"model.net.init_args.{name}": value for name, value in net.items()},
        "model.optimizer.lr": 3e-3, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false",
        "trainer.logger": "lightning.pytorch.loggers.CSVLogger", "trainer.logger.save_dir": folder,
        "trainer.logger.name": "log", "trainer.logger.version": command,
    }  # fmt: skip
    if command == "fit":
        given |= {
            "trainer.max_epochs": 2, "trainer.num_sanity_val_steps": 0,
            "trainer.callbacks+": "lightning.pytorch.callbacks.ModelCheckpoint",
            "trainer.callbacks.dirpath": folder / "checkpoints", "trainer.callbacks.filename": "last",
            "trainer.callbacks.every_n_train_steps": 3, "trainer.callbacks.enable_version_counter": "false",
            "trainer.callbacks.save_on_train_epoch_end": "true", "trainer.log_every_n_steps": 5,
        }  # fmt: skip
    given |= settings
    return [command, *(f"--{name}={value}" for name, value in given.items())]


@pytest.fixture(scope="session")
def trained(text: Path, tmp_path_factory) -> Path:
    """A folder with a finished run: log/fit, checkpoints/last.ckpt."""
    folder = tmp_path_factory.mktemp("trained")
    cli.run(arguments("fit", text, folder))
    return folder


def scores(folder: Path, command: str) -> dict[str, float]:
    """The last values of a log."""
    found: dict[str, float] = {}
    with (folder / "log" / command / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found |= {name: float(value) for name, value in row.items() if value}
    return found


def evaluate(command: str, text: Path, trained: Path, folder: Path, **settings: object) -> dict[str, float]:
    cli.run(arguments(command, text, folder, ckpt_path=trained / "checkpoints" / "last.ckpt", **settings))
    return scores(folder, command)


def perplexity(net, words: list[int], targets: list[int]) -> float:
    """In one long pass in float64."""
    with torch.no_grad():
        told = net(torch.tensor([words]))[0]
    return math.exp(-float(told[torch.arange(len(targets)), torch.tensor(targets)].mean()))


def test_perplexity_is_that_of_every_word_of_the_text(text: Path, trained: Path, tmp_path: Path) -> None:
    """One stream: the same as one long pass over the words, the first one behind <eos>."""
    net = open_language_model(str(trained / "checkpoints" / "last.ckpt")).build().net.double()
    for command, split in (("validate", "valid"), ("test", "test")):
        found = evaluate(command, text, trained, tmp_path, **{"data.eval_batch_size": 1})
        words = TextDataModule(str(text)).words(split).tolist()
        eos = TextDataModule(str(text)).vocabulary.index("<eos>")
        stage = {"validate": "val", "test": "test"}[command]
        expected = perplexity(net, [eos, *words[:-1]], words)
        assert found[f"{stage}/perplexity"] == pytest.approx(expected, rel=2e-6)
        assert found[f"{stage}/loss"] == pytest.approx(math.log(expected), rel=2e-6)
    assert found["test/perplexity_low"] < expected < found["test/perplexity_high"]
    assert expected < 25  # of 21 words that are drawn evenly, and line ends


def test_what_a_run_logs(trained: Path) -> None:
    found = scores(trained, "fit")
    assert {
        "val/perplexity",
        "val/block0/load_0",
        "val/block2/momentum_norm",
        "train/tokens_per_second",
    } <= found.keys()
    assert found["train/loss_epoch"] < math.log(25) and found["train/tokens_per_second"] > 0


def test_two_ranks_give_the_perplexity_of_one(text: Path, trained: Path, tmp_path: Path) -> None:
    """And after an epoch on the same streams."""
    spread = {"trainer.devices": 2, "trainer.strategy": "ddp"}
    ckpt = {"ckpt_path": trained / "checkpoints" / "last.ckpt"}
    training = {"model.net.init_args.dropout": 0.0, "trainer.max_epochs": 1, "trainer.log_every_n_steps": 1}
    alone = {**training, "data.batch_size": STREAMS}
    apart = {**training, "data.batch_size": STREAMS // 2, "data.eval_batch_size": STREAMS, **spread}
    for name, more in (("test", SWAP), ("validate", {})):
        cli.run(arguments(name, text, tmp_path / "one", **ckpt, **more))
    cli.run(arguments("fit", text, tmp_path / "one", **alone))
    run_on_ranks(2, tmp_path, [
        ("two", arguments("test", text, tmp_path / "two", **ckpt, **SWAP, **spread)),
        ("two", arguments("validate", text, tmp_path / "two", **ckpt, **spread)),
        ("two", arguments("fit", text, tmp_path / "two", **apart)),
    ])  # fmt: skip
    for command in ("test", "validate", "fit"):
        one, two = scores(tmp_path / "one", command), scores(tmp_path / "two", command)
        for name in (name for name in one if not name.startswith("train/")):  # those are of the first rank
            assert two[name] == pytest.approx(one[name], rel=1e-4 if command == "fit" else 2e-6), (command, name)


def test_killed_inside_an_epoch_and_resumed_is_never_stopped(text: Path, tmp_path: Path, monkeypatch) -> None:
    """Every batch and every weight, bit for bit, with what the streams had seen."""
    monkeypatch.syspath_prepend(TESTS)

    def run(name: str, **more: object) -> list[str]:
        folder = tmp_path / name
        argv = arguments("fit", text, folder, **{"trainer.logger": "false"}, **more)
        return [*[w for w in argv if not w.startswith("--trainer.logger.")], "--trainer.callbacks+=recording.Recording",
                f"--trainer.callbacks.folder={folder / 'seen'}"]  # fmt: skip

    monkeypatch.chdir(tmp_path)
    cli.run(run("whole"))
    whole = read(tmp_path / "whole" / "seen", "train")
    kill_at = int(np.random.default_rng().integers(4, len(whole)))
    words = [sys.executable, "-m", "vmoe_momentum", *run("cut"), f"--trainer.callbacks.kill_at={kill_at}"]
    own = {**os.environ, "PYTHONPATH": f"{TESTS}{os.pathsep}{TESTS.parent}"}
    own["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    killed = subprocess.run(words, env=own, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    done, seen = torch.load(last, weights_only=True)["global_step"], read(tmp_path / "cut" / "seen", "train")
    assert len(seen) == kill_at and kill_at - 3 <= done <= kill_at
    cli.run(run("rest", ckpt_path=last))
    assert seen[:done] + read(tmp_path / "rest" / "seen", "train") == whole, f"killed before batch {kill_at}"
    ours, theirs = (
        torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True) for n in ("rest", "whole")
    )
    for name, tensor in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor), f"{name}, killed before batch {kill_at}"
    for mine, other in zip(ours[PAST], theirs[PAST], strict=True):
        assert torch.equal(mine, other) and float(other.abs().max()) > 0


def test_another_number_of_devices_goes_on_with_the_same_streams(text: Path, tmp_path: Path) -> None:
    """Two ranks stop inside an epoch; one goes on, with as many streams a step, as one that never stopped."""
    alone = {"model.net.init_args.dropout": 0.0, "trainer.max_epochs": 1, "model.schedule.decay": "constant"}
    cli.run(arguments("fit", text, tmp_path / "whole", **alone))
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    spread = {"data.batch_size": STREAMS // 2, "data.eval_batch_size": STREAMS, "trainer.devices": 2}
    cut = {**alone, **spread, "trainer.strategy": "ddp", "trainer.max_steps": 21}
    run_on_ranks(2, tmp_path, [("cut", arguments("fit", text, tmp_path / "cut", **cut))])
    assert torch.load(last, weights_only=True)["global_step"] == 21
    cli.run(arguments("fit", text, tmp_path / "rest", **alone, ckpt_path=last))
    ours, theirs = (
        torch.load(tmp_path / n / "checkpoints" / "last.ckpt", weights_only=True) for n in ("rest", "whole")
    )
    assert ours["global_step"] == theirs["global_step"] > 21
    for mine, other in zip(ours[PAST], theirs[PAST], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=0)
    for name, tensor in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], tensor, atol=1e-3, rtol=0, msg=name)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2), (3, 1)])
def test_streams_are_dealt_anew(before: int, after: int) -> None:
    whole = tuple(torch.randn(12, 3, 2) for _ in range(2))
    again = joined([share_of(whole, rank, before) for rank in range(before)])
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for rank in range(after):
        assert torch.equal(share_of(again, rank, after)[0], whole[0][rank::after])


def test_training_goes_on_where_the_streams_were_whatever_is_validated_between(text: Path, tmp_path: Path) -> None:
    """Validation inside an epoch leaves what training has seen alone."""
    found = []
    for name, every in (("plain", 1.0), ("between", 0.2)):
        cli.run(arguments("fit", text, tmp_path / name, **{"trainer.val_check_interval": every}))
        found.append(torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True))
    assert all(torch.equal(found[0]["state_dict"][n], tensor) for n, tensor in found[1]["state_dict"].items())


def test_it_trains_in_bfloat16_and_with_gathered_batches(text: Path, trained: Path, tmp_path: Path) -> None:
    """Near the same run in float32; under accumulation the streams go on batch by batch."""
    plain = scores(trained, "fit")
    cli.run(arguments("fit", text, tmp_path, **{"trainer.precision": "bf16-mixed"}))
    rounded = scores(tmp_path, "fit")
    assert rounded["val/perplexity"] == pytest.approx(plain["val/perplexity"], rel=0.03)
    cli.run(arguments("fit", text, tmp_path / "more", **{"trainer.accumulate_grad_batches": 2}))
    assert math.isfinite(scores(tmp_path / "more", "fit")["val/perplexity"])


def test_swapped_words_and_what_they_hide(text: Path, trained: Path, tmp_path: Path) -> None:
    """Attacked inputs and targets as the papers have it; the targets before the attack apart; by hand."""
    token = {"data.word_swap": 0.2, "data.word_swap_token": "cat", "data.eval_batch_size": 1}
    found = evaluate("test", text, trained, tmp_path, **token)
    data = TextDataModule(str(text), eval_batch_size=1, word_swap=0.2, word_swap_token="cat", block_size=BLOCK)
    batches = list(data.test_dataloader())
    words, targets, clean = (torch.cat([batch[i] for batch in batches], dim=1)[0].tolist() for i in (0, 1, 3))
    net = open_language_model(str(trained / "checkpoints" / "last.ckpt")).build().net.double()
    assert 0.1 < np.mean(np.array(targets) != np.array(clean)) < 0.3
    assert found["test/perplexity"] == pytest.approx(perplexity(net, words, targets), rel=2e-6)
    assert found["test/perplexity_of_clean_targets"] == pytest.approx(perplexity(net, words, clean), rel=2e-6)
    low, high = (found[f"test/perplexity_of_clean_targets_{end}"] for end in ("low", "high"))
    assert low < found["test/perplexity_of_clean_targets"] < high
    plain = evaluate("test", text, trained, tmp_path / "plain", **{"data.eval_batch_size": 1})
    assert "test/perplexity_of_clean_targets" not in plain and plain["test/perplexity"] < found["test/perplexity"]


def test_predictions_are_of_every_word(text: Path, trained: Path, tmp_path: Path) -> None:
    cli.run(arguments("predict", text, tmp_path, ckpt_path=trained / "checkpoints" / "last.ckpt"))
    with (tmp_path / "log" / "predict" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    data = TextDataModule(str(text))
    assert [row["word"] for row in rows] == [data.vocabulary[i] for i in data.words("test")]
    tested = evaluate("test", text, trained, tmp_path)
    assert math.exp(np.mean([float(row["nll"]) for row in rows])) == pytest.approx(tested["test/perplexity"], rel=1e-5)
    assert all(float(row["likeliest_nll"]) <= float(row["nll"]) for row in rows)


# ---- settings, and what is refused


def module(**settings) -> LanguageModule:
    torch.manual_seed(0)
    net = create_language_model(
        "smoe_lm_tiny", 30, width=16, hidden=16, context=6, dropout=0.0, num_heads=2, rule="HeavyBall"
    )
    return LanguageModule(net, 30, **settings)


def losses_of(made: LanguageModule) -> tuple[torch.Tensor, list[torch.Tensor]]:
    words = torch.randint(0, 30, (3, 7), generator=torch.Generator().manual_seed(1))
    (loss,), _, _ = made.model(words, (words,), made.model.net.empty_cache(3))
    return loss, list(torch.autograd.grad(loss, list(made.model.parameters())))


def test_compiled_and_recomputed_are_the_same() -> None:
    loss, gradients = losses_of(module().train())
    for more in ({"recompute": True}, {"compile": True}):
        other, others = losses_of(module(**more).train())
        torch.testing.assert_close(other, loss, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(others, gradients, atol=1e-4, rtol=1e-4)


def test_the_routers_loss_counts_by_its_weight() -> None:
    routed = {"class_path": "TopKRouter", "init_args": {"capacity_factor": "dropless", "importance_loss_weight": 1.0}}
    net = create_language_model("smoe_lm_tiny", 30, width=16, context=6, num_heads=2, router=routed).train()
    words, losses = torch.randint(0, 30, (3, 7)), []
    for weight in (0.0, 1.0, 3.0):
        made = LanguageModule(net, 30, aux_loss_weight=weight)
        made.log = made.log_dict = lambda *_, **__: None
        made._log_speed = lambda tokens: None
        torch.manual_seed(0)
        losses.append(float(made.training_step(TextBatch(words, words, True), 0).detach()))
    assert losses[1] > losses[0] and losses[2] - losses[0] == pytest.approx(3 * (losses[1] - losses[0]), rel=1e-3)


def test_the_head_in_parts_is_the_head_at_once(monkeypatch) -> None:
    from vmoe_momentum.language import heads

    made, hidden = module().model.net.head.double(), torch.randn(41, 16, dtype=torch.float64, requires_grad=True)
    words = torch.randint(0, 30, (41,))
    words[::5] = heads.NO_WORD
    kept = words != heads.NO_WORD
    expected = -made.log_prob(hidden)[kept].gather(1, words[kept].unsqueeze(1)).sum()
    inputs = [hidden, made.weight, made.bias]
    gradients = torch.autograd.grad(expected, inputs)
    for rows in (0, 1, 7, 41, 100):
        monkeypatch.setattr(heads, "LOGITS", 30 * rows + 29)
        found = made.losses(hidden, words)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(torch.autograd.grad(found, inputs), gradients, atol=1e-10, rtol=0)


def test_the_adaptive_head_is_a_distribution() -> None:
    net = create_language_model("smoe_lm_tiny", 30, width=16, context=6, num_heads=2, head="adaptive", cutoffs=[4, 11])
    words = torch.randint(0, 30, (2, 9))
    told = net.eval()(words)
    torch.testing.assert_close(told.exp().sum(-1), torch.ones(2, 9))
    expected = -told.gather(2, words.unsqueeze(2)).sum()
    hidden = net.read(words, net.empty_cache(2)).hidden
    torch.testing.assert_close(net.head.losses(hidden, words), expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("count", [2, 30])
def test_an_interval_holds_the_value_and_narrows(count: int) -> None:
    draws = np.random.default_rng(0)
    tokens = torch.full((count,), 50)
    losses = torch.from_numpy(draws.normal(4.0, 0.3, count)) * tokens
    found, value = resampled(losses, tokens), math.exp(float(losses.sum() / tokens.sum()))
    assert found.low <= value <= found.high
    if count > 2:  # the standard error of a mean, times the value
        assert found.high - found.low == pytest.approx(2 * 1.96 * value * 0.3 / count**0.5, rel=0.4)
    assert math.isnan(resampled(losses[:1], tokens[:1]).low)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.net.init_args.rule": "Residual"}, "rule: checkpoint HeavyBall(mu=0.7, gamma=1.0"),
        ({"model.net.init_args.form": "released"}, "form: checkpoint paper, config released"),
        ({"model.net.init_args.context": 9}, "context: checkpoint 10, config 9"),
        ({"model.net.init_args.router": "TopKRouter"}, "router.noise_std: checkpoint 0.0, config 1.0"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(settings, message, text, trained, tmp_path, capsys) -> None:
    if settings.get("model.net.init_args.router"):
        settings = {"model.net.init_args.router.class_path": "TopKRouter",
                    "model.net.init_args.router.init_args.capacity_factor": "dropless"}  # fmt: skip
    line = fails(arguments("test", text, tmp_path, ckpt_path=trained / "checkpoints" / "last.ckpt", **settings), capsys)
    assert message in line


def test_a_checkpoint_of_other_words_is_refused(trained: Path, tmp_path: Path, capsys) -> None:
    other = make_text(tmp_path, seed=3)
    line = fails(arguments("test", other, tmp_path, ckpt_path=trained / "checkpoints" / "last.ckpt"), capsys)
    assert "vocabulary: checkpoint" in line and "use the config it was trained with" in line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.net": "vmoe_momentum.create_model", "model.net.init_args.name": "resnet18"}, "reads no text; use"),
        ({"data.batch_size": 900}, "data.batch_size=900"),
        ({"data.root": "nowhere"}, "nowhere"),
        ({"model.net.init_args.router": "SoftRouter"}, "must not see"),
        ({"model.net.init_args.name": "smoe_lm_minute"}, "name=smoe_lm_minute; did you mean"),
        ({"model.mixup": 0.2}, "mixup"),
        ({"model.aux_loss_weight": -1}, "model.aux_loss_weight=-1"),
        ({"trainer.strategy.class_path": "vmoe_momentum.training.FSDP2Strategy"}, "=FSDP2Strategy: for image"),
        ({"trainer.callbacks+ ": "vmoe_momentum.training.RobustnessCheck"}, "RobustnessCheck: attacks pictures"),
    ],
)
def test_what_cannot_be_trained_is_one_line(settings: dict, message: str, text: Path, tmp_path: Path, capsys) -> None:
    words = arguments("fit", text, tmp_path, **settings)
    if "model.net" in settings:
        words = [w for w in words if not w.startswith("--model.net.init_args.") or w.endswith("resnet18")]
    assert message in fails([word.replace("callbacks+ =", "callbacks+=") for word in words], capsys)


def test_pictures_are_not_read_as_text_nor_text_seen_as_pictures(digits: Path, text: Path, tmp_path, capsys) -> None:
    assert "prepared pictures, not text" in fails(arguments("fit", digits, tmp_path), capsys)
    words = [w for w in arguments("fit", text, tmp_path, data="FolderDataModule") if not w.startswith("--data.b")]
    assert "text" in fails(words, capsys)
    net = [w for w in words if not w.startswith("--data")]
    line = fails([*net, "--data=FolderDataModule", f"--data.root={digits}", "--data.image_size=16"], capsys)
    assert "model.net: a SparseLanguageModel sees no pictures" in line
    checkpoint = write_checkpoint(tiny(), tmp_path / "image.ckpt")
    torch.save({**torch.load(checkpoint), "pytorch-lightning_version": "2.6.6"}, checkpoint)
    assert "architecture: checkpoint" in fails(arguments("test", text, tmp_path, ckpt_path=checkpoint), capsys)


def test_configs_of_both_kinds_are_one_line(text: Path, digits: Path, capsys) -> None:
    digits_yaml, demo = (TESTS.parent / "configs" / name for name in ("digits.yaml", "language/demo.yaml"))
    for words in (
        [f"--config={digits_yaml}", "--data=TextDataModule"],
        [f"--config={demo}", "--data=FolderDataModule"],
    ):
        line = fails(["fit", *words, f"--data.root={text}"], capsys)
        assert "use configs of one kind of data" in line and "TextDataModule" in line


def test_other_commands_say_that_it_is_a_language_model(
    text: Path, trained: Path, digits: Path, tmp_path, capsys
) -> None:
    last = trained / "checkpoints" / "last.ckpt"
    line = fails(["robustness", f"--model={last}", f"--data={digits}", f"--out={tmp_path}"], capsys)
    assert "holds a language model" in line
    line = fails(["analyze", "load", "--data=FolderDataModule", f"--data.root={digits}", "--data.image_size=16",
                  f"--model={last}", f"--out={tmp_path}"], capsys)  # fmt: skip
    assert "holds a language model" in line


@pytest.mark.parametrize("instrument", ["load", "norms", "spectrum", "pareto"])
def test_instruments_look_at_language_models(instrument: str, text: Path, trained: Path, tmp_path: Path) -> None:
    argv = ["analyze", instrument, "--data=TextDataModule", f"--data.root={text}", f"--data.block_size={BLOCK}",
            f"--model={trained / 'checkpoints' / 'last.ckpt'}", f"--out={tmp_path}", "--images=12"]  # fmt: skip
    cli.run([*argv, *(["--tokens=6"] if instrument in ("spectrum", "pareto") else [])])
    with (tmp_path / f"{instrument}.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["block"] for row in rows} == {"0", "1", "2"} and (tmp_path / f"{instrument}.png").exists()


def test_the_checkpoint_says_how_to_build_it(trained: Path) -> None:
    facts = torch.load(trained / "checkpoints" / "last.ckpt", weights_only=True)[KEY]
    assert facts["settings"]["rule"]["class_path"] == "HeavyBall" and facts["model_args"]["context"] == 10
    yaml.safe_dump(facts)  # plain data


# ---- export


@pytest.fixture(scope="module")
def exported(text: Path, trained: Path, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    for kind in ("pt2", "state-dict"):
        cli.run(["export", f"--ckpt_path={trained / 'checkpoints' / 'last.ckpt'}", f"--to={kind}", "--limit=20",
                 f"--out={folder / kind}", f"--data={text}"])  # fmt: skip
    return folder


@pytest.mark.parametrize("kind", ["pt2", "state-dict"])
def test_an_export_says_what_it_is(exported: Path, kind: str, text: Path) -> None:
    told = json.loads((exported / kind / "metadata.json").read_text())
    found = told["round_trip"]
    assert found["max_difference"] < 1e-4 and found["perplexity_before"] == pytest.approx(found["perplexity_after"])
    assert told["cache"] == {"tensors": 3, "shape": ["streams", 10, 16]} and told["network"]["settings"]["rule"]
    words = (exported / kind / "vocabulary.txt").read_text().split("\n")[:-1]
    assert words == TextDataModule(str(text)).vocabulary
    verify_folder(exported / kind)


def test_others_run_the_program_without_this_package(exported: Path, trained: Path, tmp_path: Path) -> None:
    """Any number of streams and of words, going on from the cache."""
    code = (
        "import json, sys, torch\n"
        "program = torch.export.load(sys.argv[1] + '/model.pt2').module()\n"
        "told = json.load(open(sys.argv[1] + '/metadata.json'))['cache']\n"
        "words, found = torch.load(sys.argv[2]), []\n"
        "cache = tuple(torch.zeros(len(words), *told['shape'][1:]) for _ in range(told['tensors']))\n"
        "for part in words.split([3, 9, 2], dim=1):\n"
        "    log_prob, cache = program(part, cache)\n"
        "    found.append(log_prob)\n"
        "torch.save(torch.cat(found, dim=1), sys.argv[3])\n"
        "assert not [name for name in sys.modules if name.startswith('vmoe_momentum')]\n"
    )
    words = torch.randint(0, 20, (3, 14))
    torch.save(words, tmp_path / "words")
    argv = [sys.executable, "-c", code, str(exported / "pt2"), str(tmp_path / "words"), str(tmp_path / "found")]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = open_language_model(str(trained / "checkpoints" / "last.ckpt")).build()(words)
    torch.testing.assert_close(torch.load(tmp_path / "found"), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to=onnx"], "--to=onnx: language models take pt2 or state-dict"),
        (["--to=hf"], "--to=hf: language models take"),
        (["--to=pt2", "--input=uint8"], "--input=uint8: for image classifiers"),
        (["--to=pt2", "--device=cpu"], "--device=cpu: for image classifiers"),
        (["--to=state-dict", "--data=nowhere"], "nowhere"),
    ],
)
def test_an_export_that_means_nothing_is_one_line(words, message, text, trained, tmp_path, capsys) -> None:
    last = trained / "checkpoints" / "last.ckpt"
    line = fails(["export", f"--ckpt_path={last}", f"--out={tmp_path / 'o'}", f"--data={text}", *words], capsys)
    assert message in line and not (tmp_path / "o").exists()


def test_classify_says_that_it_is_text(exported: Path, digits: Path, capsys) -> None:
    picture = sorted((digits / "val" / "3").iterdir())[0]
    assert "a language model, and this is for pictures" in fails(
        ["classify", str(exported / "pt2"), str(picture)], capsys
    )
