"""Rows of benchmarks/evidence.py: one a run, whole or not there, and what made them."""

import csv
import io
import math
import platform
import subprocess
from pathlib import Path

import torch
from evidence_arms import GAMMAS, Arm, Cell

import vmoe_momentum
from vmoe_momentum.files.staging import draft_of

ROOT = Path(__file__).parent.parent
CODE = ("benchmarks", "configs", "vmoe_momentum", "constraints.txt", "setup.cfg")
INSIDE = tuple(
    f"inside_at_{gamma:g}" for gamma in GAMMAS
)  # share of eigenvalues inside the rule's region at that gamma
RANKS = tuple(f"chosen_rank_{rank}" for rank in (1, 2, 3, 4))  # of the output norm, 1 the largest; the four experts
MEASURED = (
    "top1", "nll", "ece", "rms_calibration_error", "corrupted_top1", "pgd_2", "pgd_8", "square_2", "square_8",
    "epochs_to_85", "epochs_to_88", "epochs_to_90", "train_loss", "load_cv", "load_entropy", *RANKS,
    "routing_change", "class_change", "share_residual", "share_rule", "largest_s", "growth", "cosine", *INSIDE,
)  # fmt: skip
MADE = ("seconds", "cpu_seconds", "threads", "machine", "torch", "revision")
COLUMNS = ("part", "arm", "seed", "rule", "post_norm", "gamma", "depth", "diverged", *MEASURED, *MADE)
REPEATED = ("diverged", *MEASURED)  # what a second run of the same cell must give again

CELL = ("arm", "seed")  # what tells rows apart
AGAIN = (*CELL, "machine", "torch", "revision")  # what tells repeated runs apart

Row = dict[str, str]


def read_rows(path: Path, key: tuple[str, ...] = CELL) -> list[Row]:
    """Raises ValueError: columns that are not ours, a cell that is there twice."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS or any(None in (*row, *row.values()) for row in rows):
        raise ValueError(
            f"{path}: its columns are not those of the protocol, or a row is cut off; put it back from git"
        )
    keys = [tuple(row[name] for name in key) for row in rows]
    if len(set(keys)) < len(keys):
        raise ValueError(f"{path}: {next(key for key in keys if keys.count(key) > 1)} is there twice; keep one of them")
    return rows


def add_row(path: Path, row: Row, order: list[Cell], key: tuple[str, ...] = CELL) -> None:
    """Into its place: seed by seed, arms in the protocol's order. Stopped at any time, the file is as before or after.

    Whoever calls it keeps other processes from doing the same.
    """
    places = {(cell.arm.name, str(cell.seed)): place for place, cell in enumerate(order)}
    rows = [old for old in read_rows(path, key) if any(old[name] != row[name] for name in key)]
    rows = sorted([*rows, row], key=lambda each: places.get((each["arm"], each["seed"]), len(places)))
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with draft_of(path) as file:
        file.write(text.getvalue().encode())


def make_row(cell: Cell, diverged: str, measured: dict[str, float | int | None], made: dict[str, str]) -> Row:
    """diverged: "" or where it became not finite. Six digits, enough to tell one of 10,000 pictures."""
    arm = cell.arm
    row = dict.fromkeys(COLUMNS, "")
    row |= {"part": arm.part, "arm": arm.name, "seed": str(cell.seed), "rule": rule_of(arm), "diverged": diverged}
    row |= {"post_norm": str(int(arm.post_norm)), "depth": str(arm.depth)}
    row["gamma"] = "" if arm.gamma is None else f"{arm.gamma:g}"
    row |= {name: written(value) for name, value in measured.items()}
    return row | made


def rule_of(arm: Arm) -> str:
    return "dense" if arm.rule is None else arm.rule["class_path"]


def written(value: float | int | None) -> str:
    return "" if value is None or (isinstance(value, float) and not math.isfinite(value)) else f"{value:.6g}"


def value_of(row: Row, name: str) -> float:
    """NaN where it was not measured."""
    return float(row[name]) if row[name] else math.nan


def provenance(commit: str | None = None) -> dict[str, str]:
    """What is the same for all runs of a process. commit: of the code, asked of git where it is None.

    Raises ValueError: the package is another checkout's.
    """
    imported = Path(vmoe_momentum.__file__).resolve().parents[1]
    if imported != ROOT.resolve():
        raise ValueError(
            f"vmoe_momentum is imported from {imported}, and rows would name the code of {ROOT}; set PYTHONPATH={ROOT}"
        )
    return {
        "threads": str(torch.get_num_threads()), "machine": f"{processor()}, {platform.machine()}",
        "torch": torch.__version__, "revision": commit or revision(),
    }  # fmt: skip


def processor() -> str:
    """Its kind: sums are added in an order that depends on it, and names alone ("AMD EPYC") do not tell it."""
    vectors = torch.backends.cpu.get_cpu_capability()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.processor() or 'unknown'} {vectors}"
    said = {name.strip(): told.strip() for name, _, told in (line.partition(":") for line in lines)}
    kind = "".join(f" {name} {said[name]}" for name in ("cpu family", "model") if name in said).replace("cpu ", "")
    return f"{said.get('model name', 'unknown')}{kind} {vectors}"


def revision() -> str:
    """The commit of the code, with a + where files that decide a run differ from it; "unknown" outside of git."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD").strip()
        changed = _git("status", "--porcelain", "--", *CODE, ":!benchmarks/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+" if changed.strip() else "")


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
