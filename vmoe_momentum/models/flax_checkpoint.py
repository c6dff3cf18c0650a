"""Reading V-MoE checkpoints of google-research/vmoe without jax: a flat .npz, or the official index and data shards."""

import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from .flax_shards import from_bfloat16, read_shards, some


def read_flax(source: str) -> dict[str, np.ndarray]:
    """Parameters by `/`-joined name, float32, exactly as stored (nothing transposed).

    source: a .npz file, or the prefix of PREFIX.index and PREFIX.data-nnnnn-of-NNNNN (one of these files will do too).
    Of a train state only what lies below `params` is read.

    Raises FileNotFoundError: a file is missing, named. ValueError: a file is damaged, incomplete or of another kind.
    """
    path = Path(source)
    if path.suffix == ".npz":
        return _finite(source, _below_params(source, _read_npz(path)))
    if path.is_dir():
        raise FileNotFoundError(f"source={source}: a folder; give a .npz file, or a checkpoint's prefix")
    prefix = path.with_name(re.sub(r"\.(index|data-\d+-of-\d+)$", "", path.name))
    return _finite(source, read_shards(prefix))


def _finite(source: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    broken = [name for name, array in arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise ValueError(f"source={source}: not finite, so damaged: {some(broken)}; fetch the checkpoint again")
    return arrays


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"source={path}: no such file")
    try:
        with np.load(path, allow_pickle=False) as file:
            if len(set(file.files)) < len(file.files):
                raise ValueError("a name comes twice")
            return {name: _as_float32(file[name]) for name in file.files}
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        MemoryError,
        OSError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:
        reason = str(error).split("\n")[0] or type(error).__name__
        raise ValueError(f"source={path}: not a readable .npz ({reason}); fetch the checkpoint again") from error


def _as_float32(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.dtype("V2"):  # numpy's way to save bfloat16
        return from_bfloat16(array.view("<u2"))
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _below_params(source: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Without the `params/` of a train state, and without its other branches."""
    if any(name.startswith("params/") for name in arrays):
        arrays = {name.removeprefix("params/"): a for name, a in arrays.items() if name.startswith("params/")}
    wrong = [name for name, array in arrays.items() if array.dtype != np.float32]
    if wrong:
        raise ValueError(f"source={source}: not floating-point: {some(wrong)}; leave them out of the file")
    return arrays
