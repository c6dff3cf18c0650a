"""Networks: timm's vision transformer with sparse momentum blocks, the names they are registered under, weights in."""

from .blocks import DenseBlock, MomentumBlock
from .factory import create_model
from .flax_checkpoint import read_flax
from .flax_import import from_flax
from .pixels import PixelModel
from .upcycling import UpcycledViT
from .variants import default_cfgs
from .vit import MomentumVisionTransformer

__all__ = [
    "DenseBlock",
    "MomentumBlock",
    "MomentumVisionTransformer",
    "PixelModel",
    "UpcycledViT",
    "create_model",
    "default_cfgs",
    "from_flax",
    "read_flax",
]
