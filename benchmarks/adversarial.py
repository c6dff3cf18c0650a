"""Adversarial training on the digits: what it gains under attack, and what a step of it costs.

    python benchmarks/adversarial.py                      # trains, attacks: benchmarks/results/adversarial.csv and
                                                          # ..._suite.csv; --ways '[clean,PGD]' leaves TRADES out
    python benchmarks/adversarial.py --cost true          # a step, beside a clean one: .../adversarial_cost.csv

Protocol. Clean networks by configs/digits.yaml, attacked ones by configs/digits_adversarial.yaml and the same with
TRADES; Residual and HeavyBall; seeds 0, 1 and 2, which are also those of the data. The last weights count: nothing is
chosen by the held-out pictures but by early stopping, which the recipe has. Then two robustness reports over all: all
360 held-out digits under PGD-20, and 40 of them under six attacks, AutoAttack among them, whose worst case can then be
held against AutoAttack alone; in Linf at 8/255, the budget trained for. Runs that are there are not repeated, and the
reports go on where they stopped.
"""

import csv as csv_files
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonargparse
import torch
from demo import CONFIG, ROOT
from rich.console import Console
from timing import interleaved, write_rows

from vmoe_momentum import cli, create_model
from vmoe_momentum.training import AdversarialSettings, ImageClassifier, OptimizerSettings

RULES, SEEDS, EPS = ("Residual", "HeavyBall"), (0, 1, 2), "8/255"
SUITE = "fgsm,pgd,pma,pgd-routing,fab,autoattack"
ATTACKED = ROOT / "configs" / "digits_adversarial.yaml"
WAYS = {"clean": [CONFIG], "PGD": [ATTACKED], "TRADES": [ATTACKED, "--model.adversarial.method=trades"]}
COSTS = {
    "clean": None, "pgd, 1 step": AdversarialSettings(steps=1), "pgd, 2 steps": AdversarialSettings(steps=2),
    "pgd, 3 steps": AdversarialSettings(steps=3), "pgd, 10 steps": AdversarialSettings(steps=10),
    "trades, 3 steps": AdversarialSettings("trades", steps=3),
}  # fmt: skip


def main(
    csv: str = "benchmarks/results/adversarial.csv",
    data: str = "data/digits",
    out: str = "runs/adversarial",
    cost: bool = False,
    rounds: int = 15,
    processes: int = 1,
    ways: list[str] | None = None,
) -> None:
    """Train and attack what is not there yet.

    Args:
        csv: Rows of the report; with cost the file beside it, ..._cost.csv.
        data: Where the prepared digits are or go.
        out: Folder for logs, checkpoints and the report.
        cost: Time steps instead.
        rounds: Of timing.
        processes: That share the attacks.
        ways: Some of clean, PGD and TRADES; default all.
    """
    cli.quieten()
    path = Path(csv)
    if cost:
        return write_rows(path.with_name(f"{path.stem}_cost.csv"), costs(rounds))
    cli.run(["data", "prepare", "digits", f"--out={data}", "--exist_ok"])
    models = []
    for seed in SEEDS:
        for rule in RULES:
            for way in ways or WAYS:
                checkpoint = train(f"{rule}_{way}_seed{seed}", rule, seed, WAYS[way], data, Path(out))
                models.append(f"--model={rule} {way}={checkpoint}")
    report = Path(out) / "report"
    attack = ["--corruptions=[none]", f"--data={data}", f"--eps=[{EPS}]", f"--out={report}"]
    shared = [f"--processes={processes}", *sorted(models)]
    cli.run(["robustness", *attack, "--attacks=[pgd]", *shared])
    shutil.copy(report / "rows.csv", path)
    few = f"{report}_autoattack"
    cli.run(["robustness", *attack[:-1], f"--out={few}", f"--attacks=[{SUITE}]", "--limit=40", *shared])
    add(path, Path(few) / "rows.csv")
    shutil.copy(Path(few) / "rows.csv", path.with_name(f"{path.stem}_suite.csv"))


def train(name: str, rule: str, seed: int, words: list[object], data: str, out: Path) -> Path:
    """The checkpoint after the last epoch."""
    folder = out / name / "fit"
    last = folder / "checkpoints" / "last.ckpt"
    if not (folder / "done").exists():
        shutil.rmtree(folder, ignore_errors=True)
        Console().rule(name)
        cli.run([
            "fit", f"--config={words[0]}", f"--model.net.init_args.rule={rule}", f"--data.root={data}",
            f"--seed_everything={seed}", f"--data.seed={seed}", *words[1:],
            "--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={out}",
            f"--trainer.logger.name={name}", "--trainer.logger.version=fit", "--trainer.enable_progress_bar=false",
        ])  # fmt: skip
        (folder / "done").touch()
    return last


def add(path: Path, other: Path) -> None:
    """The rows of attacks that are in the other one only."""
    with path.open(newline="") as file:
        rows = list(csv_files.reader(file))
    with other.open(newline="") as file:
        rows += [row for row in csv_files.reader(file) if row[2] == "autoattack"]
    with path.open("w", newline="") as file:
        csv_files.writer(file, lineterminator="\n").writerows(rows)


def costs(rounds: int) -> list[dict[str, object]]:
    """Whole steps of the demo's network on 32 pictures, in turn."""
    torch.manual_seed(0)
    images, labels = torch.rand(32, 3, 16, 16), torch.arange(32) % 10
    found = interleaved({name: step_of(settings, images, labels) for name, settings in COSTS.items()}, rounds)
    return [
        {
            "step": name, "ms": f"{1e3 * timing.seconds:.1f}", "of_clean": f"{timing.ratio:.2f}",
            "low": f"{timing.low:.2f}", "high": f"{timing.high:.2f}",
        }
        for name, timing in found.items()
    ]  # fmt: skip


def step_of(settings: AdversarialSettings | None, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    net = create_model("vmoe_tiny_patch4_16", rule="HeavyBall", num_classes=10)
    module = ImageClassifier(net, 10, 16, adversarial=settings).train()
    optimizer = OptimizerSettings().build(net)

    def step() -> None:
        module.training_losses((images, labels))[0].loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
