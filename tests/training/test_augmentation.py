"""Erasing, mirrored tests and images of other sizes, in the LightningModule."""

import json
import random
from pathlib import Path

import pytest
import timm
import torch
from cli_helpers import fails
from timm.data.random_erasing import RandomErasing
from torch import nn

from vmoe_momentum import UpcycledViT, cli, create_model
from vmoe_momentum.classifiers import open_models
from vmoe_momentum.training import ImageClassifier

CONFIG = Path(__file__).parent.parent.parent / "configs" / "digits.yaml"


def shown_in_training(batch: tuple, **settings) -> torch.Tensor:
    """The normalised images that the network gets."""
    module, seen = ImageClassifier(create_model("vmoe_tiny_patch4_16"), 10, 16, **settings), []
    module.log = lambda *_, **__: None
    forward = module.forward_in_training
    module.forward_in_training = lambda model, images: seen.append(images.clone()) or forward(model, images)
    torch.manual_seed(7)
    random.seed(7)
    module.training_step(batch, 0)
    return seen[0]


def test_erasing_is_timms_on_normalised_images() -> None:
    images, labels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), torch.arange(8)
    plain = shown_in_training((images, labels))
    torch.testing.assert_close(plain, images.float() / 127.5 - 1)
    erased = shown_in_training((images, labels), random_erasing=1.0)
    torch.manual_seed(7)
    random.seed(7)
    expected = RandomErasing(1.0, mode="pixel", device=torch.device("cpu"))(plain.clone())
    assert torch.equal(erased, expected)
    assert all(not torch.equal(a, b) for a, b in zip(erased, plain, strict=True))
    some = shown_in_training((images, labels), random_erasing=0.5)
    assert 0 < sum(torch.equal(a, b) for a, b in zip(some, plain, strict=True)) < 8
    with pytest.raises(ValueError, match=r"model\.random_erasing=1\.5"):
        ImageClassifier(create_model("vmoe_tiny_patch4_16"), 10, 16, random_erasing=1.5)


def test_flipping_averages_logits_in_test_and_predict_only() -> None:
    class Sided(nn.Module):
        """Logits that know left from right."""

        num_classes = 2

        def forward(self, x):
            return torch.stack([x[..., :8].sum((1, 2, 3)), x[..., 8:].sum((1, 2, 3))], dim=1)

    images, labels = torch.rand(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)
    plain, flipped = (ImageClassifier(Sided(), 2, 16, test_time_flip=flip).eval() for flip in (False, True))
    losses: dict = {}
    for name, module in (("plain", plain), ("flipped", flipped)):
        module.log = lambda key, value, name=name, **_: losses.__setitem__((name, key), value)
        module.log_dict = lambda *_, **__: None
        module.validation_step((images, labels), 0)
        module.test_step((images, labels), 0)
    assert losses["plain", "val/loss"] == losses["plain", "test/loss"] == losses["flipped", "val/loss"]
    expected = ((plain(images) + plain(images.flip(-1))) / 2).softmax(-1)
    assert torch.allclose(flipped.predict_step((images, labels), 0)[0], expected)
    assert torch.allclose(expected, torch.full((4, 2), 0.5), atol=1e-4)
    assert losses["flipped", "test/loss"].item() == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("name", ["vmoe_tiny_patch4_16", "sincos", "soft", "upcycled", "dense"])
