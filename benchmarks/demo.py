"""The demo: Residual and HeavyBall trained alike on real digit images; how well, and how robust, side by side.

    python benchmarks/demo.py                                                     # one seed, six minutes
    python benchmarks/demo.py --seeds '[0,1,2]' --csv benchmarks/results/digits.csv   # the table of docs/results.md

Everything is done by the same commands a user types: `vmoe-momentum data prepare`, `fit`, `test` and `robustness`.
"""

import csv
import statistics
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jsonargparse
import matplotlib
import matplotlib.ticker
import torch
from rich.console import Console
from rich.table import Table

from vmoe_momentum import cli
from vmoe_momentum.analysis.logs import read_log

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / "configs" / "digits.yaml"
RULES = ("Residual", "HeavyBall")
COLORS = dict(zip(RULES, ("tab:blue", "tab:orange"), strict=True))


class Run(NamedTuple):
    """One training run: curves over epochs, and the last checkpoint's score on the held-out images."""

    rule: str
    seed: int
    backend: str
    epochs: int
    top1: float
    loss: float
    seconds_per_epoch: float  # median, validation not counted
    curves: dict[str, list[float]]  # metric -> value per epoch
    load: dict[str, list[float]]  # block -> share of assignments per expert, on the held-out images
    folder: Path


