"""Sparse mixture-of-experts layers: tokens in, tokens out. Knows nothing of momentum, timm or Lightning.

Axis letters, everywhere in this folder: B images, N tokens an image, D width, G routing groups, S tokens a group
(T = B*N = G*S tokens), E experts, K experts chosen by a token, C capacity (slots an expert has in a group), F hidden
width of an expert, R rows handed to the experts.
"""

from .experts import Experts
from .layer import SparseMlp
from .plan import TopKPlan, buffer_index, capacity
from .routing import Router, RouterLosses, TopKRouter

__all__ = ["Experts", "Router", "RouterLosses", "SparseMlp", "TopKPlan", "TopKRouter", "buffer_index", "capacity"]
