"""Networks that route the tokens of several images together, also in evaluation: trained, evaluated and looked into.

17 tokens an image (16 patches and the class token), so a group of 68 is four images.
"""

import inspect
from pathlib import Path

import pytest
import torch
from cli_helpers import fails, rows
from registered import registered

from vmoe_momentum import PixelModel, cli, create_model
from vmoe_momentum.models.groups import images_together
from vmoe_momentum.moe import Router
from vmoe_momentum.training.profile import measure_cost

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"
ROUTERS = sorted(registered(Router))


def together(name: str, images: int = 4) -> Router:
    """A router of that class that groups the tokens of several images in evaluation, too."""
    cls = registered(Router)[name]
    tight = {"eval_capacity_factor": 0.5} if "eval_capacity_factor" in inspect.signature(cls).parameters else {}
    return cls(group_size=17 * images, **tight)


def net_of(name: str) -> torch.nn.Module:
    net = create_model("vmoe_tiny_patch4_16", router=together(name), num_classes=10).eval()
    torch.nn.init.normal_(net.head.weight)
    return net


@pytest.mark.parametrize("name", ROUTERS)
def test_any_number_of_images_is_evaluated_and_the_last_group_is_filled_with_them_again(name: str) -> None:
    net, images = net_of(name).double(), torch.randn(7, 3, 16, 16, dtype=torch.float64)
    assert images_together(net, 16) == 4
    with torch.no_grad():
        for count in range(1, 8):
            some = images[:count]
            whole = torch.cat([some] * 4)[: -(-count // 4) * 4]
            torch.testing.assert_close(net(some), net(whole)[:count])
            assert torch.equal(net.forward_with_aux(some)[0], net(some))
            assert len(net.forward_features(some)) == count
            assert all(len(y) == count for y in net.forward_intermediates(some, [1, 3], intermediates_only=True))
    with pytest.raises(ValueError, match="router.group_size=68 does not divide"):
        net.train()(images)


@pytest.mark.parametrize("name", ROUTERS)
def test_the_cost_of_an_image_is_that_of_one(name: str) -> None:
    """Four images routed together cost what each costs by itself, where slots are of equal number."""
    grouped = measure_cost(PixelModel(net_of(name)), 16).gflops
    alone = create_model("vmoe_tiny_patch4_16", router=name, num_classes=10)
    assert grouped == pytest.approx(measure_cost(PixelModel(alone), 16).gflops, rel=0.35)


@pytest.mark.long
@pytest.mark.parametrize("name", ["ExpertChoiceRouter", "SoftRouter", "TopKRouter"])
def test_they_go_through_every_command(name: str, digits: Path, tmp_path, monkeypatch, capsys) -> None:
    """Evaluation batches of 33 images, the last of 30."""
    monkeypatch.chdir(tmp_path)
    router = [f"--model.net.init_args.router={name}", "--model.net.init_args.router.group_size=68"]
    router += ["--model.net.init_args.router.eval_capacity_factor=0.5"] if name == "TopKRouter" else []
    data = ["--data=FolderDataModule", f"--data.root={digits}", "--data.num_workers=0"]
    sizes = ["--data.batch_size=8", "--data.eval_batch_size=33"]
    argv = [f"--config={CONFIG}", *router, *data, *sizes, "--trainer.enable_progress_bar=false"]
    short = ["--trainer.limit_train_batches=2", "--trainer.max_epochs=1", "--model.schedule.warmup_steps=0"]
    line = fails(["fit", *argv, *short, "--data.batch_size=6"], capsys)
    assert "data.batch_size=6: router.group_size=68 does not divide the 102 tokens" in line
    assert "use a multiple of 4 images" in line
    cli.run(["fit", *argv, *short])
    path = str(next(tmp_path.rglob("last.ckpt")))
    cli.run(["test", *argv, f"--ckpt_path={path}"])
    cli.run(["predict", *argv, f"--ckpt_path={path}"])
    assert len(rows(next(tmp_path.rglob("predictions.csv")))) == 360
    cli.run(["analyze", "load", f"--model={path}", *data, "--data.image_size=16", "--out=load", "--images=30"])
    assert "routes the tokens of 4 images" in fails(
        ["analyze", "norms", f"--model={path}", *data, "--data.image_size=16", "--out=norms", "--images=3"], capsys
    )
    attacks = ["--attacks=[fgsm]", "--eps=[1/255]", "--corruptions=[fog]", "--severities=[1]"]
    cli.run(["robustness", f"--model={path}", f"--data={digits}", *attacks, "--limit=30", "--out=r"])
    assert Path("r/report.html").is_file()
