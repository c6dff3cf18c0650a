"""Checkpoints as fit writes them, of networks that were not trained; images to look at."""

from pathlib import Path

import torch
from torch import Tensor, nn

from vmoe_momentum import create_model
from vmoe_momentum.analysis import Files
from vmoe_momentum.analysis.subjects import Subject
from vmoe_momentum.models.saved import KEY, open_saved
from vmoe_momentum.training import ImageClassifier

SIZE, CLASSES = 16, 10


def tiny(**settings) -> nn.Module:
    """The same vmoe_tiny_patch4_16 at each call, with experts that differ and a head that answers."""
    torch.manual_seed(0)
    net = create_model("vmoe_tiny_patch4_16", share_expert_init=False, num_classes=CLASSES, **settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.endswith("bias") or name.startswith("head"):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def write_checkpoint(net: nn.Module, path: Path, epoch: int = 0) -> Path:
    module = ImageClassifier(net, num_classes=CLASSES, image_size=SIZE)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = {"epoch": epoch, "global_step": 10 * (epoch + 1), KEY: module.facts()}
    torch.save({"state_dict": module.state_dict(), **facts}, path)
    return path


def subject(net: nn.Module, folder: Path, label: str = "net", epoch: int = 0) -> Subject:
    return Subject(label, open_saved(str(write_checkpoint(net, folder / f"{label}{epoch}.ckpt", epoch))))


def images(count: int = 6, batch: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8).split(batch))


def files(folder: Path, name: str = "x") -> Files:
    return Files(str(folder / "out"), name)
