"""The one place that knows ffcv is optional, slow to load, and changes torch's thread count when loaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch


def ffcv_available() -> bool:
    """Whether the package ffcv is installed; it is not loaded."""
    return importlib.util.find_spec("ffcv") is not None


def missing_ffcv(problem: str = "is not installed") -> ValueError:
    """The error for an ffcv that is needed and cannot be had."""
    return ValueError(
        f"data.class_path=FFCVDataModule: the package ffcv {problem}; pip install 'vmoe_momentum[ffcv]' (needs"
        " pkg-config, libturbojpeg0-dev, libopencv-dev), or use FolderDataModule"
    )


@contextmanager
def using_ffcv() -> Iterator[None]:
    """Around `import ffcv` and the building of its loaders: torch keeps its thread count, which both would change for
    the rest of the process. Raises ValueError when ffcv or a library under it does not load.

    ffcv 1.0 keeps the codes of its two image modes in numba's typed dict, which compiles for five seconds; it only ever
    looks them up outside of compiled code, so an ordinary dict does.
    """
    import torch  # here: preparing and verifying data work without

    threads = torch.get_num_threads()
    try:
        import numba.typed

        with patch.object(numba.typed, "Dict", dict):
            import ffcv.fields.rgb_image  # noqa: F401
        yield
    except ImportError as error:
        raise missing_ffcv(f"does not load ({error})") from error
    finally:
        torch.set_num_threads(threads)
