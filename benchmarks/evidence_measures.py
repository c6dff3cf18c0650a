"""What is measured of a trained network: everything through vmoe_momentum.robustness and vmoe_momentum.analysis."""

import csv
import shutil
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from evidence_arms import GAMMAS, ON_GPU, Arm
from evidence_rows import INSIDE, RANKS
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import binary_calibration_error

from vmoe_momentum.analysis import Files, load, norms, open_subjects, sensitivity, spectral_radius, spectrum
from vmoe_momentum.analysis.compare import compare
from vmoe_momentum.analysis.logs import read_log
from vmoe_momentum.classifiers import open_models
from vmoe_momentum.files.staging import staged
from vmoe_momentum.momentum import MomentumRule
from vmoe_momentum.robustness import BENCHMARK, SEVERITIES, Model, Settings, corrupt, make_plan
from vmoe_momentum.robustness.evaluate import Evaluation, evaluate
from vmoe_momentum.robustness.labels import list_folders
from vmoe_momentum.robustness.pictures import batches, subset
from vmoe_momentum.robustness.summary import make_rows
from vmoe_momentum.specs import from_spec

# Of the 10,000 held-out pictures, the same ones for every run; clean accuracy, NLL and ECE are of all of them.
PICTURES = {"corrupted": 300, "attacked": 150, "square": 60, "instruments": 256}
EPS, STEPS, QUERIES, NOISE = (2, 8), 20, 100, 16.0  # eps and the noise's standard deviation: of 255
TOKENS, TOKENS_ON_GPU = 64, 2  # whose eigenvalues are found, a block; at width 512 each takes a second
BINS = 15  # of the expected calibration error
TARGETS = {"epochs_to_85": 0.85, "epochs_to_88": 0.88, "epochs_to_90": 0.90}
BATCH = 150
WHOLE = ("main", *ON_GPU)  # parts whose answers and attacks are measured, too
Found = dict[str, float | int | None]


def make_corrupted(data: Path, out: Path) -> None:
    """OUT: the 75 corruptions of PICTURES["corrupted"] held-out pictures, in folders like ImageNet-C's; made once.

    The same pixels as `vmoe-momentum robustness --data` makes anew for each run.
    """
    if (out / "made").exists():
        return
    paths = held_out(data, PICTURES["corrupted"])
    with staged(out, False, "made") as folder:
        for path in paths:
            pixels, key = np.asarray(Image.open(path).convert("RGB")), f"{path.parent.name}/{path.name}"
            for name in BENCHMARK:
                for severity in SEVERITIES:
                    place = folder / name / str(severity) / path.parent.name
                    place.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(corrupt(pixels, name, severity, 0, key)).save(place / f"{path.stem}.png")
        (folder / "made").write_text(f"{len(paths)}\n")


def held_out(data: Path, count: int) -> list[Path]:
    """So many, drawn as `robustness --limit` draws them with seed 0."""
    paths = [path for found in list_folders(data, "--data").values() for path in found]
    return [paths[number] for number in subset(len(paths), count, 0)]


def measure(arm: Arm, folder: Path, data: Path, corrupted: Path, device: str) -> Found:
    """Of the run in `folder`. Raises ValueError: answers that are not finite (it is in the message)."""
    checkpoint, out = folder / "fit" / "checkpoints" / "last.ckpt", folder / "measures"
    found = training(arm, folder / "fit", out)
    model = open_models([f"{arm.name}={checkpoint}"])[0]
    if arm.part in WHOLE:
        found |= clean(model, data, out, device) | corruptions(model, corrupted, out, device)
        found |= attacks(model, data, out, device)
    if arm.rule is not None:
        found |= instruments(arm, f"{arm.name}={checkpoint}", model, data, out, device)
    return found


def training(arm: Arm, log: Path, out: Path) -> Found:
    """From what fit logged; the last validation is of the last weights, on all held-out pictures."""
    columns = read_log(str(log))
    found: Found = {"top1": columns["val/top1"][-1], "nll": columns["val/loss"][-1]}
    found["train_loss"] = columns["train/loss_epoch"][-1]
    if arm.part in WHOLE:
        rows = compare([f"{arm.name}={log}"], list(TARGETS.values()), fresh(out, "compare"))
        found |= {name: row.epochs for name, row in zip(TARGETS, rows, strict=True)}
    return found


def clean(model: Model, data: Path, out: Path, device: str) -> Found:
    evaluation = run(Settings(data=str(data), corruptions=(), attacks=(), regenerate=False), model, out, device)
    outcome = evaluation.outcomes[model.name, 0]
    confidence, correct = torch.from_numpy(outcome.confidence), torch.from_numpy(outcome.correct).int()
    rows = {row.metric: row.value for row in make_rows(evaluation)}
    ece = float(binary_calibration_error(confidence, correct, n_bins=BINS, norm="l1"))  # of the predicted class
    return {"ece": ece, "rms_calibration_error": rows["rms_calibration_error"]}


