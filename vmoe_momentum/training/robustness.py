"""Robust accuracy at validation, and a short robustness report at the end of `test`, by a callback."""

import math
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from ..ranges import COUNT, Range, in_range
from ..robustness import (
    Budget,
    Model,
    Settings,
    View,
    check_settings,
    describe_pictures,
    make_plan,
    parse_eps,
    write_report,
)
from ..robustness.asked import Norm
from ..robustness.attacks import evaluated, step_size
from ..robustness.evaluate import evaluate
from ..robustness.versions import versions
from .adversarial import attacked, in_pixels
from .losses import classification_loss
from .trainers import data_of


@in_range(
    "RobustnessCheck.", severities=Range(1, 5, whole=True), limit=COUNT.or_(None), batch_size=COUNT, val_steps=COUNT,
    val_limit=COUNT.or_(None),
)  # fmt: skip
class RobustnessCheck(Callback):
    """After `test`: clean, a few regenerated corruptions and FGSM on the same pictures, logged and written to disk.

    Add it with --trainer.callbacks+=RobustnessCheck. Rows are logged as test/robustness/<condition>_<severity>/<metric>
    and lie, with a page to look at, in the log folder's `robustness`. The whole benchmark: vmoe-momentum robustness.

    With val_eps also at each validation: `val/robust_top1`, the share of pictures that are right before and after a
    projected-gradient attack from a random start. Robust accuracy overfits long before clean accuracy does
    (arXiv:2002.11569), so ModelCheckpoint and EarlyStopping are to watch it in adversarial training.

    Args:
        corruptions: Names of ImageNet-C's corruptions.
        severities: 1 to 5.
        eps: Budgets of FGSM in pixels of [0, 1], such as 1/255; empty for none.
        limit: Pictures, 1 to 1e9, the same ones every time; null for all.
        batch_size: Pictures at once, 1 to 1e9.
        val_eps: Budget at validation in pixels of [0, 1], such as 4/255, in (0, 1], in L2 up to 1e6; null for none.
        val_norm: Of that budget.
        val_steps: Of that attack, 1 to 1e9.
        val_limit: Validation pictures attacked, 1 to 1e9, the first ones; null for all.
    """

    def __init__(
        self,
        corruptions: list[str] = ["gaussian_noise", "motion_blur", "fog", "contrast"],  # noqa: B006  (jsonargparse reads it)
        severities: list[int] = [3],  # noqa: B006
        eps: list[float | str] = ["1/255"],  # noqa: B006
        limit: int | None = 1000,
        batch_size: int = 64,
        val_eps: float | str | None = None,
        val_norm: Norm = "Linf",
        val_steps: int = 10,
        val_limit: int | None = 1000,
    ) -> None:
        attacks = ("fgsm",) if eps else ()
        self.batch_size = batch_size
        budgets = tuple(parse_eps(text) for text in eps)
        self.settings = Settings(
            corruptions=tuple(corruptions), severities=tuple(severities), attacks=attacks, eps=budgets, limit=limit
        )
        check_settings(self.settings)
        self.val_limit = val_limit
        self.val_attack = None
        if val_eps is not None:
            self.val_attack = Budget(in_pixels(val_eps, val_norm, "RobustnessCheck.val_eps"), val_norm, val_steps)

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.val_attack is None or trainer.sanity_checking:
            return
        images, labels = batch
        if self.val_limit is not None:  # all ranks attack in as many batches: sharded weights make them wait
            left = math.ceil(self.val_limit / trainer.world_size) - batch_idx * data_of(trainer).eval_batch_size
            images, labels = images[: max(left, 0)], labels[: max(left, 0)]
        if not len(images):
            return
        with trainer.precision_plugin.forward_context():
            robust = robust_share(pl_module, images, labels, self.val_attack, seed=batch_idx)
        getattr(trainer.strategy, "reshard", lambda: None)()
        weight = len(labels) * trainer.world_size
        pl_module.log("val/robust_top1", robust, prog_bar=True, batch_size=weight, sync_dist=True)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "test" and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"trainer.strategy={type(trainer.strategy).__name__}: RobustnessCheck asks one process, and none has "
                "the whole network; leave the callback out, and run vmoe-momentum robustness on the checkpoint"
            )

    @rank_zero_only
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        data, folder = data_of(trainer), Path(trainer.log_dir or trainer.default_root_dir) / "robustness"
        view = View(data.eval_image_size, float(data.eval_crop_ratio), "bilinear", data.upright)
        label = type(pl_module.model.net).__name__
        # weights change and cells are known by their source: none is kept for another call
        told = {"source": str(trainer.ckpt_path), "step": trainer.global_step}
        model = Model(
            label, label, pl_module.model, view, pl_module.num_classes, pl_module.class_names, None, None,
            told | {"at": time.time_ns()},
            class_ids=data.class_ids,
        )  # fmt: skip
        cells = make_plan(self.settings._replace(data=str(data.root)), [model])
        training = {module: module.training for module in pl_module.model.modules()}
        try:
            evaluation = evaluate(cells, [model], folder, self.batch_size, device=str(pl_module.device))
        finally:
            for module, was in training.items():
                module.training = was
            shutil.rmtree(folder / "cells", ignore_errors=True)
        provenance = {"models": {label: told}, "pictures": describe_pictures(cells), "versions": versions()}
        report = write_report(evaluation, folder, provenance)
        for row in report.rows:
            name = "_".join(part.replace(" ", "_") for part in (row.condition, row.severity_or_eps) if part)
            pl_module.log(f"test/robustness/{name}/{row.metric}", row.value, batch_size=1, rank_zero_only=True)
        Console().print(f"[bold]robustness[/bold]  {folder / 'report.html'}", soft_wrap=True, highlight=False)


def robust_share(module: Any, images: torch.Tensor, labels: torch.Tensor, attack: Budget, seed: int) -> float:
    """Of images [B, 3, H, W], uint8 or in [0, 1], those right before and after an attack that drives up the loss."""
    model = module.model
    with torch.inference_mode(False), torch.no_grad():
        # tensors of inference mode cannot enter autograd: copies made here can
        pixels, labels = images.clone(), labels.clone()
        pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels
        targets = torch.nn.functional.one_hot(labels, module.num_classes).to(pixels.dtype)
        objective = partial(classification_loss, targets=targets, loss=module.loss, reduction="sum")
        found = attacked(model, pixels, objective, attack, step_size(attack), "ball", seed)
        with evaluated(model, seed):
            right = [model(each).argmax(dim=-1) == labels for each in (pixels, found)]
    torch.clear_autocast_cache()
    return float((right[0] & right[1]).float().mean())
