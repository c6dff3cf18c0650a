"""The scripts of configs/scale, run by an sbatch, srun and scontrol that stand in for SLURM's."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from faults import lines
from test_faults import words

ROOT = Path(__file__).parents[2]
EPOCHS = 40  # of three steps
SCRIPTS = sorted((ROOT / "configs" / "scale").glob("fit_*.sbatch"))
FAKES = {
    # reads the script's own options, as SLURM does, and runs it
    "sbatch": """
import os, re, subprocess, sys
script = open(sys.argv[1]).read()
told = dict(re.findall(r"^#SBATCH --([\\w-]+)=?(.*)$", script, re.MULTILINE))
known = {"SLURM_JOB_NUM_NODES": told["nodes"], "SLURM_NTASKS_PER_NODE": told["ntasks-per-node"],
         "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": told["job-name"]}
sys.exit(subprocess.run(["bash", *sys.argv[1:]], env={**os.environ, **known, **TASKS}).returncode)
""",
    # so many tasks, each with its number; passes signals on to them, and the highest code back
    "srun": """
import os, signal, subprocess, sys
words = [word for word in sys.argv[1:] if not word.startswith("--kill")] if sys.argv[1].startswith("--kill") else []
count = int(os.environ["SLURM_JOB_NUM_NODES"]) * int(os.environ["SLURM_NTASKS_PER_NODE"])
tasks = []
for rank in range(count):
    known = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0, "SLURM_NTASKS": count,
             "SLURM_STEP_ID": 0, "SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost"}
    known = {name: str(value) for name, value in known.items()}
    tasks.append(subprocess.Popen(words, env={**os.environ, **known}))
sys.exit(max(abs(task.wait()) for task in tasks))
""",
    "scontrol": "import sys; open('requeued', 'a').write(' '.join(sys.argv[1:]) + '\\n')",
    "vmoe-momentum": "import os, sys; os.execv(sys.executable, [sys.executable, '-m', 'vmoe_momentum', *sys.argv[1:]])",
}


@pytest.fixture
def cluster(tmp_path):
    """The environment in which these are found first."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in FAKES.items():
        (folder / name).write_text(f"#!{sys.executable}\nTASKS = {{}}\n{text}")
        (folder / name).chmod(0o755)
    paths = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_ask_for_what_the_code_heeds(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    told = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script.read_text(), re.MULTILINE))
    nodes, gpus = re.fullmatch(r"fit_(\d+)x(\d+)", script.stem).groups()
    assert (told["nodes"], told["ntasks-per-node"], told["gpus-per-node"]) == (nodes, gpus, gpus)
    assert re.fullmatch(r"USR1@\d+", told["signal"])  # to the tasks, not to the script, and 60 s at least ahead
    assert int(told["signal"].partition("@")[2]) >= 60
    assert "requeue" in told and told["open-mode"] == "append" and "%j" in told["output"]


@pytest.mark.slow
@pytest.mark.parametrize("script", [SCRIPTS[0], pytest.param(SCRIPTS[1], marks=pytest.mark.long)], ids=lambda p: p.stem)
def test_scripts_start_one_task_a_gpu_with_this_command(script: Path, cluster, tmp_path) -> None:
    """Each of them the whole configuration: recipe, overlays, what was given behind, and the size of the job."""
    nodes, gpus = map(int, re.findall(r"\d", script.stem))
    fake = tmp_path / "bin" / "vmoe-momentum"
    fake.write_text(f"#!{sys.executable}\nimport os, sys\nopen('task' + os.environ['SLURM_PROCID'], 'w')"
                    ".write('\\n'.join(sys.argv[1:]))\n")  # fmt: skip
    argv = ["sbatch", str(script), "configs/digits.yaml", "--trainer.max_epochs", "3"]
    subprocess.run(argv, check=True, cwd=tmp_path, env={**cluster, "SCALE": "fsdp2"})
    tasks = [file.read_text().split("\n") for file in tmp_path.glob("task*")]
    assert len(tasks) == nodes * gpus and all(task == tasks[0] for task in tasks)
    printed = subprocess.run(
        [sys.executable, "-m", "vmoe_momentum", *tasks[0], "--print_config"], cwd=ROOT, env=cluster, check=True,
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    for line in (f"devices: '{gpus}'", f"num_nodes: {nodes}", "max_epochs: 3", "FSDP2Strategy", "bf16-mixed"):
        assert line in printed or line.replace("'", "") in printed, line


@pytest.mark.long
@pytest.mark.parametrize("told", [[0], [1], [0, 1]], ids=str)
def test_a_job_that_slurm_warns_is_queued_again_and_goes_on(told, pictures, cluster, tmp_path) -> None:
    """SLURM's warning to the first rank, the other or both; then it ends the job, and starts it again."""
    job = ["srun", "--kill-on-bad-exit=1", "vmoe-momentum"]
    job += words(pictures, tmp_path, **{"trainer.max_epochs": EPOCHS})
    known = {**cluster, "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "vmoe", "SLURM_JOB_NUM_NODES": "1",
             "SLURM_NTASKS_PER_NODE": "2"}  # fmt: skip
    known["PYTHONPATH"] += os.pathsep + str(ROOT / "tests" / "training")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": tmp_path}
    first = subprocess.Popen(job, env=known, start_new_session=True, **pipes)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "checkpoints" / "last.ckpt").is_file():
            assert first.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        pids = [int((tmp_path / "ranks" / f"rank{rank}").read_text()) for rank in range(2)]
        for rank in told:
            os.kill(pids[rank], signal.SIGUSR1)
        while not (tmp_path / "requeued").is_file():
            assert first.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        out = first.communicate(timeout=60)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(first.pid, signal.SIGKILL)  # its tasks, too, which hold the job's port
    assert first.returncode == 143, out
    assert (tmp_path / "requeued").read_text() == "requeue 77\n" and (tmp_path / "slurm_77.ckpt").is_file()
    (line,) = lines(out)
    assert "stopped by SIGTERM: saved" in line and "go on with: srun vmoe-momentum fit" in line
    known["SLURM_RESTART_COUNT"] = "1"
    again = subprocess.run(job, env=known, timeout=200, **pipes)
    assert again.returncode == 0, again.stdout
    assert f"restart 1 of slurm 77: goes on from {tmp_path / 'checkpoints' / 'stopped.ckpt'}" in again.stdout
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3 * EPOCHS
