"""Told to stop, a run saves where it stands; resumed, it is the run it would have been, bit for bit."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_helpers import rows
from lightning.pytorch.callbacks import Callback

from vmoe_momentum import cli, lightning_cli
from vmoe_momentum.stopping import SIGNALS
from vmoe_momentum.training import stopping
from vmoe_momentum.training.stopping import resume_command

TESTS = Path(__file__).parent.parent
CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 129}
EPOCHS, BATCHES = 2, 5


@pytest.fixture(autouse=True)
def heard():
    """Signals as a terminal leaves them: what runs in the background or under nohup starts without some."""
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


class SignalAt(Callback):
    """Sends this process a signal in a hook, the so many-th time."""

    def __init__(self, name: str, hook: str, at: int = 0) -> None:
        self.name, self.at = name, at
        setattr(self, hook, self._count)

    def _count(self, *_: object, **__: object) -> None:
        if self.at == 0:
            os.kill(os.getpid(), getattr(signal, self.name))
        self.at -= 1


def arguments(root: Path, name: str, *extra: str) -> list[str]:
    """Two epochs of five batches in steps of three (the last of two), dropping at random."""
    given = {
        "data": "FolderDataModule", "data.root": root, "data.image_size": 16, "data.batch_size": 4,
        "data.num_workers": 0, "model.net": "vmoe_momentum.create_model",
        "model.net.init_args.name": "vmoe_tiny_patch4_16", "model.net.init_args.drop_path_rate": 0.2,
        "model.mixup": 0.4, "trainer.max_epochs": EPOCHS, "trainer.limit_train_batches": BATCHES,
        "trainer.accumulate_grad_batches": 3, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false",
        "trainer.log_every_n_steps": 1, "trainer.num_sanity_val_steps": 1, "trainer.logger": "CSVLogger",
        "trainer.logger.save_dir": name, "trainer.logger.name": "x",
        "trainer.callbacks+": "ModelCheckpoint", "trainer.callbacks.filename": "last",
    }  # fmt: skip
    return ["fit", *(f"--{key}={value}" for key, value in given.items()), *extra]


def stopped(argv: list[str], capsys) -> tuple[int, str]:
    """Exit code and the last line on stderr."""
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    return ended.value.code, capsys.readouterr().err.strip().splitlines()[-1]


def last_weights(folder: str) -> dict:
    (path,) = Path(folder).rglob("last.ckpt")
    return torch.load(path, weights_only=True)


def logged(folder: str) -> list[dict[str, str]]:
    return [
        {k: v for k, v in row.items() if v and k != "train/epoch_seconds"}
        for path in Path(folder).rglob("metrics.csv")
        for row in rows(path)
    ]


@pytest.fixture
def send(monkeypatch):
    """Puts SignalAt among the callbacks of the runs to come."""

    def put(*given: object) -> None:
        build = lightning_cli.VMoECLI.instantiate_trainer
        callback = SignalAt(*given)

        def instantiate(self, **kwargs):
            trainer = build(self, **kwargs)
            trainer.callbacks.insert(0, callback)
            return trainer

        monkeypatch.setattr(lightning_cli.VMoECLI, "instantiate_trainer", instantiate)

    return put


PLACES = {
    "amid a step": ("on_train_batch_start", 1),  # gradients of two batches are gathered
    "amid the last step": ("on_train_batch_start", 3),
    "after a step": ("on_train_batch_end", 2),
    "last batch": ("on_train_batch_end", BATCHES - 1),
    "second epoch": ("on_train_batch_end", BATCHES + 1),
    "validation": ("on_validation_batch_end", 1),  # 0 is the sanity check's
    "validation's end": ("on_validation_end", 1),
    "epoch's end": ("on_train_epoch_end", 0),
}
LONG = ["amid the last step", "after a step", "last batch", "second epoch", "validation's end", "epoch's end"]


@pytest.fixture(scope="module")
def whole(pictures, tmp_path_factory) -> tuple[dict, list]:
    """The run that nothing stopped: its last checkpoint and what it logged."""
    folder = str(tmp_path_factory.mktemp("whole"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        cli.run(arguments(pictures, "w"))
    return last_weights(folder), logged(folder)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        *[pytest.param(place, "SIGTERM", marks=[pytest.mark.long] * (place in LONG)) for place in PLACES],
        pytest.param("second epoch", "SIGINT", marks=pytest.mark.long),
        pytest.param("second epoch", "SIGHUP", marks=pytest.mark.long),
    ],
)
def test_stopped_anywhere_and_resumed_is_never_stopped(
    place, name, pictures, whole, send, tmp_path, monkeypatch, capsys
) -> None:
    """By the command that it prints: every weight, every optimizer state, every row logged, means of epochs, too."""
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        send(name, *PLACES[place])
        code, line = stopped(arguments(pictures, "cut"), capsys)
    assert code == CODES[name] and f"stopped by {name}: saved " in line, line
    monkeypatch.chdir(tmp_path)
    words = shlex.split(line.partition("go on with: ")[2])
    words = words[words.index("fit") :]
    assert words[:-1] == arguments(pictures, "cut") and words[-1].startswith("--ckpt_path=")
    cli.run([*words, "--trainer.logger.save_dir=rest"])
    ours, theirs = last_weights("rest"), whole[0]
    assert ours["global_step"] == theirs["global_step"] == 4
    assert same_weights(ours, theirs)
    for key, state in theirs["optimizer_states"][0]["state"].items():
        assert all(torch.equal(value, ours["optimizer_states"][0]["state"][key][name]) for name, value in state.items())
    both = logged("cut") + logged("rest")
    assert [r for r in both if "train/loss_epoch" in r] == [r for r in whole[1] if "train/loss_epoch" in r]
    assert [r for r in both if "val/loss" in r] == [r for r in whole[1] if "val/loss" in r]
    assert [r for r in both if "train/loss_step" in r] == [r for r in whole[1] if "train/loss_step" in r]


@pytest.mark.parametrize(
    "hook", ["setup", "on_sanity_check_start", "on_validation_batch_start", "on_train_batch_start"]
)
def test_before_the_first_step_there_is_nothing_to_save(hook, pictures, send, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    send("SIGTERM", hook, 0)
    code, line = stopped(arguments(pictures, "cut"), capsys)
    assert code == 143 and "same command" in line and not list(tmp_path.rglob("*.ckpt"))


def test_the_command_to_go_on_is_the_command_with_the_checkpoint() -> None:
    argv = ["fit", "--config", "a b.yaml", "--ckpt_path", "old", "--x=[1,2]", "--ckpt_path=older"]
    assert resume_command(argv, Path("n.ckpt")).endswith("fit --config 'a b.yaml' '--x=[1,2]' --ckpt_path=n.ckpt")


def in_slurm(monkeypatch, job: str) -> None:
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_ID": job, "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "0")


@pytest.mark.long
def test_slurms_warning_amid_a_step_saves_what_its_own_job_resumes_exactly(
    pictures, whole, send, tmp_path, monkeypatch, caplog
) -> None:
    """And no other job: nor is a stale hpc_ckpt_1.ckpt, Lightning's name, taken for this job's."""
    monkeypatch.chdir(tmp_path)
    in_slurm(monkeypatch, "7")
    asked = []
    monkeypatch.setattr(stopping.subprocess, "run", lambda words, **_: asked.append(words) or Done())
    Path("hpc_ckpt_1.ckpt").write_bytes(b"of another job")
    send("SIGUSR1", "on_train_batch_start", 1)
    with pytest.warns(UserWarning, match="hpc_ckpt_1.ckpt: which job saved it is unknown"):
        cli.run(arguments(pictures, "cut"))
    assert asked == [["scontrol", "requeue", "7"]]
    saved = torch.load("slurm_7.ckpt", weights_only=True)
    assert saved["global_step"] == 0 and saved["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"] == 2
    assert same_weights(last_weights("cut"), whole[0])  # saving changes nothing
    caplog.clear()
    cli.run(arguments(pictures, "rest"))
    assert "Restored all states from the checkpoint at" in caplog.text and "slurm_7.ckpt" in caplog.text
    assert same_weights(last_weights("rest"), whole[0])
    in_slurm(monkeypatch, "8")
    caplog.clear()
    cli.run([*arguments(pictures, "other"), "--trainer.max_steps=1"])
    assert "Restored" not in caplog.text


class Done:
    returncode = 0


def same_weights(ours: dict, theirs: dict) -> bool:
    return all(torch.equal(value, ours["state_dict"][key]) for key, value in theirs["state_dict"].items())


COMMANDS = {
    "robustness": ["robustness", "--data={data}", "--model=vit_tiny_patch16_224", "--out=o"],
    "data": ["data", "prepare", "digits", "--out=o"],
    "export": ["export", "--ckpt_path=x.ckpt", "--to=state-dict", "--out=o"],
    "analyze": ["analyze", "spectrum", "--data={data}"],
    "import": ["import", "--out=o"],
    "classify": ["classify", "o", "picture.png"],
    "validate": ["validate", "--config=x"],
    "test": ["test", "--config=x"],
    "predict": ["predict", "--config=x"],
}


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_ends_with_the_signals_code_and_says_how_to_go_on(command, name, monkeypatch, capsys) -> None:
    """Whatever it is doing, what clears up behind it is run, and handlers are put back."""
    before, cleared = {sign: signal.getsignal(sign) for sign in SIGNALS}, []

    def work(argv: list[str]) -> None:
        try:
            os.kill(os.getpid(), getattr(signal, name))
            time.sleep(5)
        finally:
            cleared.append(argv)

    monkeypatch.setattr(cli, "run", work)
    code, line = stopped(COMMANDS[command], capsys)
    assert code == CODES[name] and f"stopped by {name}: " in line and "run the same command again" in line
    assert cleared and before == {sign: signal.getsignal(sign) for sign in SIGNALS}


def start(folder: Path, argv: list[str]) -> subprocess.Popen:
    paths = f"{TESTS}{os.pathsep}{TESTS.parent}"
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "vmoe_momentum", *argv]
    return subprocess.Popen(words, env=environment, cwd=folder, stderr=subprocess.PIPE, text=True)


@pytest.mark.long
@pytest.mark.parametrize("name", CODES)
def test_a_program_told_to_stop(name, pictures, tmp_path) -> None:
    """From outside, with processes that load the data: a checkpoint within seconds, and the code."""
    argv = arguments(pictures, "cut", "--data.num_workers=2", "--trainer.max_epochs=1000")
    process = start(tmp_path, argv)
    while not list(tmp_path.rglob("last.ckpt")):
        time.sleep(0.2)
        assert process.poll() is None
    since = time.monotonic()
    process.send_signal(getattr(signal, name))
    told = process.communicate(timeout=60)[1]
    assert process.returncode == CODES[name] and "Traceback" not in told, told
    assert time.monotonic() - since < 20
    (path,) = tmp_path.rglob("stopped.ckpt")
    assert torch.load(path, weights_only=True)["global_step"] >= 2
    assert "go on with: python -m vmoe_momentum fit" in told


@pytest.mark.long
def test_ctrl_c_twice_ends_at_once(pictures, tmp_path) -> None:
    (tmp_path / "slow.py").write_text(
        "import time\nfrom lightning.pytorch.callbacks import Callback\nfrom pathlib import Path\n"
        "class Slow(Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, batch_idx):\n"
        "        if batch_idx == 1:\n            Path('here').touch()\n            time.sleep(600)\n"
    )
    process = start(tmp_path, arguments(pictures, "cut", "--trainer.callbacks+=slow.Slow"))
    while not (tmp_path / "here").exists():
        time.sleep(0.2)
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=10)[1]
    assert process.returncode == 130 and "ended at once" in told
