"""A small English-like text, prepared; networks for it."""

import random
from pathlib import Path

from vmoe_momentum.datasets.text_prepare import prepare_text

WORDS = (
    *("the", "a", "small", "large", "old", "red", "cat", "dog", "bird", "house"),
    *("sees", "finds", "takes", "of", "on", "in", "and", "then", "runs", "sleeps"),
)


def make_text(folder: Path, train: int = 400, other: int = 60, seed: int = 0) -> Path:
    """Lines of a little grammar; the prepared folder."""
    draw = random.Random(seed)
    source = folder / "source"
    source.mkdir(parents=True)
    for name, lines in (("train", train), ("valid", other), ("test", other)):
        text = [" ".join(draw.choices(WORDS, k=draw.randint(2, 7))) for _ in range(lines)]
        (source / f"{name}.txt").write_text("\n".join(text) + "\n")
    prepare_text(str(folder / "text"), str(source))
    return folder / "text"
