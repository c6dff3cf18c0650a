"""AutoAttack, stage by stage, so that what it has found outlives its process."""

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .budget import Budget
from .registry import CE, DLR, INSIDE, MARGIN, attack, load_package


@attack(
    "Linf", "L2", package="pyautoattack", min_classes=4, not_in_l2=(1, 2, 3, 4, 12, 14, 18, 19, 24),
    loss=f"{CE}; targeted {DLR}; distance to the boundary (FAB-T); {MARGIN} (Square)",
    step="of each of its four attacks: 100 steps, 9 targets, 5,000 queries", start=f"{INSIDE}, of each attack",
    passes=3 * 100 * (1 + 9 + 9) + 5000, parts=True,
)  # fmt: skip
def autoattack(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """The standard AutoAttack: APGD-CE, APGD-T, FAB-T, Square (Croce and Hein, arXiv:2003.01690).

    It targets the 9 classes next in line, all others where they are fewer; its targeted loss is not defined on fewer
    than 4 classes. It has its own steps and queries: those of `budget` change nothing.
    """
    package = load_package("pyautoattack")
    with torch.no_grad():
        logits = model(images)
    options = {"norm": budget.norm, "eps": budget.eps, "device": images.device, "seed": budget.seed}
    ensemble = package.AutoAttack(model, version="standard", **options)
    for targeted in (ensemble.apgd_targeted, ensemble.fab):
        targeted.n_target_classes = min(9, logits.shape[1] - 1)
    begun = {} if budget.stages is None else budget.stages.load()
    found = begun.get("found", images).to(images.device)
    standing = begun.get("standing", logits.argmax(dim=1) == labels).to(images.device)
    shares = begun.get("shares", standing.double().mean()[None]).tolist()  # that stand, before and after each stage
    for name in ensemble.attacks_to_run[len(shares) - 1 :]:
        if not bool(standing.any()):
            break
        found, standing = _run_stage(ensemble, name, images, labels, found, standing)
        shares.append(float(standing.double().mean()))
        if budget.stages is not None:
            budget.stages.keep({"found": found, "standing": standing, "shares": torch.tensor(shares).double()})
    told = dict(zip(("clean", *ensemble.attacks_to_run), shares, strict=False))
    importlib.import_module(f"{package.__name__}.checks").check_square_sr(told, logger=ensemble.logger)
    return found


def _run_stage(
    ensemble: Any, name: str, images: Tensor, labels: Tensor, found: Tensor, standing: Tensor
) -> tuple[Tensor, Tensor]:
    """One of the ensemble's attacks on what stands, by its own way to go on: what is found and what stands then.

    Its file holds which images stand, not what was found of the others, so that both are carried here. Each of its
    attacks seeds its own random numbers, so that one by one they find what they find in one go.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.json"
        state = importlib.import_module("pyautoattack.state").EvaluationState({name}, path=path)
        state.robust_flags = standing
        whole, ensemble.attacks_to_run = ensemble.attacks_to_run, [name]
        made = ensemble.run_standard_evaluation(images, labels, batch_size=len(images), state_path=path)[0]
        ensemble.attacks_to_run = whole
        after = type(state).from_disk(path).robust_flags.to(images.device)
    fell = standing & ~after
    return torch.where(fell.view(-1, 1, 1, 1), made, found), after
