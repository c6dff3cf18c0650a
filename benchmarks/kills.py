"""Kills random ranks of a run of several at random moments, again and again, and looks whether it always goes on.

    python benchmarks/kills.py --data data/digits --kills 20 --out benchmarks/results/kills.csv

A row a kill: what was killed and when, how long the others lived, how many lines of ours told of it, the step of the
newest checkpoint that reads whole, and what half-written files lay there after the next start's first save. Checkpoints
are written after every step and lie on another file system than TMPDIR (--target, --tmp). The ways to spread a network
and to save it (--strategies) take turns, each going on from the one before. Ends with 1 if any kill left the run
without a way on, a process after 60 seconds, or a file behind.
"""

import argparse
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from vmoe_momentum.models.saved import read_checkpoint
from vmoe_momentum.models.sharded import is_checkpoint

ROOT = Path(__file__).parent.parent
CHECKPOINTS = "trainer.strategy.init_args.checkpoints"
STRATEGIES: dict[str, tuple[str, dict[str, str]]] = {  # overlay, settings
    "ddp": ("ddp", {}),
    "fsdp2": ("fsdp2", {}),
    "fsdp2 sharded": ("fsdp2", {CHECKPOINTS: "sharded"}),
    "fsdp2 sharded_async": ("fsdp2", {CHECKPOINTS: "sharded_async"}),
}
LIMIT = 60.0  # seconds that others may live on


def command(data: Path, target: Path, ranks: int, strategy: str, last: Path | None) -> list[str]:
    saver = "lightning.pytorch.callbacks.ModelCheckpoint"
    given = {
        "data": "FolderDataModule", "data.root": data.absolute(),
        "data.num_workers": 1, "data.batch_size": 32 // ranks, "trainer.devices": ranks,
        "trainer.max_epochs": 2000, "trainer.enable_progress_bar": "false", "trainer.num_sanity_val_steps": 0,
        "trainer.logger": "false", "trainer.limit_val_batches": 1, "trainer.default_root_dir": target,
        "trainer.callbacks": saver, "trainer.callbacks.dirpath": target, "trainer.callbacks.filename": "last",
        "trainer.callbacks.every_n_train_steps": 1, "trainer.callbacks.enable_version_counter": "false",
        "model.schedule.warmup_steps": 1,
    }  # fmt: skip
    overlay, options = STRATEGIES[strategy]
    configs = [ROOT / "configs" / "digits.yaml", ROOT / "configs" / "scale" / f"{overlay}.yaml"]
    given |= options
    words = [*(f"--config={path}" for path in configs), *(f"--{name}={value}" for name, value in given.items())]
    words += [f"--ckpt_path={last}"] if last else []
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *launcher, "-m", "vmoe_momentum", "fit", *words]


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def newest(target: Path) -> tuple[Path | None, int]:
    """The checkpoint to go on from, and its step. Raises ValueError: it is damaged."""
    path = target / "last.ckpt"
    return (path, read_checkpoint(path)["global_step"]) if is_checkpoint(path) else (None, -1)


def stamp(target: Path) -> int:
    """Of the checkpoint's writing; 0 while there is none."""
    try:
        return (target / "last.ckpt").stat().st_mtime_ns
    except FileNotFoundError:  # or between two
        return 0


def kill_once(number: int, data: Path, target: Path, tmp: Path, ranks: int, strategy: str, draw: random.Random) -> dict:
    """One start, from the newest checkpoint, and one kill, up to 8 seconds after its first save."""
    last, before = newest(target)
    earlier = stamp(target)
    log = tmp / f"log{number}"
    environment = {**os.environ, "TMPDIR": str(tmp), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        words = command(data, target, ranks, strategy, last)
        job = subprocess.Popen(words, cwd=tmp, env=environment, stdout=file, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + 200
        while stamp(target) in (0, earlier):
            if job.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"kill {number}: the run did not go on\n{log.read_text()[-3000:]}")
            time.sleep(0.05)
        time.sleep(0.3)  # the first save clears up, the second is under way
        own = {path.name for path in target.glob(".*.partial")}
        left = len(own) - 1 if own else 0  # one may be being written
        pids = children(job.pid)
        workers = [worker for pid in pids for worker in children(pid)]
        seconds, victim = draw.uniform(0, 8), draw.randrange(ranks)
        time.sleep(seconds)
        os.kill(pids[victim], signal.SIGKILL)
        since = time.monotonic()
        others = [pid for rank, pid in enumerate(pids) if rank != victim]
        lived = workers_lived = 0.0
        while (any(map(runs, [*others, job.pid])) or any(map(runs, workers))) and time.monotonic() - since < LIMIT + 10:
            job.poll()
            now = time.monotonic() - since
            lived = now if any(map(runs, others)) or job.returncode is None else lived
            workers_lived = now
            time.sleep(0.05)
    finally:
        for pid in [*children(job.pid), job.pid]:
            if runs(pid):
                os.kill(pid, signal.SIGKILL)
        job.wait()
    path, after = newest(target)
    told = log.read_text(errors="replace").count("\nvmoe-momentum: ")
    return {
        "kill": number, "ranks": ranks, "strategy": strategy, "rank": victim, "seconds_after_save": round(seconds, 2),
        "others_lived": round(lived, 1), "loaders_lived": round(workers_lived, 1), "lines": told,
        "exit_code": job.returncode, "step_before": before, "step": after, "whole": int(path is not None),
        "left_over": left,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the digits, as `data prepare digits` wrote them")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2], help="in turns")
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES), choices=STRATEGIES, help="in turns")
    parser.add_argument("--target", type=Path, default=Path("/dev/shm"), help="where checkpoints lie")
    parser.add_argument("--tmp", type=Path, default=Path("/tmp"), help="TMPDIR of the runs")
    parser.add_argument("--seed", type=int, default=None, help="of the moments; by default another one each time")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if os.stat(options.target).st_dev == os.stat(options.tmp).st_dev:
        print(f"{options.target} and {options.tmp} are one file system", file=sys.stderr)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(10**6)
    print(f"seed {seed}", flush=True)
    draw, rows = random.Random(seed), []
    target, tmp = (Path(tempfile.mkdtemp(prefix="kills-", dir=place)) for place in (options.target, options.tmp))
    try:
        for number in range(options.kills):
            ranks = options.ranks[number % len(options.ranks)]
            strategy = options.strategies[number // 2 % len(options.strategies)]
            rows.append(kill_once(number, options.data, target, tmp, ranks, strategy, draw))
            print(rows[-1], flush=True)
    finally:
        shutil.rmtree(target)
        shutil.rmtree(tmp)
        if rows:
            with options.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0])
                writer.writeheader()
                writer.writerows(rows)
    bad = [
        r for r in rows if not r["whole"] or r["left_over"] or r["others_lived"] > LIMIT or r["step"] < r["step_before"]
    ]
    raise SystemExit(f"{len(bad)} of {len(rows)} kills went wrong" if bad else 0)


if __name__ == "__main__":
    main()