def corruptions(model: Model, corrupted: Path, out: Path, device: str) -> Found:
    settings = Settings(sets={"imagenet_c": str(corrupted)}, attacks=(), regenerate=False)
    rows = make_rows(run(settings, model, out, device))
    (value,) = [row.value for row in rows if (row.condition, row.metric) == ("15 corruptions", "top1")]
    return {"corrupted_top1": value}


def attacks(model: Model, data: Path, out: Path, device: str) -> Found:
    settings = Settings(
        data=str(data), corruptions=(), regenerate=False, attacks=("pgd", "square"), eps=tuple(e / 255 for e in EPS),
        steps=STEPS, queries=QUERIES, query_images=PICTURES["square"], limit=PICTURES["attacked"],
    )  # fmt: skip
    rows = make_rows(run(settings, model, out, device))
    robust = {(row.condition, row.severity_or_eps): row.value for row in rows if row.metric == "robust_top1"}
    names = {"pgd": f"pgd-{STEPS}", "square": f"square-{QUERIES}q"}
    return {f"{short}_{eps}": robust[name, str(eps)] for short, name in names.items() for eps in EPS}


def run(settings: Settings, model: Model, out: Path, device: str) -> Evaluation:
    return evaluate(make_plan(settings, [model]), [model], out, batch_size=BATCH, device=device)


def instruments(arm: Arm, subject: str, model: Model, data: Path, out: Path, device: str) -> Found:
    """Means over blocks, but for the largest |s|, the largest of all."""
    images, subjects = shown(model, data), open_subjects([subject], lambda saved: None)
    loads = load(subjects, images, fresh(out, "load"), device)
    ranks = [mean(row.value for row in loads if (row.metric, row.index) == ("load_by_norm", i)) for i in range(4)]
    moved = sensitivity(subjects, images, fresh(out, "sensitivity"), [NOISE], device)
    sizes = norms(subjects, images, fresh(out, "norms"), device=device)
    streams = [row.mean for row in sizes if row.metric == "token_norm"]
    tokens = TOKENS_ON_GPU if arm.part in ON_GPU else TOKENS
    blocks = spectrum(subjects, images, fresh(out, "spectrum"), tokens=tokens, device=device)
    own = [row.share_rule for row in blocks if row.share_rule is not None]  # none where the step is not linear
    found: Found = {
        "load_cv": mean(row.value for row in loads if row.metric == "cv"),
        "load_entropy": mean(row.value for row in loads if row.metric == "entropy"),
        "routing_change": mean(row.value for row in moved if row.metric == "routing_change"),
        "class_change": mean(row.value for row in moved if row.metric == "class_change"),
        "growth": streams[-1] / streams[0],  # of the stream, from the first sparse block to the last
        "cosine": mean(row.mean for row in sizes if row.metric == "cosine"),
        "share_residual": mean(row.share_residual for row in blocks),
        "share_rule": mean(own) if own else None,
        "largest_s": max(row.largest for row in blocks),
    }
    found |= dict(zip(RANKS, ranks, strict=True))
    return found | (inside(arm, out / "spectrum_eigenvalues.csv") if arm.part == "margin" else {})


def inside(arm: Arm, path: Path) -> Found:
    """The share of this network's eigenvalues sigma inside the region that its rule has at each gamma.

    Of the networks trained with gamma 1 that is what the theory says of the others beforehand.
    """
    with path.open(newline="") as file:
        kept = [row for row in csv.DictReader(file) if row["layer_norm_zero"] == "0"]
    sigma = torch.tensor([complex(float(row["real"]), float(row["imag"])) for row in kept], dtype=torch.complex128)
    own = from_spec(arm.rule, MomentumRule, "rule")
    radii = [spectral_radius(own, 1, {**own.coefficients(), "gamma": gamma}, sigma) for gamma in GAMMAS]
    return {name: float((radius < 1).double().mean()) for name, radius in zip(INSIDE, radii, strict=True)}


def shown(model: Model, data: Path) -> list[Tensor]:
    """uint8 [B, 3, H, W] each, as the model is shown them."""
    settings = Settings(data=str(data), corruptions=(), attacks=(), regenerate=False, limit=PICTURES["instruments"])
    pictures = make_plan(settings, [model])[0].pictures
    return [batch.views[model.view] for batch in batches(pictures, [model.view], BATCH // 2, workers=0)]


def fresh(out: Path, name: str) -> Files:
    """What an earlier, stopped attempt wrote is replaced."""
    return Files(str(out), name, overwrite=True)


def forget(out: Path) -> None:
    """Pictures and answers of a run whose row is written."""
    shutil.rmtree(out, ignore_errors=True)
