"""Checkpoints that many devices write together: a folder, each device's tensors in files of its own.

These files are torch.distributed.checkpoint's, so that any number of devices reads them; rest.pt is the checkpoint with
a note in place of each spread tensor, and checksums.json lists the sha256 of all.
"""

import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from ..files.checksums import LISTS, seal_folder, sha256
from ..files.staging import remove_abandoned, staged
from ..resources import room_for

REST, NOTE = "rest.pt", "vmoe_momentum_shard"  # the key of a note, whose value is the tensor's name in the files
Group = dist.ProcessGroup | None


def is_sharded(path: Path) -> bool:
    """Of a folder that a process was killed in replacing, too: the previous one is put back."""
    if not path.exists():
        remove_abandoned(path)
    return (path / REST).is_file()


def is_checkpoint(path: Path) -> bool:
    """A file, or such a folder."""
    return path.is_file() or is_sharded(path)


def write_sharded(checkpoint: dict[str, Any], path: Path, group: Group = None) -> None:
    """By all ranks of the group together: `path` becomes the whole new checkpoint, or stays the one it was.

    Raises OSError: no room on some rank's disk, or no right; on every rank.
    """
    with ExitStack() as stack:
        shards, rest, draft = _begin(checkpoint, path, stack, group)
        with _room(path, shards):
            state_dict_saver.save(shards, storage_writer=FileSystemWriter(draft), process_group=group)
        _end(rest, draft, stack, group)


def write_sharded_later(
    checkpoint: dict[str, Any], path: Path, group: Group, ends: Executor, writing: AbstractContextManager[object]
) -> Future[None]:
    """The same, but returns once all is copied to this machine's memory; training may go on.

    group: For CPUs, used by nothing else meanwhile. ends: One thread, for what follows the tensors. writing: Entered
    there. The future raises what `write_sharded` does.
    """
    with ExitStack() as stack:
        shards, rest, draft = _begin(checkpoint, path, stack, group)
        with _room(path, shards):
            writer = FileSystemWriter(draft)
            saving = state_dict_saver.async_save(shards, storage_writer=writer, process_group=group)
        assert isinstance(saving, Future)  # of writers that copy before they return
        later = stack.pop_all()

    def finish() -> None:
        with writing, later:
            with _room(path, shards):
                saving.result()
            _end(rest, draft, later, group)

    return ends.submit(finish)


def _begin(
    checkpoint: dict[str, Any], path: Path, stack: ExitStack, group: Group
) -> tuple[dict[str, DTensor], bytes, Path]:
    """Spread tensors by name, the rest as a file, and the folder to fill, which `stack` gives its name or removes."""
    shards: dict[str, DTensor] = {}
    noted = _noted("", checkpoint, shards)
    rest = BytesIO()
    if dist.get_rank(group) == 0:
        torch.save(noted, rest)
    draft = staged(path, overwrite=True, mark=LISTS[1], for_file=True)
    return shards, rest.getvalue(), _by_first(lambda: stack.enter_context(draft), group)


def _end(rest: bytes, draft: Path, stack: ExitStack, group: Group) -> None:
    """The tensors are written."""
    own = {file.name: sha256(file) for file in draft.glob(f"__{dist.get_rank(group)}_*")}
    digests: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, own, group=group)
    _by_first(lambda: _finish(rest, draft, {k: v for found in digests for k, v in found.items()}), group)
    _by_first(stack.close, group)  # takes its name


@contextmanager
def _room(path: Path, shards: dict[str, DTensor]) -> Iterator[None]:
    """Raises the disk's error, of whichever rank's, with what this rank needs."""
    with room_for(path, sum(shard.to_local().nbytes for shard in shards.values())):
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error


def read_rest(path: Path) -> dict[str, Any]:
    """Without the tensors. Runs no code. Raises what torch.load does."""
    return torch.load(path / REST, weights_only=True, map_location="cpu")


def read_sharded(path: Path) -> dict[str, Any]:
    """The checkpoint as one device would have written it, in this process alone. Runs no code."""
    reader = _Reader(path)
    known = cast(dict[str, TensorStorageMetadata], reader.read_metadata().state_dict_metadata)  # all that is spread
    shards = {name: torch.empty(told.size, dtype=told.properties.dtype) for name, told in known.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        state_dict_loader.load(shards, storage_reader=reader, no_dist=True)
    return _filled(read_rest(path), shards)


def read_into(path: Path, checkpoint: dict[str, Any], group: Group = None) -> dict[str, Any]:
    """By all ranks together: what lies at `path`, its tensors read into those that `checkpoint` has at their places.

    Raises ValueError: they do not fit.
    """
    rest = read_rest(path)
    own: dict[str, DTensor] = {}
    _noted("", checkpoint, own)
    try:
        shards = {name: own[name] for name in _names(rest)}
        state_dict_loader.load(shards, storage_reader=_Reader(path), process_group=group)
    except (KeyError, CheckpointException) as error:
        why = f"no {error} here" if isinstance(error, KeyError) else _cause(error)
        raise ValueError(f"ckpt_path={path}: its tensors do not fit this network or optimizer ({why})") from error
    return _filled(rest, shards)


class _Reader(FileSystemReader):
    """torch's, but for its index, which is a pickle and might hold code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        return metadata


class _Unpickler(pickle.Unpickler):
    _KNOWN = {"torch": {"Size", "device", "float32", "float64", "bfloat16", "float16", "int64", "int32", "bool"}}

    def find_class(self, module: str, name: str) -> Any:
        ours = module.startswith("torch.distributed.checkpoint.") or module in ("pathlib", "pathlib._local")
        plain = (module, name) in {("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}
        if ours or plain or name in self._KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} is not what an index of tensors holds")


def _noted(place: str, value: Any, shards: dict[str, DTensor]) -> Any:
    """With notes in place of spread tensors, which go into `shards`."""
    if isinstance(value, DTensor):
        shards[place] = value
        return {NOTE: place}
    if isinstance(value, dict):
        return {key: _noted(f"{place}/{key}", item, shards) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_noted(f"{place}/{n}", item, shards) for n, item in enumerate(value))
    return value


def _filled(value: Any, shards: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict):
        return shards[value[NOTE]] if value.keys() == {NOTE} else {k: _filled(v, shards) for k, v in value.items()}
    return type(value)(_filled(item, shards) for item in value) if isinstance(value, list | tuple) else value


def _names(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {value[NOTE]} if value.keys() == {NOTE} else set().union(*map(_names, value.values()))
    return set().union(*map(_names, value)) if isinstance(value, list | tuple) else set()


def _cause(error: CheckpointException) -> str:
    return str(next(iter(error.failures.values()))[0]).split("\n")[0]


def _finish(rest: bytes, draft: Path, digests: dict[str, str]) -> None:
    with room_for(draft, len(rest)), (draft / REST).open("wb") as file:
        file.write(rest)
        file.flush()
        os.fsync(file.fileno())
    seal_folder(draft, digests)


def _by_first(action: Callable[[], Any], group: Group) -> Any:
    """What the first rank makes of it, or its error, on all."""
    told: list[Any] = [None, None]
    if dist.get_rank(group) == 0:
        try:
            told[0] = action()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, group=group, group_src=0)
    if told[1] is not None:
        raise told[1]
    return told[0]
