"""Any classifier, whoever trained it, as the robustness benchmark wants it."""

from .opening import open_models, view_of

__all__ = ["open_models", "view_of"]
