"""A short robustness report at the end of `test`, by a callback."""

import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console

from ..ranges import COUNT, Range, in_range
from ..robustness import (
    Model,
    Settings,
    View,
    check_settings,
    describe_pictures,
    make_plan,
    parse_eps,
    write_report,
)
from ..robustness.evaluate import evaluate
from ..robustness.versions import versions


@in_range("RobustnessCheck.", severities=Range(1, 5, whole=True), limit=COUNT.or_(None), batch_size=COUNT)
class RobustnessCheck(Callback):
    """After `test`: clean, a few regenerated corruptions and FGSM on the same pictures, logged and written to disk.

    Add it with --trainer.callbacks+=RobustnessCheck. Rows are logged as test/robustness/<condition>_<severity>/<metric>
    and lie, with a page to look at, in the log folder's `robustness`. The whole benchmark: vmoe-momentum robustness.

    Args:
        corruptions: Names of ImageNet-C's corruptions.
        severities: 1 to 5.
        eps: Budgets of FGSM in pixels of [0, 1], such as 1/255; empty for none.
        limit: Pictures, 1 to 1e9, the same ones every time; null for all.
        batch_size: Pictures at once, 1 to 1e9.
    """

    def __init__(
        self,
        corruptions: list[str] = ["gaussian_noise", "motion_blur", "fog", "contrast"],  # noqa: B006  (jsonargparse reads it)
        severities: list[int] = [3],  # noqa: B006
        eps: list[float | str] = ["1/255"],  # noqa: B006
        limit: int | None = 1000,
        batch_size: int = 64,
    ) -> None:
        attacks = ("fgsm",) if eps else ()
        self.batch_size = batch_size
        budgets = tuple(parse_eps(text) for text in eps)
        self.settings = Settings(
            corruptions=tuple(corruptions), severities=tuple(severities), attacks=attacks, eps=budgets, limit=limit
        )
        check_settings(self.settings)

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "test" and isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"trainer.strategy={type(trainer.strategy).__name__}: RobustnessCheck asks one process, and none has "
                "the whole network; leave the callback out, and run vmoe-momentum robustness on the checkpoint"
            )

    @rank_zero_only
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        data, folder = trainer.datamodule, Path(trainer.log_dir or trainer.default_root_dir) / "robustness"
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
