"""Rules and depth on real English text: perplexity of the demo's language model, clean and with swapped words.

    vmoe-momentum data prepare text --out data/bible     # once; Debian's bible-kjv
    python benchmarks/language.py                        # all that is left: .../language.csv; stop and start it anytime
    python benchmarks/language.py --processes 2          # the same on two cores
    python benchmarks/language.py --step true            # memory and time of one step: .../language_step.csv

Protocol. configs/language/demo.yaml on the King James Bible, as it is split by chapters. Residual, HeavyBall (mu 0.7),
Adam and Robust (the defaults) with 3 sparse blocks, and Adam as the released language code has it (no skip connection
at its layer), which was added once the first row of Adam was there; Residual and HeavyBall with 6 and 12, too; seeds 0,
1 and 2, which are also those of the data; one thread each. The last weights count: nothing is chosen by the test
chapters, and no setting is changed for any rule. The number of epochs was chosen by the validation chapters, on
Residual alone.
Test chapters with 2.5 % of their words swapped (seed 0; <eos> and <unk> stay, the swap
word is <unk>), as the papers have it: attacked inputs and targets; and beside it the targets before the attack. Two
trigrams of the same text, interpolated Kneser-Ney and add-k with the k of 1, 0.1, 0.01 and 0.001 that is best on the
validation chapters. Runs are made seed by seed, so that what is there is balanced.
"""

import csv as csv_files
import shutil
import subprocess
import sys
from pathlib import Path

import jsonargparse
import torch
from evidence_rows import ROOT, provenance
from ngram import KneserNey, add_k
from rich.console import Console

from vmoe_momentum import cli
from vmoe_momentum.datasets import TextDataModule
from vmoe_momentum.files.staging import draft_of
from vmoe_momentum.robustness.claims import Claims
from vmoe_momentum.stopping import Stopped, stoppable

CONFIG = ROOT / "configs" / "language" / "demo.yaml"
RELEASED = "Adam, released"
RULES = {rule: [f"--model.net.init_args.rule={rule}"] for rule in ("Residual", "HeavyBall", "Adam", "Robust")}
RULES[RELEASED] = [f"--config={ROOT / 'configs' / 'rules' / 'adam_released.yaml'}"]
CELLS = [*((rule, 3) for rule in RULES),
         *((rule, depth) for depth in (6, 12) for rule in ("Residual", "HeavyBall"))]  # fmt: skip
SEEDS, SWAP = (0, 1, 2), 0.025
SCORES = {
    "clean": "test/perplexity", "clean_low": "test/perplexity_low", "clean_high": "test/perplexity_high",
}  # fmt: skip
SWAPPED = {"swapped": "test/perplexity", "swapped_inputs_only": "test/perplexity_of_clean_targets"}
COLUMNS = ("model", "depth", "seed", "epochs", "valid", *SCORES, *SWAPPED, "threads", "machine", "torch", "revision")
Row = dict[str, str]


def main(
    csv: str = "benchmarks/results/language.csv",
    data: str = "data/bible",
    out: str = "runs/language",
    processes: int = 1,
    step: bool = False,
    fit: list[str] | None = None,
) -> None:
    """Train and test what has no row yet.

    Args:
        csv: The rows.
        data: Where the prepared text is.
        out: Folder for logs and checkpoints.
        processes: That share the runs, one thread each. 0: a helper.
        step: Measure one training step of smoe_lm_medium at full vocabulary instead.
        fit: More options of fit, for trying things.
    """
    cli.quieten()
    path = Path(csv)
    if step:
        from language_step import measure

        return measure(path.with_name(f"{path.stem}_step.csv"))
    if not Path(data).is_dir():
        raise FileNotFoundError(f"--data={data}: no such folder; vmoe-momentum data prepare text --out {data}")
    torch.set_num_threads(1)
    made = provenance()
    helpers = [subprocess.Popen([sys.executable, *sys.argv, "--processes=0"]) for _ in range(processes - 1)]
    with Claims(Path(out)) as claims:
        if claims.take("trigrams") and not any(row["model"].endswith("trigram") for row in read(path)):
            for row in trigrams(data):
                add(path, row | made, claims)
        for seed in SEEDS:
            for rule, depth in CELLS:
                key, name = (rule, str(depth), str(seed)), f"{rule.replace(', ', '_')}_depth{depth}_seed{seed}"
                if key in done(path) or not claims.take(name):
                    continue
                Console().rule(name)
                add(path, run(Path(out) / name, rule, depth, seed, data, fit or []) | made, claims)
    for helper in helpers:
        helper.wait()


