"""Sparse mixture-of-experts layers: tokens in, tokens out. Knows nothing of momentum, timm or Lightning.

Axis letters, everywhere in this folder: B images, N tokens an image, D width, G routing groups, S tokens a group
(T = B*N = G*S tokens), E experts, K experts chosen by a token, C capacity (slots an expert has in a group), F hidden
width of an expert, R rows handed to the experts.
"""

from .consistency import router_consistency
from .dispatch import TopKPlan, buffer_index, capacity
from .expert_choice import ExpertChoicePlan, ExpertChoiceRouter
from .experts import Experts
from .gshard import GShardRouter
from .layer import SparseMlp
from .m6t import M6TRouter
from .routing import Plan, Router, RouterLosses
from .soft import SoftPlan, SoftRouter
from .token_choice import TopKRouter

__all__ = [
    "ExpertChoicePlan",
    "ExpertChoiceRouter",
    "Experts",
    "GShardRouter",
    "M6TRouter",
    "Plan",
    "Router",
    "RouterLosses",
    "SoftPlan",
    "SoftRouter",
    "SparseMlp",
    "TopKPlan",
    "TopKRouter",
    "buffer_index",
    "capacity",
    "router_consistency",
]
