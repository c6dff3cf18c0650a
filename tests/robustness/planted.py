"""Pictures of one colour whose colour says what a planted model answers, and trees of them. K = 1,000 classes.

red + 256 * green: the class the model gives. blue: 0 plain; 1 another class, outside ImageNet-A and -R, is likelier
still; above 1 the confidence is that low.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from vmoe_momentum.robustness.models import Model, View

OUTSIDE = 0  # tench: in neither -A nor -R
VIEW = View(32, 0.875, "bilinear")


class Planted(nn.Module):
    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.num_classes, self.calls = num_classes, 0
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += len(images)
        red, green, blue = (255 * images.mean(dim=(2, 3))).round().long().unbind(dim=1)
        logits = torch.zeros(len(images), self.num_classes, device=images.device)
        peak = torch.where(blue > 1, 1.0 + 10.0 / blue.clamp_min(1), 12.0)
        logits = logits.scatter(1, (red + 256 * green).clamp_max(self.num_classes - 1)[:, None], peak[:, None])
        logits[:, OUTSIDE] += 20.0 * (blue == 1)
        return logits + 0 * self.unused + 0 * images.sum(dim=(1, 2, 3))[:, None]


def planted(label: str = "planted", num_classes: int = 1000, names: list[str] | None = None) -> Model:
    module = Planted(num_classes).eval()
    return Model(label, label, module, VIEW, num_classes, names, None, None, {"source": label})


def paint(path: Path, answer: int, blue: int = 0, size: int = 40) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), (answer % 256, answer // 256, blue)).save(path)
    return path


def write_mappings(root: Path, classes: dict[str, list[int]], without: Sequence[str] = ()) -> None:
    """ObjectNet's four files: folder -> class indices, and folders of none. Numbers of 2012 are another order."""
    place = root / "mappings"
    place.mkdir(parents=True, exist_ok=True)
    names = [f"thing {index}, or {index}" for index in range(1000)]
    numbers = [(7 * index + 3) % 1000 for index in range(1000)]  # of the class index
    lines = [names[numbers.index(number)] for number in range(1000)]
    label = {folder: folder.replace("_", " ").capitalize() for folder in (*classes, *without)}
    told = {label[folder]: "; ".join(names[index] for index in those) for folder, those in classes.items()}
    (place / "folder_to_objectnet_label.json").write_text(json.dumps(label))
    (place / "objectnet_to_imagenet_1k.json").write_text(json.dumps(told))
    (place / "pytorch_to_imagenet_2012_id.json").write_text(json.dumps({str(k): n for k, n in enumerate(numbers)}))
    (place / "imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")
