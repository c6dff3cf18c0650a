"""The attacks with one mistake each: the tests named beside them fail, so they would find it."""

import time

import pytest
import test_starts
import test_targeted
import torch
from linear import check_against_closed_form

from vmoe_momentum.robustness.attacks import gradients, losses, registry, routing, targeted, wrapping

PROJECTED = (wrapping, registry, gradients)
project, direction, nearest = wrapping.project, losses.direction, targeted.nearest_classes
closest = test_targeted.test_the_nearest_classes_of_a_linear_model


def everywhere(modules, name: str, made) -> list[tuple]:
    return [(module, name, made) for module in modules]


def scaled(factor: float) -> list[tuple]:
    """The ball of another size, for the attack and for what holds it."""
    return everywhere(PROJECTED, "project", lambda i, f, b: project(i, f, b._replace(eps=factor * b.eps)))


def last_iterate(model, images, labels, climb, budget):
    found = images
    for step in range(budget.steps):
        found = project(images, climb(found, step), budget)
    return found


def likeliest(model, images, labels, budget):
    logits = model(images).detach().scatter(1, labels[:, None], -torch.inf)
    return logits.topk(min(9, logits.shape[1] - 1)).indices


DOWN = everywhere((gradients, routing), "direction", lambda gradient, norm: -direction(gradient, norm))
UNHELD = everywhere(PROJECTED, "project", lambda images, found, budget: found.clamp(0, 1))
LINEAR = [("fgsm", 2), ("pgd-margin", 2), ("pma", 2), ("apgd-t", 10), ("malt", 10)]
MUTANTS = {
    **{f"twice eps, {n}": (scaled(2), check_against_closed_form, (n, k, "L2")) for n, k in LINEAR[1:3]},
    **{f"eps of 255, {n}": (scaled(1 / 255), check_against_closed_form, (n, k, "Linf")) for n, k in LINEAR},
    "no ball": (UNHELD, check_against_closed_form, ("pgd-margin", 2, "L2")),
    "down the margin": (DOWN, check_against_closed_form, ("pgd-margin", 2, "Linf")),
    "down the probabilities": (DOWN, check_against_closed_form, ("pma", 2, "L2")),
    "margin of the true class": (
        [(gradients, "margin", lambda i, z, y: -losses.margin(i, z, y))],
        check_against_closed_form, ("pgd-margin", 2, "Linf"),
    ),
    "the last iterate": ([(gradients, "best_iterate", last_iterate)], test_targeted.test_pma_is_the_loop, ()),
    "targets by logits": (
        [(targeted, "nearest_classes", likeliest)], test_targeted.test_a_class_that_only_looks_far_away_is_found, (),
    ),
    "the farthest targets": (
        [(test_targeted, "nearest_classes", lambda *given: nearest(*given).flip(1))], closest, (5, "Linf"),
    ),
    "the norm itself, not its dual": (
        [(test_targeted, "nearest_classes", lambda m, x, y, b: nearest(m, x, y, b._replace(norm="L2")))],
        closest, (14, "Linf"),
    ),
    "starts of a batch": (
        [(gradients, "starting_point", lambda x, b: project(x, x + b.eps * (2 * torch.rand_like(x) - 1), b))],
        test_starts.test_starts_and_restarts_do_not_depend_on_the_batch, ("pgd-margin",),
    ),
    "starts at the picture": (
        [(gradients, "starting_point", lambda x, b: x)],
        test_starts.test_one_start_in_four_that_fools_is_enough, ("pgd-margin",),
    ),
    "the last start counts": (
        [(registry, "_judge", lambda m, x, y, b: torch.full((len(x),), time.monotonic() % 1e4, dtype=float))],
        test_starts.test_one_start_in_four_that_fools_is_enough, ("pgd-margin",),
    ),
    "one pass for all": (
        [(test_starts, "input_gradient", lambda *given: losses.input_gradient(*given[:4], given[4]._replace(eot=1)))],
        test_starts.test_gradients_are_averaged_over_draws, (),
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mistake_is_found(mutant: str, monkeypatch) -> None:
    patches, check, arguments = MUTANTS[mutant]
    check(*arguments)
    for module, name, made in patches:
        monkeypatch.setattr(module, name, made)
    with pytest.raises(AssertionError):
        check(*arguments)
