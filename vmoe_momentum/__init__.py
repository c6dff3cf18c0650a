"""V-MoE vision transformers whose sparse mixture-of-experts layers carry momentum across depth.

net = vmoe_momentum.create_model("vmoe_small_patch32_224", rule=vmoe_momentum.HeavyBall(mu=0.7))
"""

from .models import PixelModel, create_model
from .moe import TopKRouter
from .momentum import HeavyBall, Residual

__all__ = ["HeavyBall", "PixelModel", "Residual", "TopKRouter", "create_model"]