def train(rule: str, seed: int, backend: str, root: Path, out: Path, extra: list[str]) -> Run:
    """fit, then test the last checkpoint (no selection on the held-out images)."""
    name = f"{rule}_seed{seed}"
    shared = [
        f"--config={CONFIG}",
        f"--data={backend}",
        f"--data.root={root}",
        f"--seed_everything={seed}",
        f"--data.seed={seed}",
        f"--model.net.init_args.rule={rule}",
        f"--trainer.logger.save_dir={out}",
        *extra,
    ]
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.name={name}"]
    fit = [*shared[:1], *logger, "--trainer.logger.version=fit", *shared[1:]]
    cli.run(["fit", *fit])
    folder = out / name / "fit"
    test = [*shared[:1], *logger, "--trainer.logger.version=test", *shared[1:]]
    cli.run(["test", *test, f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"])
    curves, scores = read_log(str(folder)), read_log(str(out / name / "test"))
    load: dict[str, list[float]] = defaultdict(list)
    for key, values in scores.items():
        if "/load_" in key:
            load[key.split("/")[1]].append(values[-1])
    return Run(
        rule,
        seed,
        backend,
        len(curves["val/top1"]),
        scores["test/top1"][-1],
        scores["test/loss"][-1],
        statistics.median(curves["train/epoch_seconds"]),
        curves,
        dict(load),
        folder,
    )


def table(runs: list[Run]) -> Table:
    """One row a run; expert load is the share of each expert, a line per MoE block."""
    grid = Table(title="Digits: 1,437 images to train, 360 held out; last epoch", show_lines=True)
    for column in ("rule", "seed", "top-1 (%)", "loss", "s / epoch", "expert load (%)"):
        grid.add_column(column, no_wrap=True)
    for run in runs:
        load = [f"{block}: " + " ".join(f"{100 * share:.0f}" for share in run.load[block]) for block in run.load]
        numbers = [f"{100 * run.top1:.2f}", f"{run.loss:.3f}", f"{run.seconds_per_epoch:.2f}"]
        grid.add_row(run.rule, str(run.seed), *numbers, "\n".join(load))
    return grid


def picture(runs: list[Run], path: Path) -> None:
    """Training loss, held-out top-1 and expert load of the first seed's runs."""
    figure, (loss, top1, load) = plt.subplots(1, 3, figsize=(15, 4.2), width_ratios=(1, 1, 1.3), layout="constrained")
    for run in runs:
        epochs = range(1, run.epochs + 1)
        label = run.rule if run.seed == runs[0].seed else None
        style = {"color": COLORS[run.rule], "alpha": 1.0 if label else 0.35, "label": label}
        loss.plot(epochs, run.curves["train/loss_epoch"], **style)
        top1.plot(epochs, [100 * value for value in run.curves["val/top1"]], **style)
    loss.set(title="Training loss", xlabel="epoch", ylabel="cross-entropy + auxiliary loss", yscale="log")
    top1.set(title="Top-1 on 360 held-out images", xlabel="epoch", ylabel="%", ylim=(0, 101))
    top1.axhline(96, color="grey", linewidth=0.8, linestyle=":")
    first = [run for run in runs if run.seed == runs[0].seed]
    for offset, run in zip((-0.2, 0.2), first, strict=True):
        for place, shares in enumerate(run.load.values()):
            bottom = 0.0
            for expert, share in enumerate(shares):
                tone = {"color": COLORS[run.rule], "alpha": 0.3 + 0.7 * expert / max(1, len(shares) - 1)}
                load.bar(place + offset, 100 * share, 0.36, bottom=100 * bottom, edgecolor="white", **tone)
                bottom += share
    num_experts = len(next(iter(first[0].load.values())))
    for expert in range(1, num_experts):
        load.axhline(100 * expert / num_experts, color="black", linewidth=0.6, linestyle=":")
    load.set(title="Expert load (dotted: balanced)", ylabel="% of assignments, experts stacked", ylim=(0, 100))
    load.set_xticks(range(len(first[0].load)), list(first[0].load))
    for axis in (loss, top1):
        axis.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    loss.legend()
    top1.legend(loc="lower right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


# All 15 corruptions and severities, FGSM and both PGDs on all images, Square with few queries on a hundred of them.
ROBUSTNESS = ("--queries=200", "--query_images=100", "--batch_size=120")


def robustness(runs: list[Run], data: Path, out: Path, extra: list[str]) -> None:
    """The report over all runs; the seeds of a rule are a group."""
    models = [f"--model={run.rule}={run.folder / 'checkpoints' / 'last.ckpt'}" for run in runs]
    cli.run(["robustness", *models, f"--data={data}", f"--out={out}", *ROBUSTNESS, *extra])


def write_rows(runs: list[Run], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["rule", "seed", "backend", "epochs", "top1", "loss", "seconds_per_epoch", "threads"])
        for run in runs:
            numbers = [f"{run.top1:.6f}", f"{run.loss:.6f}", f"{run.seconds_per_epoch:.3f}", torch.get_num_threads()]
            writer.writerow([run.rule, run.seed, run.backend, run.epochs, *numbers])


def main(
    seeds: list[int] | None = None,
    data: str = "data/digits",
    out: str = "runs/demo",
    csv: str | None = None,
    max_epochs: int | None = None,
    limit: int | None = None,
) -> None:
    """Train both rules, print a table, write a picture and a robustness report.

    Args:
        seeds: One pair of runs for each; default [0].
        data: Where the prepared digits are or go.
        out: Folder for logs, checkpoints, digits.csv and digits.png.
        csv: Another place to write the rows to.
        max_epochs: Fewer epochs, for a look.
        limit: Fewer images in the robustness report, for a look.
    """
    console, backend = Console(), "FFCVDataModule"
    if find_spec("ffcv") is None:
        backend = "FolderDataModule"
        console.print("ffcv is not installed: the folder backend reads the same images (make setup says how to add it)")
    cli.quieten()
    cli.run(["data", "prepare", "digits", f"--out={data}", "--exist_ok"])
    extra = [] if max_epochs is None else [f"--trainer.max_epochs={max_epochs}"]
    runs = []
    for seed in seeds or [0]:
        for rule in RULES:
            console.rule(f"{rule}, seed {seed}")
            runs.append(train(rule, seed, backend, Path(data), Path(out), extra))
    folder = Path(out)
    picture(runs, folder / "digits.png")
    write_rows(runs, folder / "digits.csv")
    if csv is not None:
        write_rows(runs, Path(csv))
    console.print(table(runs))
    console.rule("Robustness")
    robustness(runs, Path(data), folder / "robustness", [] if limit is None else [f"--limit={limit}"])
    for what, path in (
        ("robustness", folder / "robustness" / "report.html"),
        ("picture", folder / "digits.png"),
        ("rows", folder / "digits.csv"),
        *((f"{run.rule}, seed {run.seed}: logs and checkpoints", run.folder) for run in runs),
        ("data", Path(data)),
    ):
        console.print(f"[bold]{what}[/bold]  {path}", soft_wrap=True, highlight=False)
    export = f"vmoe-momentum export --ckpt_path {runs[-1].folder} --to onnx --out exported/demo --data {data}"
    console.print(f"[bold]to export {runs[-1].rule}[/bold]  .venv/bin/{export}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
