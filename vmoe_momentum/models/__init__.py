"""Networks: timm's vision transformer with sparse momentum blocks, and the names they are registered under."""

from .blocks import DenseBlock, MomentumBlock
from .factory import create_model
from .pixels import PixelModel
from .variants import default_cfgs
from .vit import MomentumVisionTransformer

__all__ = ["DenseBlock", "MomentumBlock", "MomentumVisionTransformer", "PixelModel", "create_model", "default_cfgs"]
