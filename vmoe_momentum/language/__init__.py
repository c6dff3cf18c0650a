"""Sparse language models with the same rules, routers and sparse layers as the vision networks.

B streams of text, N tokens of a block of text, L positions looked back on, D width, V words, H heads, d = D / H.
"""

from .blocks import DenseBlock, SparseBlock
from .names import SIZES, create_language_model
from .network import Cache, Read, SparseLanguageModel

__all__ = ["SIZES", "Cache", "DenseBlock", "Read", "SparseBlock", "SparseLanguageModel", "create_language_model"]
