"""How an attack is registered, and run."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...ranges import check_all
from ..asked import BUDGET, Norm
from .budget import Budget
from .losses import mean_margin
from .wrapping import Classifier, frozen, project

Spends = Literal["steps", "queries"] | None  # None: its own


Run = Callable[[nn.Module, Tensor, Tensor, Budget], Tensor]  # classifier, images, labels -> images


class Attack(NamedTuple):
    run: Run
    norms: tuple[Norm, ...]
    spends: Spends  # what its budget is counted in; by queries it needs no gradient
    package: str | None  # what it is made with
    min_classes: int  # its loss needs so many
    min_queries: int
    router: bool  # uses Budget.router_loss
    not_in_l2: tuple[int, ...]  # sides of images that its L2 form cannot cut up
    loss: str  # what it drives up
    step: str  # size of its steps
    start: str  # where it starts, unless it is told to start at random
    random_start: bool  # can be told to
    restarts: bool  # can start again, elsewhere or with other draws
    eot: Literal["gradients", "answers"] | None  # what it averages over passes; None: one pass is all it asks for
    needs_router: bool  # nothing to do without Budget.router_loss
    per_step: int  # forward passes an image, of those that spend steps; a backward one counts as two
    passes: int  # the same of all of it. 0: follows from the budget
    parts: bool  # asks the model about some images of a batch only: those that still stand


ATTACKS: dict[str, Attack] = {}
PLAIN = {"random_start": False, "restarts": 1, "eot": 1}  # options that only some take: one start, where it is its own
SEEDS_APART = 1_000_003  # of restarts, so that those of neighbouring seeds are others
# how attacks do it, as reports say it
CE, MARGIN, DLR = "cross-entropy", "largest other logit - true logit", "difference of logits ratio"
FIXED, HALVED, INSIDE = "min(eps, 2.5 eps / steps)", "2 eps, halved where it stalls", "a random point of the ball"


def attack(
    *norms: Norm,
    spends: Spends = None,
    package: str | None = None,
    min_classes: int = 2,
    min_queries: int = 1,
    router: bool = False,
    not_in_l2: tuple[int, ...] = (),
    loss: str = "its own",
    step: str = "its own",
    start: str = "the picture",
    random_start: bool = False,
    restarts: bool = False,
    eot: Literal["gradients", "answers"] | None = None,
    needs_router: bool = False,
    per_step: int = 3,
    passes: int = 0,
    parts: bool = False,
) -> Callable[[Run], Run]:
    """Registers a function under its own name, underscores as hyphens."""

    def register(function: Run) -> Run:
        ATTACKS[function.__name__.replace("_", "-")] = Attack(
            function, norms, spends, package, min_classes, min_queries, router, not_in_l2, loss, step, start,
            random_start, restarts, eot, needs_router, per_step, passes, parts,
        )  # fmt: skip
        return function

    return register


def run_attack(name: str, model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Images within eps of `images` and within [0, 1]; where the attack fails, any such image.

    Of several starts each image keeps the one of the largest margin: any that fools it counts. Raises ValueError:
    pixels outside [0, 1], eps that is not in their units, a norm or an option the attack does not know, no routers.
    """
    check_budget(name, budget)
    low, high = float(images.amin()), float(images.amax())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"images span [{low:.3g}, {high:.3g}]; attacks work on pixels in [0, 1], normalised inside")
    if ATTACKS[name].needs_router and budget.router_loss is None:
        raise ValueError(f"attacks={name}: drives routers, and the model has none; leave it out")
    if budget.eps == 0:
        return images.clone()
    with torch.inference_mode(False):
        # inference tensors cannot enter autograd: copies made here can, and packages flatten them by `view`
        images, labels = images.float().clone(memory_format=torch.contiguous_format), labels.clone()
    worst = _start(name, model, images, labels, budget)
    if budget.restarts == 1:
        return worst
    highest = _judge(model, worst, labels, budget)
    for number in range(1, budget.restarts):
        left = (highest <= 0).nonzero().flatten() if ATTACKS[name].parts else torch.arange(len(images))
        if not len(left):
            break
        seed = (budget.seed + SEEDS_APART * number) % 2**31
        again = budget._replace(seed=seed, random_start=ATTACKS[name].random_start)
        found = _start(name, model, images[left], labels[left], again)
        reached = _judge(model, found, labels[left], budget)
        better = reached > highest[left]
        worst[left[better]], highest[left[better]] = found[better], reached[better]
    return worst


def _start(name: str, model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Once."""
    found = ATTACKS[name]
    with frozen(model, budget.seed), torch.inference_mode(False), torch.enable_grad():
        seen = Classifier(model, budget.eot if found.eot == "answers" else 1).eval()
        made = found.run(seen, images, labels, budget).detach()
    return project(images, made, budget)


def _judge(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """[B] margins: positive where the model is fooled."""
    with frozen(model, budget.seed):
        return mean_margin(Classifier(model).eval(), images, labels, budget)


def check_budget(name: str, budget: Budget) -> None:
    """Raises ValueError: no such attack, norm or eps."""
    if name not in ATTACKS:
        raise ValueError(f"attacks={name}: no such attack; valid: {', '.join(ATTACKS)}")
    if budget.norm not in ATTACKS[name].norms:
        raise ValueError(f"norm={budget.norm}: {name} knows {', '.join(ATTACKS[name].norms)}")
    check_all("", budget._asdict(), BUDGET)
    if budget.norm == "Linf" and budget.eps > 1:
        raise ValueError(
            f"eps={budget.eps:g}: pixels lie in [0, 1], so more than 1 means nothing; write budgets as 4/255"
        )
    for option, plain in PLAIN.items():
        if getattr(budget, option) != plain and not getattr(ATTACKS[name], option):
            raise ValueError(f"{option}={getattr(budget, option)}: {name} has its own; leave it {plain}")
    if budget.queries < ATTACKS[name].min_queries:
        raise ValueError(f"queries={budget.queries}: {name} needs {ATTACKS[name].min_queries} for one step")


def check_attack(name: str, side: int, classes: int, norm: Norm) -> None:
    """Whether it can be run on images of `side` pixels. Raises ValueError: it cannot, or a package is missing."""
    found = ATTACKS[name]
    if found.package is not None:
        load_package(found.package)
    if classes < found.min_classes:
        raise ValueError(f"attacks={name}: needs {found.min_classes} classes, there are {classes}; use pgd-margin")
    if norm == "L2" and side in found.not_in_l2:
        raise ValueError(f"attacks={name}: in L2 it cannot cut up {side}-pixel images; leave it out, or use norm=Linf")


def load_package(name: str) -> ModuleType:
    """Raises ValueError: it is not installed, or another version."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "autoattack" if name.startswith("pyautoattack") else "attacks"
        raise ValueError(
            f"attacks: the package {name} is missing ({error}); pip install 'vmoe_momentum[{extra}]'"
        ) from error
