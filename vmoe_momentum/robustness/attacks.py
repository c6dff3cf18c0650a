"""Adversarial attacks on pixels in [0, 1], from torchattacks where its arithmetic is sound, behind one wrapper.

B images [B, 3, H, W], K classes. eps is in the same units as the images (1/255, not 1).

The wrapper mends what torchattacks 3.5.1 leaves open: it checks the range of pixels, works in float32 and inside
inference_mode, restores every sub-module's train flag and the random state also after an error, detaches what comes
out, and holds it inside the eps ball and the [0, 1] box. Images of any memory layout and models with half logits look
the same to every attack (Classifier). The model must normalise inside.

To add one: a function (classifier, images, labels, Budget) -> images, decorated with `@attack`.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ranges import check_all
from .asked import BUDGET, Norm

Spends = Literal["steps", "queries"] | None  # None: its own
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # images, logits, labels -> [B], to be made large


class Budget(NamedTuple):
    """What an attack may do."""

    eps: float
    norm: Norm = "Linf"
    steps: int = 20
    queries: int = 5000
    seed: int = 0
    # adds what routers do to the loss; top-k hides gradients of the choice itself. images, labels -> []
    router_loss: Callable[[Tensor, Tensor], Tensor] | None = None


class Attack(NamedTuple):
    run: Callable[[nn.Module, Tensor, Tensor, Budget], Tensor]
    norms: tuple[Norm, ...]
    spends: Spends  # what its budget is counted in; by queries it needs no gradient
    package: str | None  # what it is made with
    min_classes: int  # its loss needs so many
    min_queries: int
    router: bool  # uses Budget.router_loss
    not_in_l2: tuple[int, ...]  # sides of images that its L2 form cannot cut up
    loss: str  # what it drives up
    step: str  # size of its steps
    start: str  # where it starts
    restarts: int  # times it starts
    passes: int  # forward passes an image; a backward one counts as two. 0: follows from the budget
    parts: bool  # asks the model about some images of a batch only: those that still stand


ATTACKS: dict[str, Attack] = {}
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
    restarts: int = 1,
    passes: int = 0,
    parts: bool = False,
) -> Callable[[Callable], Callable]:
    """Registers a function under its own name, underscores as hyphens."""

    def register(function: Callable) -> Callable:
        ATTACKS[function.__name__.replace("_", "-")] = Attack(
            function, norms, spends, package, min_classes, min_queries, router, not_in_l2, loss, step, start, restarts,
            passes, parts,
        )  # fmt: skip
        return function

    return register


def run_attack(name: str, model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Images within eps of `images` and within [0, 1]; where the attack fails, any such image.

    Raises ValueError: pixels outside [0, 1], eps that is not in their units, a norm the attack does not know.
    """
    check_budget(name, budget)
    low, high = float(images.amin()), float(images.amax())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"images span [{low:.3g}, {high:.3g}]; attacks work on pixels in [0, 1], normalised inside")
    if budget.eps == 0:
        return images.clone()
    with frozen(model, budget.seed), torch.inference_mode(False), torch.enable_grad():
        # inference tensors cannot enter autograd: copies made here can, and packages flatten them by `view`
        images, labels = images.float().clone(memory_format=torch.contiguous_format), labels.clone()
        found = ATTACKS[name].run(Classifier(model).eval(), images, labels, budget).detach()
    return project(images, found, budget)


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


class Classifier(nn.Module):
    """A model as attacks see it: logits of float32 at least, since they write losses into float32 buffers."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model(images)
        return logits if logits.dtype == torch.float64 else logits.float()


def project(images: Tensor, found: Tensor, budget: Budget) -> Tensor:
    """`found` moved into the ball around `images` and into the box. NaN counts as no change."""
    change = torch.nan_to_num(found - images, nan=0.0)
    if budget.norm == "Linf":
        change = change.clamp(-budget.eps, budget.eps)
    else:
        norm = change.flatten(1).norm(dim=1).clamp_min(1e-30)
        change = change * (budget.eps / norm).clamp_max(1.0).view(-1, 1, 1, 1)
    # clamping to the box moves towards the images, so it cannot leave the ball
    return (images + change).clamp(0.0, 1.0)


@contextmanager
def frozen(model: nn.Module, seed: int) -> Iterator[None]:
    """Eval mode everywhere, gradients of inputs only, its own random numbers; all as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    try:
        model.eval().requires_grad_(False)
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires_grad in wanted.items():
            parameter.requires_grad_(requires_grad)


