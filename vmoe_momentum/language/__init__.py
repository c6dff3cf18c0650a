"""Sparse language models with the same rules, routers and sparse layers as the vision networks.

B streams of text, N tokens of a block of text, L positions looked back on, D width, V words, H heads, d = D / H.
"""

from ..lazily import lazily

__all__ = [
    "Cache",
    "DenseBlock",
    "LanguageModule",
    "Read",
    "SIZES",
    "SparseBlock",
    "SparseLanguageModel",
    "create_language_model",
]

__getattr__, __dir__ = lazily(
    __name__,
    {
        "blocks": ("DenseBlock", "SparseBlock"),
        "module": ("LanguageModule",),
        "names": ("SIZES", "create_language_model"),
        "network": ("Cache", "Read", "SparseLanguageModel"),
    },
)