def run(folder: Path, rule: str, depth: int, seed: int, data: str, more: list[str]) -> Row:
    """From the start, unless an earlier attempt got through training."""
    last = folder / "fit" / "checkpoints" / "last.ckpt"
    shared = [f"--config={CONFIG}", *RULES[rule], f"--model.net.init_args.depth={depth}", f"--data.root={data}"]
    shared += [f"--seed_everything={seed}", "--trainer.enable_progress_bar=false", "--trainer.callbacks=[]", *more]
    if not (folder / "trained").exists():
        shutil.rmtree(folder, ignore_errors=True)
        saver = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
                 f"--trainer.callbacks.dirpath={last.parent}", "--trainer.callbacks.filename=last"]  # fmt: skip
        cli.run(["fit", *shared, f"--data.seed={seed}", *saver, *logged(folder, "fit")])
        (folder / "trained").touch()
    tested = ["test", *shared, f"--ckpt_path={last}"]
    cli.run([*tested, *logged(folder, "clean")])
    cli.run([*tested, f"--data.word_swap={SWAP}", *logged(folder, "swapped")])
    trained, clean, swapped = (scores(folder / name) for name in ("fit", "clean", "swapped"))
    found = {name: clean[metric] for name, metric in SCORES.items()}
    found |= {name: swapped[metric] for name, metric in SWAPPED.items()}
    row = {name: f"{value:.4f}" for name, value in found.items()} | {"valid": f"{trained['val/perplexity']:.4f}"}
    return row | {"model": rule, "depth": str(depth), "seed": str(seed), "epochs": f"{trained['epoch'] + 1:.0f}"}


def logged(folder: Path, version: str) -> list[str]:
    logger = "--trainer.logger=lightning.pytorch.loggers.CSVLogger"
    return [logger, f"--trainer.logger.save_dir={folder.parent}", f"--trainer.logger.name={folder.name}",
            f"--trainer.logger.version={version}"]  # fmt: skip


def scores(folder: Path) -> dict[str, float]:
    """The last values of a log."""
    found: dict[str, float] = {}
    with (folder / "metrics.csv").open(newline="") as file:
        for row in csv_files.DictReader(file):
            found |= {name: float(value) for name, value in row.items() if value}
    return found


def trigrams(data: str) -> list[Row]:
    """Of the training chapters, on the test chapters, clean and with swapped words."""
    clean, swapped = TextDataModule(data), TextDataModule(data, word_swap=SWAP, eval_batch_size=1)
    train, valid, test = (clean.words(split).tolist() for split in ("train", "valid", "test"))
    attacked = torch.cat([batch.targets for batch in swapped.test_dataloader()], dim=1)[0].tolist()
    eos, size = clean.vocabulary.index("<eos>"), clean.vocab_size
    best = min((1.0, 0.1, 0.01, 0.001), key=lambda k: add_k(train, valid, size, eos, k))
    models = {
        "Kneser-Ney trigram": KneserNey(train, size, eos).perplexity,
        f"add-{best:g} trigram": lambda words: add_k(train, words, size, eos, best),
    }
    rows = []
    for name, perplexity in models.items():
        found = {"valid": valid, "clean": test, "swapped": attacked}
        rows.append({"model": name} | {key: f"{perplexity(words):.4f}" for key, words in found.items()})
    return rows


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv_files.DictReader(file))


def done(path: Path) -> set[tuple[str, str, str]]:
    return {(row["model"], row["depth"], row["seed"]) for row in read(path)}


def add(path: Path, row: Row, claims: Claims) -> None:
    """Into its place, whole or not at all."""
    claims.wait_for("rows", seconds=600)
    order = [(rule, str(depth)) for rule, depth in CELLS]
    rows = [*read(path), dict.fromkeys(COLUMNS, "") | row]
    rows.sort(key=lambda r: (r["seed"], order.index((r["model"], r["depth"])) if r["depth"] else -1, r["model"]))
    with draft_of(path) as file:
        lines = [COLUMNS, *([row[name] for name in COLUMNS] for row in rows)]
        file.write("".join(",".join(f'"{c}"' if "," in c else c for c in line) + "\n" for line in lines).encode())
    claims.give_back("rows")


if __name__ == "__main__":
    try:
        with stoppable():
            jsonargparse.auto_cli(main)
    except Stopped:
        print("stopped; the same command goes on with what is left", file=sys.stderr)
        raise SystemExit(130) from None
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"language: {error}") from None