def test_dynamic_networks_take_other_sizes_and_are_themselves_at_their_own(name: str) -> None:
    def build(dynamic: bool) -> nn.Module:
        torch.manual_seed(0)
        if name == "upcycled":
            args = {"img_size": 16, "patch_size": 4, "depth": 2, "embed_dim": 32, "num_heads": 2}
            extra = {"dynamic_img_size": True} if dynamic else {}
            return UpcycledViT("vit_tiny_patch16_224", moe_layers=[1], backbone_args={**args, **extra}, num_classes=10)
        if name == "dense":
            return create_model("vit_tiny_patch16_224", image_size=32, dynamic_img_size=dynamic, num_classes=10)
        more = {"sincos": {"pos_embed": "sincos2d"}, "soft": {"router": "SoftRouter"}}.get(name, {})
        return create_model("vmoe_tiny_patch4_16", dynamic_img_size=dynamic, num_classes=10, **more)

    fixed, dynamic = build(False).eval(), build(True).eval()
    dynamic.load_state_dict(fixed.state_dict())
    size, patch = fixed.patch_embed.img_size[0], fixed.patch_embed.patch_size[0]
    images = torch.rand(2, 3, size, size)
    assert torch.equal(fixed(images), dynamic(images))
    for other in (size + patch, size - patch, 2 * size):
        logits = dynamic(torch.rand(2, 3, other, other))
        assert logits.shape == (2, 10) and logits.isfinite().all()
        with pytest.raises(AssertionError):
            fixed(torch.rand(2, 3, other, other))


ARGUMENTS = ["--data=FolderDataModule", "--data.num_workers=0", "--data.eval_batch_size=360"]
SHORT = ["--trainer.limit_train_batches=2", "--model.schedule.warmup_steps=1", "--trainer.enable_progress_bar=false"]
DYNAMIC = "--model.net.init_args.dynamic_img_size=true"
GROWS = "--data.progressive={start_size: 8, start_epoch: 0, end_epoch: 2, multiple: 4}"


def test_a_run_that_grows_and_is_tested_larger(digits: Path, tmp_path: Path, monkeypatch) -> None:
    """And what its checkpoint says of that to the robustness benchmark and to export."""
    monkeypatch.chdir(tmp_path)
    argv = [f"--config={CONFIG}", *ARGUMENTS, f"--data.root={digits}", DYNAMIC, GROWS, "--data.eval_image_size=20"]
    argv += ["--data.eval_crop_ratio=0.9"]
    cli.run(["fit", *argv, *SHORT, "--trainer.max_epochs=3"])
    path = "runs/digits/version_0/checkpoints/last.ckpt"
    cli.run(["test", *argv, f"--ckpt_path={path}"])
    (model,) = open_models([path])
    assert model.view[:3] == (20, 0.9, "bilinear")
    assert model.module(torch.rand(2, 3, 20, 20)).shape == (2, 10)
    cli.run(["export", f"--ckpt_path={path}", "--to=state-dict", "--out=o", f"--data={digits}", "--limit=5"])
    assert json.loads(Path("o/metadata.json").read_text())["image_size"] == 16  # programs have one size


def test_groups_that_would_not_divide_a_later_epochs_tokens_are_refused(digits, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["fit", f"--config={CONFIG}", *ARGUMENTS, f"--data.root={digits}", *SHORT, "--trainer.logger=false", DYNAMIC]
    router = ["--model.net.init_args.router=TopKRouter", "--model.net.init_args.router.group_size=136"]
    line = fails([*argv, GROWS, *router], capsys)
    assert "router.group_size=136 does not divide the 160 tokens of a batch of 8 pixels" in line
    net = timm.create_model("mixer_s32_224", num_classes=10)
    with pytest.raises(ValueError, match="images of 64 pixels: MlpMixer does not take them"):
        ImageClassifier(net, 10, 224).check_sizes([64, 224])
    with pytest.raises(ValueError, match="dynamic_img_size=True: resnet18 has no such setting"):
        create_model("resnet18", dynamic_img_size=True)
    ImageClassifier(create_model("resnet18"), 1000, 224).check_sizes([64, 224])


def test_sizes_a_network_cannot_take_are_refused_before_the_first_step(digits, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ["fit", f"--config={CONFIG}", *ARGUMENTS, f"--data.root={digits}", *SHORT, "--trainer.logger=false"]
    line = fails([*argv, GROWS], capsys)
    assert "images of 8, 12 pixels beside data.image_size=16" in line and "dynamic_img_size=true" in line
    line = fails([*argv, "--data.eval_image_size=20"], capsys)
    assert "images of 20 pixels" in line and "dynamic_img_size=true" in line
    assert "patches of 4" in fails([*argv, DYNAMIC, "--data.eval_image_size=18"], capsys)
