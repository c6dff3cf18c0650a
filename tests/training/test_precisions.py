"""Every precision that Lightning offers on a CPU: what its checkpoint says, and that it loads again."""

from pathlib import Path

import pytest
import timm
import torch
from test_module import CLASSES, batches, classifier, trainer

from vmoe_momentum.classifiers import open_models
from vmoe_momentum.models.saved import open_saved
from vmoe_momentum.training import OptimizerSettings
from vmoe_momentum.training.optimization import FUSED

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def network():
    return timm.create_model(
        "deit_tiny_patch16_224", img_size=16, patch_size=8, num_classes=CLASSES, depth=1, embed_dim=24, num_heads=2
    )


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed", "64-true", "16-true"])
def test_constants_are_constants_and_checkpoints_load(precision: str, tmp_path: Path) -> None:
    """Saved in that precision; tested, rebuilt and opened for robustness in float32 and in that precision."""
    net = network()
    assert net.pretrained_cfg["mean"] == IMAGENET["mean"]
    data, module = batches(1), classifier(net=net, optimizer=OptimizerSettings("sgd"))  # Adam's eps is 0 in float16
    run = trainer(tmp_path, precision=precision, max_epochs=1)
    run.fit(module, data, data)
    path = tmp_path / "saved.ckpt"
    run.save_checkpoint(path)
    told = torch.load(path, weights_only=True)["vmoe_momentum"]
    for name, values in IMAGENET.items():
        assert told[name] == torch.tensor(values).tolist()
    for other in {precision, "32-true"}:
        trainer(tmp_path, precision=other).test(classifier(net=network()), data, ckpt_path=path, verbose=False)
    rebuilt = open_saved(str(path)).build()
    (opened,) = open_models([str(path)])
    for name, values in IMAGENET.items():
        assert getattr(rebuilt, name).flatten().tolist() == torch.tensor(values).tolist() == opened.provenance[name]


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
def test_gradients_are_clipped_under_every_fused_optimizer(name: str, precision: str, tmp_path: Path) -> None:
    """Lightning refuses under autocast what could unscale gradients itself."""
    module = classifier(net=network(), optimizer=OptimizerSettings(name, lr=1e-3))
    run = trainer(tmp_path, precision=precision, max_epochs=1, gradient_clip_val=1e-9)
    norms = []
    module.on_before_zero_grad = lambda optimizer: norms.extend(
        p.grad.norm() for p in module.parameters() if p.grad is not None
    )
    run.fit(module, batches(2))
    assert norms and max(norms) < 1e-6
