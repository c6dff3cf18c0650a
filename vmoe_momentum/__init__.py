"""V-MoE vision transformers whose sparse mixture-of-experts layers carry momentum across depth.

net = vmoe_momentum.create_model("vmoe_small_patch32_224", rule=vmoe_momentum.HeavyBall(mu=0.7))
"""

from .models import PixelModel, UpcycledViT, create_model, from_flax, read_flax
from .moe import ExpertChoiceRouter, GShardRouter, M6TRouter, SoftRouter, TopKRouter
from .momentum import SAM, Adam, Complex, HeavyBall, Nesterov, Residual, Robust

__all__ = [
    "SAM",
    "Adam",
    "Complex",
    "ExpertChoiceRouter",
    "GShardRouter",
    "HeavyBall",
    "M6TRouter",
    "Nesterov",
    "PixelModel",
    "Residual",
    "Robust",
    "SoftRouter",
    "TopKRouter",
    "UpcycledViT",
    "create_model",
    "from_flax",
    "read_flax",
]