# ---- losses


def cross_entropy(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


def margin(images: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the true one: positive where wrong, and no saturation."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.masked_fill(F.one_hot(labels, logits.shape[1]).bool(), -torch.inf)
    return others.amax(dim=1) - true


def input_gradient(model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, budget: Budget) -> Tensor:
    """Of the sum over images: a mean would make each gradient, and any epsilon added to its norm, depend on B."""
    images = images.detach().requires_grad_()
    total = loss(images, model(images), labels).sum()
    if budget.router_loss is not None:
        total = total + budget.router_loss(images, labels) * len(images)
    return torch.autograd.grad(total, images)[0]


# ---- attacks


@attack("Linf", "L2", package="torchattacks", router=True, loss=CE, step="eps", passes=3)
def fgsm(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """One step of eps along the sign of the cross-entropy's gradient (Goodfellow et al., arXiv:1412.6572).

    Linf from torchattacks, which has no L2 form; ours along the gradient itself there, and with a router's loss.
    """
    if budget.norm == "Linf" and budget.router_loss is None:
        return load_package("torchattacks").FGSM(model, eps=budget.eps)(images, labels)
    gradient = input_gradient(model, images, labels, cross_entropy, budget)
    return images + budget.eps * direction(gradient, budget.norm)


@attack("Linf", "L2", spends="steps", package="torchattacks", router=True, loss=CE, step=FIXED)
def pgd(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Projected gradient on the cross-entropy (Madry et al., arXiv:1706.06083), without a random start.

    Linf from torchattacks. Ours in L2, where it adds 1e-10 to the norm of a gradient of the batch's mean, so that steps
    shrink for confident models; and with a router's loss.
    """
    if budget.norm == "Linf" and budget.router_loss is None:
        step = step_size(budget)
        return load_package("torchattacks").PGD(model, budget.eps, step, budget.steps, random_start=False)(
            images, labels
        )
    return projected_gradient(model, images, labels, cross_entropy, budget)


@attack("Linf", "L2", spends="steps", router=True, loss=MARGIN, step=FIXED)
def pgd_margin(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Projected gradient on the margin: where saturated cross-entropy hides the gradient this one still sees it."""
    return projected_gradient(model, images, labels, margin, budget)


def step_size(budget: Budget) -> float:
    """2.5 eps / steps: reaches the border and back (Madry et al.'s choice on CIFAR), never more than eps."""
    return min(budget.eps, 2.5 * budget.eps / budget.steps)


def projected_gradient(model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, budget: Budget) -> Tensor:
    """x <- P(x + a g) with g the gradient's sign, or direction in L2; keeps the last iterate, as PGD does."""
    found = images
    for _ in range(budget.steps):
        gradient = input_gradient(model, found, labels, loss, budget)
        found = project(images, found + step_size(budget) * direction(gradient, budget.norm), budget)
    return found


def direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Of steepest ascent; zero where the gradient is zero."""
    if norm == "Linf":
        return gradient.sign()
    length = gradient.double().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return torch.where(length > 0, gradient / length.clamp_min(1e-300), 0.0).to(gradient.dtype)


# In L2 five windows of a fifth of the side, and a sixth where there is room for one but for the margin before it.
@attack(
    "Linf", "L2", spends="queries", package="torchattacks", not_in_l2=(1, 2, 3, 4, 12, 14, 18, 19, 24),
    loss=MARGIN, step="squares of 2 eps, in L2 windows, smaller with the queries",
    start="random stripes, in L2 windows", parts=True,
)  # fmt: skip
def square(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Random search over squares, margin loss, no gradients (Andriushchenko et al., arXiv:1912.00049).

    The schedule of their sizes is stretched or shrunk to the queries. Its random numbers are a batch's, so results
    depend a little on the batch size.
    """
    options = {"norm": budget.norm, "eps": budget.eps, "n_queries": budget.queries, "seed": budget.seed}
    with torch.no_grad():
        return load_package("torchattacks").Square(model, **options)(images, labels)


@attack("Linf", "L2", spends="steps", package="torchattacks", loss=CE, step=HALVED, start=INSIDE, parts=True)
def apgd(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Step sizes that adapt, cross-entropy (Croce and Hein, arXiv:2003.01690)."""
    options = {"norm": budget.norm, "eps": budget.eps, "steps": budget.steps, "seed": budget.seed}
    return load_package("torchattacks").APGD(model, **options)(images, labels)


@attack(
    "Linf", "L2", spends="steps", package="torchattacks", min_classes=3, loss=DLR, step=HALVED, start=INSIDE, parts=True
)
def apgd_dlr(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """The same on the difference of logits ratio, which scaling the logits does not change."""
    options = {"norm": budget.norm, "eps": budget.eps, "steps": budget.steps, "seed": budget.seed, "loss": "dlr"}
    return load_package("torchattacks").APGD(model, **options)(images, labels)


@attack("Linf", "L2", spends="queries", min_queries=128, loss=MARGIN, step="eps / 4 along Adam's direction")
def spsa(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """Gradient of the margin from differences along random signs, Adam on it (Uesato et al., arXiv:1802.05666).

    Ours: torchattacks' default is one Adam step, at most 2.55/255 whatever eps is. `queries` forward passes an image:
    2 * 64 probes a step. In L2 the step is a quarter of eps along Adam's direction.
    """
    probes, delta, rate = 64, 0.01, budget.eps / 4
    found = images.clone()
    first, second = torch.zeros_like(images), torch.zeros_like(images)
    with torch.no_grad():
        for step in range(1, budget.queries // (2 * probes) + 1):
            gradient = torch.zeros_like(images)
            for _ in range(probes):
                signs = torch.randint(0, 2, images.shape, device=images.device).float() * 2 - 1
                up, down = (margin(found, model(found + side * delta * signs), labels) for side in (1, -1))
                gradient += ((up - down) / (2 * delta)).view(-1, 1, 1, 1) * signs / probes
            first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
            ascent = first / (1 - 0.9**step) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
            found = project(
                images, found + rate * (ascent if budget.norm == "Linf" else direction(ascent, "L2")), budget
            )
    return found


@attack(
    "Linf", "L2", package="pyautoattack", min_classes=4, not_in_l2=(1, 2, 3, 4, 12, 14, 18, 19, 24),
    loss=f"{CE}; targeted {DLR}; distance to the boundary (FAB-T); {MARGIN} (Square)",
    step="of each of its four attacks: 100 steps, 9 targets, 5,000 queries", start=f"{INSIDE}, of each attack",
    passes=3 * 100 * (1 + 9 + 9) + 5000, parts=True,
)  # fmt: skip
def autoattack(model: nn.Module, images: Tensor, labels: Tensor, budget: Budget) -> Tensor:
    """The standard AutoAttack: APGD-CE, APGD-T, FAB-T, Square (Croce and Hein, arXiv:2003.01690).

    It targets the 9 classes next in line, all others where they are fewer; its targeted loss is not defined on fewer
    than 4 classes. It has its own steps and queries: those of `budget` change nothing.
    """
    package = load_package("pyautoattack")
    with torch.no_grad():
        classes = model(images[:1]).shape[1]
    options = {"norm": budget.norm, "eps": budget.eps, "device": images.device, "seed": budget.seed}
    ensemble = package.AutoAttack(model, version="standard", **options)
    for targeted in (ensemble.apgd_targeted, ensemble.fab):
        targeted.n_target_classes = min(9, classes - 1)
    return ensemble.run_standard_evaluation(images, labels, batch_size=len(images))[0]


def load_package(name: str):
    """Raises ValueError: it is not installed, or another version."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "autoattack" if name == "pyautoattack" else "attacks"
        raise ValueError(
            f"attacks: the package {name} is missing ({error}); pip install 'vmoe_momentum[{extra}]'"
        ) from error
