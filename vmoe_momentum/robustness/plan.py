"""Which cells a report needs, checked before any of them is run. Reading order: settings.py, set_cells.py,
attack_cells.py."""

import hashlib
from collections.abc import Sequence

from .attack_cells import attack_cells
from .attacks import ATTACKS, check_attack
from .cells import Cell
from .models import Model
from .set_cells import corrupted_cells, limited, pictures_of, regenerated_cells, shifted_cells
from .sets import SETS
from .settings import Settings, all_attacks, check_settings


def make_plan(settings: Settings, models: Sequence[Model]) -> list[Cell]:
    """Every cell, in the order they are run. Raises ValueError and FileNotFoundError: anything that cannot be done."""
    check_settings(settings)
    if settings.data is None and not settings.sets:
        raise ValueError("nothing to evaluate: give --data, or one of " + ", ".join(f"--{name}" for name in SETS))
    _check_models(models)
    cells: list[Cell] = []
    if settings.data is not None:
        clean = limited(pictures_of("data", settings.data, settings, models), settings, f"--data={settings.data}")
        cells.append(Cell(clean, "clean", "clean"))
        cells += regenerated_cells(clean, settings) if settings.regenerate else []
        for name in all_attacks(settings):
            for model in models:
                check_attack(name, model.view.size, model.num_classes, settings.norm)
                if ATTACKS[name].needs_router and model.router_loss is None:
                    raise ValueError(f"attacks={name}: --model={model.name} has no routers; leave one of them out")
        if settings.transfer:
            _check_transfer(models)
        if settings.router_aware and all(model.router_loss is None for model in models):
            raise ValueError("--router_aware: none of the models has routers; leave it out")
        cells += attack_cells(clean, settings, [model.name for model in models])
    for name in (name for name in SETS if name in settings.sets):
        cells += (corrupted_cells if SETS[name].corruptions else shifted_cells)(name, settings, models)
    return cells


def describe_pictures(cells: Sequence[Cell]) -> dict[str, dict[str, str | int]]:
    """Where each set lies, how many it has, which ones (a hash of names and sizes) and how models see them."""
    found: dict[str, dict[str, str | int]] = {}
    for cell in cells:
        if cell.pictures.name in found:
            continue
        digest = hashlib.sha256()
        for path in cell.pictures.paths:
            told = f"{path.parent.name}/{path.name}/{path.stat().st_size}"
            digest.update(told.encode(errors="surrogateescape"))
        if cell.pictures.whole:
            seen = "whole, resized to the model's input where they are not of its size"
        elif cell.change is not None:
            seen = "at 64 px and more Resize(256), CenterCrop(224), then corrupted; whole from there on"
        else:
            seen = "at 64 px and more the middle, at the model's input size and crop_pct; else whole"
        if cell.pictures.made:
            seen = f"{cell.pictures.made}; {seen}"
        if cell.pictures.border:
            seen = f"without the {cell.pictures.border} px of its border; {seen}"
        folder = str(cell.pictures.paths[0].parent.parent)
        found[cell.pictures.name] = {
            "folder": folder, "pictures": len(cell.pictures.paths), "sha256": digest.hexdigest(), "seen": seen,
            "labels": cell.pictures.labelled,
        }  # fmt: skip
    return found


def _check_models(models: Sequence[Model]) -> None:
    """Raises ValueError: they do not have the same number of classes."""
    if len({model.num_classes for model in models}) > 1:
        told = ", ".join(f"{model.name} {model.num_classes}" for model in models)
        raise ValueError(f"--model: they have different numbers of classes ({told}); compare models of one task")


def _check_transfer(models: Sequence[Model]) -> None:
    """Raises ValueError: one model's pictures cannot be shown to another."""
    if len(models) < 2:
        raise ValueError("--transfer: pictures made on one model are shown to the others; give two --model at least")
    first = models[0]
    other = next((model for model in models if model.view != first.view), None)
    if other is not None:
        told = [f"{model.name} {tuple(model.view)}" for model in (first, other)]
        raise ValueError(
            f"--transfer: models see other cuts of a picture ({', '.join(told)}: size, crop_pct, interpolation, ...), "
            "so pictures made on one mean nothing to the other; compare models of one view, or leave it out"
        )
