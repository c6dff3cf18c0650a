"""The pages' tables from the committed CSVs: `python benchmarks/tables.py` rewrites them between their markers."""

import re
from functools import partial
from pathlib import Path

from tables_scores import adversarial, adversarial_suite, digits, language, rules, zoo
from tables_speed import (
    adversarial_cost,
    before_after,
    busy,
    corruptions,
    dataloading,
    export,
    language_step,
    layers,
    speed,
    steps,
    traffic,
    traffic_measured,
)

ROOT = Path(__file__).parent.parent
TABLES = {
    "language": language, "language_step": language_step,
    "dataloading": dataloading, "digits": digits, "export": export, "rules": rules, "speed": speed, "zoo": zoo,
    "layers": partial(layers, "moe_layer"),
    "layers_gpu": partial(layers, "gpu/moe_layer"), "layers_gpu_large": partial(layers, "gpu/moe_layer_large"),
    "steps": partial(steps, "train_step"), "steps_gpu": partial(steps, "gpu/train_step"),
    "traffic_8": partial(traffic, 8), "traffic_64": partial(traffic, 64), "traffic_measured": traffic_measured,
    "adversarial": adversarial, "adversarial_cost": adversarial_cost, "adversarial_suite": adversarial_suite,
    "corruptions": corruptions, "before_after": before_after, "busy": busy,
}  # fmt: skip
PAGES = tuple(
    ROOT / page for page in (
        "docs/networks.md", "docs/results.md", "docs/train.md", "docs/weights.md", "benchmarks/README.md",
        "configs/scale/README.md", "vmoe_momentum/training/README.md", "vmoe_momentum/language/README.md",
    )
)  # fmt: skip


def fill(text: str) -> str:
    """`text` with the lines between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda match, table=table: f"{match[1]}{table()}\n{match[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(fill(page.read_text()))
