"""Answers that depend on the batch are found, whatever makes them; those that do not are left alone."""

import pytest
import torch
from analysis_helpers import tiny, write_checkpoint
from cli_helpers import fails, rows
from planted import VIEW
from torch import Tensor, nn

from vmoe_momentum import ExpertChoiceRouter, GShardRouter, M6TRouter, SoftRouter, TopKRouter, cli
from vmoe_momentum.classifiers import open_models
from vmoe_momentum.models import PixelModel
from vmoe_momentum.robustness.coupling import find_coupling
from vmoe_momentum.robustness.models import Model, check_model

TOKENS = 17  # an image of vmoe_tiny_patch4_16
RULES = ("Residual", "HeavyBall", "Nesterov", "Complex", "Adam", "Robust", "SAM")
ROUTERS = {
    "expert choice": lambda size: ExpertChoiceRouter(group_size=size),
    "soft": lambda size: SoftRouter(group_size=size),
    "capacity": lambda size: TopKRouter(group_size=size, eval_capacity_factor=1.05),
    "batch priority": lambda size: TopKRouter(group_size=size, eval_capacity_factor=1.05, batch_priority=True),
    "much capacity": lambda size: TopKRouter(group_size=size, eval_capacity_factor=1.5, batch_priority=True),
    "one expert": lambda size: TopKRouter(top_k=1, group_size=size, eval_capacity_factor=1.25, batch_priority=True),
    "gshard": lambda size: GShardRouter(group_size=size, eval_capacity_factor=1.0),
    "m6t": lambda size: M6TRouter(group_size=size, eval_capacity_factor=1.0),
}


class Regrouped(nn.Module):
    """Groups that take batches of any size, as other codes have them: the batch is one group, or cut at its end."""

    def __init__(self, kind: str, images: int | str) -> None:
        super().__init__()
        self.kind, self.images, self.nets = kind, images, {}

    def forward(self, images: Tensor) -> Tensor:
        size = len(images) if self.images == "batch" else self.images
        return torch.cat([self.net(len(part))(part) for part in images.split(size)])

    def net(self, size: int) -> nn.Module:
        if size not in self.nets:
            self.nets[size] = PixelModel(tiny(router=ROUTERS[self.kind](size * TOKENS))).eval()
        return self.nets[size]


def coupled(module: nn.Module, batch_size: int = 64) -> bool:
    with torch.no_grad():
        return find_coupling(module.eval(), torch.rand(2, 3, 16, 16), batch_size)


@pytest.mark.parametrize("images", [2, *(pytest.param(k, marks=pytest.mark.long) for k in ("batch", 4, 8, 12, 24))])
@pytest.mark.parametrize("kind", list(ROUTERS))
def test_groups_of_several_images_are_found(kind: str, images: int | str) -> None:
    assert coupled(Regrouped(kind, images))


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        pytest.param(kind, rule, marks=() if rule == "HeavyBall" or kind == "dropless" else pytest.mark.long)
        for kind in ("dropless", "expert choice", "soft", "capacity")
        for rule in RULES
    ],
)
def test_groups_of_one_image_are_not(kind: str, rule: str) -> None:
    router = TopKRouter() if kind == "dropless" else ROUTERS[kind]("image")
    assert not coupled(PixelModel(tiny(rule=rule, router=router)), batch_size=12)


class Mixes(nn.Module):
    """Logits moved by something of the batch."""

    def __init__(self, how, strength: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.how, self.strength = nn.Linear(768, 5), how, strength

    def forward(self, images: Tensor) -> Tensor:
        logits = self.layer(images.flatten(1))
        return logits + self.strength * self.how(images, logits)


HOWS = {
    "mean of the batch": lambda x, y: x.mean() + 0 * y,
    "largest of the batch": lambda x, y: y.amax(dim=0, keepdim=True),
    "place": lambda x, y: torch.arange(len(x))[:, None] + 0 * y,
    "parity of the place": lambda x, y: torch.arange(len(x))[:, None] % 2 + 0 * y,
    "size": lambda x, y: 1.0 / len(x) + 0 * y,
    "large batches only": lambda x, y: (len(x) > 40) + 0 * y,
    "the neighbour": lambda x, y: y.roll(1, dims=0),
    "the mirror place": lambda x, y: y.flip(0),
    "pairs": lambda x, y: y[torch.arange(len(x)) // 2 * 2],
    "rank": lambda x, y: y.argsort(dim=0).argsort(dim=0).float(),
    "statistics of a BatchNorm": lambda x, y: nn.functional.batch_norm(y, None, None, training=len(y) > 1),
}


@pytest.mark.parametrize("how", list(HOWS))
def test_whatever_couples_is_found(how: str) -> None:
    """Also where reversing the batch changes nothing, and at a thousandth of the logits."""
    assert coupled(Mixes(HOWS[how])) and coupled(Mixes(HOWS[how], 1e-3))


def test_a_plain_network_is_not() -> None:
    assert not coupled(Mixes(lambda images, logits: 0 * logits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_round_but_do_not_couple(dtype: torch.dtype) -> None:
    class Typed(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module.to(dtype)

        def forward(self, images: Tensor) -> Tensor:
            return self.module(images.to(dtype))

    assert not coupled(Typed(PixelModel(tiny()).eval()), batch_size=12)
    assert coupled(Typed(Mixes(HOWS["the mirror place"])), batch_size=12)


PICKY = """
import torch

class Picky(torch.nn.Module):
    image_size = 16

    def forward(self, images):
        if len(images) not in (1, 2, 4, 8):
            raise ValueError("powers of two")
        return images.flatten(1)[:, :10] * 9
"""


def test_sizes_that_a_model_does_not_take_are_said_first(digits, tmp_path, monkeypatch, capsys) -> None:
    """Last batches, and attacks that ask about parts, of a network of others; ours fill up their groups, are coupled
    and warned of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "picky.py").write_text(PICKY)
    write_checkpoint(tiny(router=ExpertChoiceRouter(group_size=4 * TOKENS)), tmp_path / "a.ckpt")
    others = ["robustness", f"--data={digits}", "--corruptions=[none]", "--out=o"]
    argv = [*others, "--model=a.ckpt"]
    others += ["--model=picky:Picky"]
    line = fails([*others, "--attacks=[]", "--limit=11", "--batch_size=8"], capsys)
    assert "--model=Picky: takes no batch of 3 images, which will come" in line
    line = fails([*others, "--attacks=[square]", "--eps=[2/255]", "--limit=8", "--batch_size=8"], capsys)
    assert "ask about parts of a batch; attack it with some of [fgsm,pgd," in line
    assert not (tmp_path / "o").exists()
    for size in (4, 8):
        cli.run([*argv, "--attacks=[fgsm]", "--eps=[2/255]", "--limit=8", f"--batch_size={size}"])
        assert "depend on what else is in the batch" in (tmp_path / "o" / "report.md").read_text()
    cells = list((tmp_path / "o" / "cells").glob("*.npz"))
    assert len(cells) == 2 * 3 and rows(tmp_path / "o" / "rows.csv")  # none is shared by the two sizes
    (model,) = open_models(["a.ckpt"])
    assert check_model(model, "cpu").coupled and not check_model(_plain(), "cpu").coupled


def _plain() -> Model:
    module = nn.Sequential(nn.Flatten(), nn.Linear(3 * VIEW.size**2, 5))
    return Model("plain", "plain", module, VIEW, 5, None, None, None, {"source": "plain"})
