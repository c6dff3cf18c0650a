"""Instruments that read trained networks. What they show and how to read it: this folder's README.md."""

from .ablate import ablate, parse_axis
from .compare import compare
from .load import load
from .norms import norms
from .output import Files
from .pareto import pareto
from .sensitivity import sensitivity
from .spectrum import spectrum
from .stability import residual_radius, spectral_radius, step_size
from .subjects import open_subjects
from .trace import record, sample

__all__ = [
    "Files",
    "ablate",
    "compare",
    "load",
    "norms",
    "open_subjects",
    "pareto",
    "parse_axis",
    "record",
    "residual_radius",
    "sample",
    "sensitivity",
    "spectral_radius",
    "spectrum",
    "step_size",
]
