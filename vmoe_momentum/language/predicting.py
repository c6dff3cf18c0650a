"""What `predict` writes of a text: one row a word, in the order of the text's streams."""

import csv
from io import StringIO
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from rich.console import Console

from ..files.staging import draft_of
from ..resources import room_for
from .heads import NO_WORD


class TextPredictionWriter(BasePredictionWriter):
    """predictions.csv in the log folder: stream, place in it, word, its -log p, the likeliest word and its."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Raises ValueError: several devices, which would each write their own streams."""
        if stage == "predict" and trainer.world_size > 1:
            raise ValueError(f"trainer.devices={trainer.world_size}: a text is predicted on one device; use 1")

    def write_on_epoch_end(self, trainer: pl.Trainer, pl_module: Any, predictions: Any, batch_indices: Any) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        vocabulary, text, place, count = pl_module.vocabulary, StringIO(newline=""), 0, 0
        writer = csv.writer(text)
        writer.writerow(["stream", "place", "word", "nll", "likeliest", "likeliest_nll"])
        rows: list[list[Any]] = []
        for targets, nll, best, best_nll in predictions:
            for stream, columns in enumerate(
                zip(*(each.tolist() for each in (targets, nll, best, best_nll)), strict=True)
            ):
                for offset, (word, loss, likeliest, least) in enumerate(zip(*columns, strict=True)):
                    if word != NO_WORD:
                        told = [vocabulary[word], f"{loss:.6f}", vocabulary[likeliest], f"{least:.6f}"]
                        rows.append([stream, place + offset, *told])
            place += targets.shape[1]
        rows.sort(key=lambda row: (row[0], row[1]))
        writer.writerows(rows)
        count, content = len(rows), text.getvalue().encode()
        path = folder / "predictions.csv"
        with room_for(path, len(content)), draft_of(path) as file:
            file.write(content)
        Console().print(f"{count} predictions: {path}", soft_wrap=True)
