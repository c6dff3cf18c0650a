"""The steps of timm's validate.py (huggingface/pytorch-image-models), from its create_model call to its accuracy."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_input_data_config
from timm.models import create_model, resolve_model_input_args
from timm.utils import AverageMeter, accuracy
from torch import nn

from vmoe_momentum import PixelModel
from vmoe_momentum import create_model as ours
from vmoe_momentum.models.directory import save


def validate(model_name: str, root: Path, dtype: torch.dtype, **arguments) -> tuple[float, float]:
    """validate.py's validate(), on one process and the CPU. arguments: its command line's."""
    arguments = {"crop_pct": 1.0, **arguments}
    model = create_model(**resolve_model_input_args(model_name, arguments, pretrained=True))
    config = resolve_input_data_config(model, arguments, use_test_size=True)
    model = model.to(dtype=dtype).to(memory_format=torch.channels_last).eval()
    dataset = create_dataset(root=str(root), name="", split="validation", input_img_mode="RGB")
    loader = create_loader(
        dataset,
        input_size=config["input_size"],
        batch_size=64,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        device=torch.device("cpu"),
        img_dtype=dtype,
    )
    top1, top5 = AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for images, target in loader:
            output = model(images.to(dtype).contiguous(memory_format=torch.channels_last))
            acc1, acc5 = accuracy(output, target, topk=(1, 5))
            top1.update(acc1.item(), len(images))
            top5.update(acc5.item(), len(images))
    return top1.avg, top5.avg


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("vmoe_tiny_patch4_16", torch.float32),
        ("vmoe_tiny_patch4_16", torch.bfloat16),
        ("soft_moe_small_patch16_224", torch.float32),
        pytest.param("soft_moe_small_patch16_224", torch.bfloat16, marks=pytest.mark.long),
    ],
)
def test_it_scores_what_our_own_pixels_score(name: str, dtype: torch.dtype, digits: Path, tmp_path: Path) -> None:
    size = {"image_size": 16} if name.startswith("vmoe") else {"image_size": 32, "num_experts": 4}
    net = ours(name, num_classes=10, **size)
    nn.init.trunc_normal_(net.head.weight, std=1.0)
    save(net, tmp_path / "net")
    arguments = {} if name.startswith("vmoe") else {"img_size": 48}  # another grid than the saved one
    if arguments:
        net.set_input_size((48, 48))
    top1, top5 = validate(f"local-dir:{tmp_path}/net", digits / "val", dtype, **arguments)
    model, hits = PixelModel(net).eval(), []
    side = net.patch_embed.img_size[0]
    for label, folder in enumerate(sorted((digits / "val").iterdir())):
        for path in folder.iterdir():
            picture = Image.open(path).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
            pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
            hits.append((label, pixels))
    with torch.inference_mode():
        logits = model(torch.stack([pixels for _, pixels in hits]))
    expected = accuracy(logits, torch.tensor([label for label, _ in hits]), topk=(1, 5))
    tolerance = 1e-4 if dtype == torch.float32 else 4.0  # percent
    assert top1 == pytest.approx(expected[0].item(), abs=tolerance)
    assert top5 == pytest.approx(expected[1].item(), abs=tolerance)
