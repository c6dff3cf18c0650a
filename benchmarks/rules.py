"""Every overlay of configs/rules trained on the digits, several seeds each; one row a run, kept as it comes.

    python benchmarks/rules.py --csv benchmarks/results/rules.csv

Runs that the CSV already has are not repeated, so it can be stopped and started again. `python benchmarks/tables.py`
puts mean and spread into docs/results.md.
"""

import csv as csv_files
from pathlib import Path

import jsonargparse
from demo import CONFIG, ROOT
from rich.console import Console

from vmoe_momentum import cli
from vmoe_momentum.analysis.logs import read_log

OVERLAYS = sorted(path.stem for path in (ROOT / "configs" / "rules").glob("*.yaml"))
COLUMNS = ("overlay", "seed", "epochs", "top1", "loss", "diverged")


def train(overlay: str, seed: int, data: str, out: Path) -> dict[str, object]:
    """fit, then test the last checkpoint (no selection on the held-out images)."""
    shared = [
        f"--config={ROOT / 'configs' / 'rules' / f'{overlay}.yaml'}",
        f"--data.root={data}",
        f"--seed_everything={seed}",
        f"--data.seed={seed}",
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={out}",
        f"--trainer.logger.name={overlay}_seed{seed}",
        "--trainer.enable_progress_bar=false",
    ]
    folder = out / f"{overlay}_seed{seed}"
    base = [f"--config={CONFIG}", "--data=FolderDataModule"]
    cli.run(["fit", *base, *shared, "--trainer.logger.version=fit"])
    last = folder / "fit" / "checkpoints" / "last.ckpt"
    cli.run(["test", *base, *shared, "--trainer.logger.version=test", f"--ckpt_path={last}"])
    curves, scores = read_log(str(folder / "fit")), read_log(str(folder / "test"))
    loss = scores["test/loss"][-1]
    numbers = {"top1": f"{scores['test/top1'][-1]:.6f}", "loss": f"{loss:.6f}", "diverged": int(loss != loss)}
    return {"overlay": overlay, "seed": seed, "epochs": len(curves["val/top1"]), **numbers}


def done(path: Path) -> set[tuple[str, int]]:
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {(row["overlay"], int(row["seed"])) for row in csv_files.DictReader(file)}


def main(
    csv: str = "benchmarks/results/rules.csv",
    overlays: list[str] | None = None,
    seeds: list[int] | None = None,
    data: str = "data/digits",
    out: str = "runs/rules",
) -> None:
    """Train what the CSV does not have yet.

    Args:
        csv: One row a run is added to it.
        overlays: Names in configs/rules; default all.
        seeds: Default [0, 1, 2].
        data: Where the prepared digits are or go.
        out: Folder for logs and checkpoints.
    """
    unknown = sorted(set(overlays or []) - set(OVERLAYS))
    if unknown:
        raise SystemExit(f"overlays={unknown}: not in configs/rules; valid: {', '.join(OVERLAYS)}")
    cli.quieten()
    cli.run(["data", "prepare", "digits", f"--out={data}", "--exist_ok"])
    path = Path(csv)
    for seed in seeds or [0, 1, 2]:
        for overlay in overlays or OVERLAYS:
            if (overlay, seed) in done(path):
                continue
            Console().rule(f"{overlay}, seed {seed}")
            row, fresh = train(overlay, seed, data, Path(out)), not path.exists()
            with path.open("a", newline="") as file:
                writer = csv_files.DictWriter(file, COLUMNS, lineterminator="\n")
                if fresh:
                    writer.writeheader()
                writer.writerow(row)
            Console().print(row)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
