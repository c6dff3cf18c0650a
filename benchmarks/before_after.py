"""This code beside an earlier one's: what a user waits for, on the digits.

git worktree add --detach ../before 7866051
python benchmarks/before_after.py ../before --csv benchmarks/results/before_after.csv

Each is a process of its own with that code first on its path; the two take turns, and the median of the rounds counts.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import jsonargparse
from rich.progress import track
from timing import write_rows

MAIN = "from vmoe_momentum.cli import main; main()"
MARKS = '''
import os, time
from lightning.pytorch.callbacks import Callback

class Marks(Callback):
    """Seconds from the start of the process to the end of the first step, and of each epoch."""
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 1:
            print(f"\\nMARK first {time.time() - float(os.environ['MARKS_START'])}", flush=True)
    def on_train_epoch_start(self, *_):
        self.start = time.time()
    def on_train_epoch_end(self, *_):
        print(f"\\nMARK epoch {time.time() - self.start}", flush=True)
'''
STEPS = """
import time, torch, torch.nn.functional as F
from vmoe_momentum import create_model
from vmoe_momentum.training import OptimizerSettings
torch.manual_seed(0)
net = create_model("vmoe_tiny_patch4_16", rule="Residual").train()
optimizer, pixels, labels = OptimizerSettings().build(net), torch.randn(32, 3, 16, 16), torch.arange(32) % 10
for step in range(54):
    if step == 10:
        start = time.time()
    logits, aux_loss = net.forward_with_aux(pixels)
    (F.cross_entropy(logits, labels) + aux_loss).backward()
    optimizer.step(), optimizer.zero_grad()
print(f"MARK steps {time.time() - start}")
"""
WHAT = {
    "help": "vmoe-momentum --help, s",
    "mistyped": "a mistyped option of fit, s",
    "first": "fit, to the end of the first step, s",
    "epoch": "an epoch of fit, validation included, s",
    "steps": "44 training steps alone, s",
}


def main(before: str, rounds: int = 3, csv: str | None = None) -> None:
    """Print (and write) medians.

    Args:
        before: Folder of the earlier code.
        rounds: Times that each is run.
        csv: File to write the rows to.
    """
    here = Path(__file__).resolve().parent.parent
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "marks.py").write_text(MARKS)
        run(here, place, ["data", "prepare", "digits", "--out", "data/digits"])
        for _ in track(range(rounds), "rounds"):
            for name, code in (("before", Path(before).resolve()), ("now", here)):
                for what, found in once(code, here, place):
                    seconds[what, name].append(found)
    rows = []
    for what, label in WHAT.items():
        old, new = (median(seconds[what, name]) for name in ("before", "now"))
        rows.append({"what": label, "before": f"{old:.2f}", "now": f"{new:.2f}", "ratio": f"{new / old:.2f}"})
        print(*rows[-1].values(), sep="\t")
    if csv is not None:
        write_rows(Path(csv), rows)


def once(code: Path, here: Path, place: str) -> list[tuple[str, float]]:
    found = []
    for what, arguments in (("help", ["--help"]), ("mistyped", ["fit", "--modle", "x"])):
        start = time.time()
        run(code, place, arguments)
        found.append((what, time.time() - start))
    config = code / "configs" / "digits.yaml"
    fit = ["fit", "--config", str(config), "--trainer.max_epochs=4", "--trainer.callbacks+=marks.Marks"]
    output = run(code, place, fit) + run(code, place, STEPS)
    marks = [(what, float(value)) for what, value in re.findall(r"MARK (\w+) ([\d.]+)", output)]
    warm = [(what, value) for what, value in marks if what == "epoch"][1:]
    return found + [mark for mark in marks if mark[0] != "epoch"] + warm


def run(code: Path, place: str, command: list[str] | str) -> str:
    """`vmoe-momentum` with these arguments, or a script, as this code has it."""
    python = [sys.executable, "-c", MAIN, *command] if isinstance(command, list) else [sys.executable, "-c", command]
    environment = {**os.environ, "PYTHONPATH": f"{code}{os.pathsep}{place}", "MARKS_START": str(time.time())}
    return subprocess.run(python, cwd=place, env=environment, capture_output=True, text=True).stdout


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
