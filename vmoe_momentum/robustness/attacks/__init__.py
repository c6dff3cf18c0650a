"""Adversarial attacks on pixels in [0, 1], from torchattacks where its arithmetic is sound, behind one wrapper.

B images [B, 3, H, W], K classes. eps is in the same units as the images (1/255, not 1).

The wrapper mends what torchattacks 3.5.1 leaves open: it checks the range of pixels, works in float32 and inside
inference_mode, restores every sub-module's train flag and the random state also after an error, detaches what comes
out, and holds it inside the eps ball and the [0, 1] box. Images of any memory layout and models with half logits look
the same to every attack (Classifier). The model must normalise inside.

To add one: a function (classifier, images, labels, Budget) -> images, decorated with `@attack`, in the file of its
kind: gradients.py follows gradients, queries.py asks for answers only, packages.py calls others' attacks, targeted.py
chooses classes, routing.py moves tokens to other experts, transferable.py makes pictures that fool other models, too.
"""

from ..asked import Norm

# they register themselves
from . import ensemble, gradients, packages, queries, routing, targeted, transferable  # noqa: F401
from .budget import Budget, Stages
from .gradients import best_iterate, projected_gradient, step_size
from .losses import cross_entropy, direction, input_gradient, margin, probability_margin
from .registry import (
    ATTACKS,
    CE,
    DLR,
    FIXED,
    HALVED,
    INSIDE,
    MARGIN,
    PLAIN,
    Attack,
    Spends,
    attack,
    check_attack,
    check_budget,
    load_package,
    run_attack,
)
from .targeted import nearest_classes
from .wrapping import Classifier, evaluated, frozen, project, starting_point

__all__ = [
    "ATTACKS",
    "CE",
    "DLR",
    "FIXED",
    "HALVED",
    "INSIDE",
    "MARGIN",
    "PLAIN",
    "Attack",
    "Budget",
    "Classifier",
    "Norm",
    "Spends",
    "Stages",
    "attack",
    "best_iterate",
    "check_attack",
    "check_budget",
    "cross_entropy",
    "direction",
    "evaluated",
    "frozen",
    "input_gradient",
    "load_package",
    "margin",
    "nearest_classes",
    "probability_margin",
    "project",
    "projected_gradient",
    "run_attack",
    "starting_point",
    "step_size",
]
