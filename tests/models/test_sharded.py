"""Checkpoints that ranks write together: whole or not at all, and read by any number of ranks."""

import errno
import os
import pickle
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from vmoe_momentum.files.checksums import verify_folder
from vmoe_momentum.models.sharded import is_sharded, read_into, read_rest, read_sharded, write_sharded
from vmoe_momentum.training.later import Later
from vmoe_momentum.training.resuming import AtomicCheckpointIO

WHOLE = {"wide": torch.arange(30.0).reshape(5, 6), "half": torch.arange(8).bfloat16()}  # rows do not divide


def checkpoint(ranks: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (ranks,))
    spread = {name: distribute_tensor(t.clone(), mesh, [Shard(0)]) for name, t in tensors.items()}
    states = [{"state": {0: {"exp_avg": spread["wide"], "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]}]
    return {"state_dict": spread, "optimizer_states": states, "epoch": 2, "plain": torch.ones(())}


def write(rank: int, path: str) -> None:
    write_sharded(checkpoint(dist.get_world_size(), WHOLE), Path(path))
    assert is_sharded(Path(path))


def read(rank: int, path: str) -> None:
    empty = checkpoint(dist.get_world_size(), {name: torch.zeros_like(t) for name, t in WHOLE.items()})
    found = read_into(Path(path), empty)
    for name, tensor in WHOLE.items():
        assert torch.equal(found["state_dict"][name].full_tensor(), tensor)
    assert torch.equal(found["optimizer_states"][0]["state"][0]["exp_avg"].full_tensor(), WHOLE["wide"])
    with pytest.raises(ValueError, match="ckpt_path=.*: its tensors do not fit this network or optimizer"):
        read_into(Path(path), {"state_dict": {}})
    wrong = checkpoint(dist.get_world_size(), {"wide": torch.zeros(7, 6), "half": torch.zeros(8)})
    with pytest.raises(ValueError, match="ckpt_path=.*: its tensors do not fit this network or optimizer"):
        read_into(Path(path), wrong)


def replace(rank: int, path: str) -> None:
    """A second one takes the first one's place; one that fails on the last rank leaves it."""
    first = read_rest(Path(path))
    again = checkpoint(dist.get_world_size(), {name: t + 1 for name, t in WHOLE.items()}) | {"epoch": 3}
    write_sharded(again, Path(path))
    assert (first["epoch"], read_rest(Path(path))["epoch"]) == (2, 3)
    dist.barrier()
    broken = checkpoint(dist.get_world_size(), WHOLE) | {"epoch": 4}
    full = OSError(errno.ENOSPC, "No space left on device")
    last = rank == dist.get_world_size() - 1
    failing = patch.object(dcp.FileSystemWriter, "write_data", side_effect=full) if last else nullcontext()
    with failing, pytest.raises(OSError, match=r"last.ckpt: No space left on device \(about \d+ bytes needed"):
        write_sharded(broken, Path(path))
    dist.barrier()
    assert read_rest(Path(path))["epoch"] == 3
    verify_folder(Path(path))


def assert_whole(path: Path, more: float = 0.0) -> None:
    found = read_sharded(path)
    for name, tensor in WHOLE.items():
        assert torch.equal(found["state_dict"][name], tensor + more)
    assert found["optimizer_states"][0]["param_groups"] == [{"lr": 0.1}]
    assert float(found["optimizer_states"][0]["state"][0]["step"]) == 3
    verify_folder(path)


def replace_later(rank: int, path: str) -> None:
    """What is trained meanwhile is not in it; one that fails on the last rank leaves what was there."""
    later, place = Later(), Path(path)
    trained = checkpoint(dist.get_world_size(), {name: t + 1 for name, t in WHOLE.items()}) | {"epoch": 3}
    gone = []
    with patch.object(dcp.FileSystemWriter, "write_data", slow(dcp.FileSystemWriter.write_data)):
        later.write(trained, place, nullcontext())
        for tensor in trained["state_dict"].values():
            tensor.fill_(-1)
        trained["optimizer_states"][0]["state"][0]["step"].fill_(-1)
        later.then(lambda: gone.append(read_rest(place)["epoch"]))
        assert read_rest(place)["epoch"] == 2 and not gone  # the previous one is kept
        later.finish()
    assert gone == [3]
    dist.barrier()
    assert_whole(place, more=1.0)
    full = OSError(errno.ENOSPC, "No space left on device")
    last = rank == dist.get_world_size() - 1
    with patch.object(dcp.FileSystemWriter, "write_data", side_effect=full) if last else nullcontext():
        later.write(checkpoint(dist.get_world_size(), WHOLE) | {"epoch": 4}, place, nullcontext())
        later.then(lambda: gone.append("what it was to replace"))
        with pytest.raises(OSError, match=r"last.ckpt: No space left on device \(about \d+ bytes needed"):
            later.finish()
    later.check()
    later.close()
    assert gone == [3] and read_rest(place)["epoch"] == 3
    later.write(checkpoint(dist.get_world_size(), WHOLE) | {"epoch": 5}, place, nullcontext())  # of another fit
    later.close()
    dist.barrier()
    assert read_rest(place)["epoch"] == 5


def slow(write: Any) -> Any:
    def slowly(*args: Any) -> Any:
        time.sleep(1.0)
        return write(*args)

    return slowly


def write_read_replace(rank: int, path: str) -> None:
    write(rank, path)
    read(rank, path)
    replace(rank, path)
    dist.barrier()
    write(rank, path)
    dist.barrier()
    replace_later(rank, path)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """One rank, in this process."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_any_number_of_ranks_reads_what_two_wrote(tmp_path: Path, alone: None) -> None:
    path = tmp_path / "last.ckpt"
    on_ranks(2, write, tmp_path, str(path))
    read(0, str(path))
    assert_whole(path)


@pytest.mark.slow
def test_a_checkpoint_takes_the_place_of_another_or_leaves_it(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    on_ranks(2, write_read_replace, tmp_path, str(path))
    assert_whole(path)
    assert not list(tmp_path.glob(".*.partial"))


def test_a_file_and_a_folder_take_each_others_place(tmp_path: Path, alone: None) -> None:
    """Of a run that goes on with the other kind of checkpoints."""
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    for _ in range(2):
        io.save_checkpoint({"epoch": 1}, path)
        assert path.is_file() and io.load_checkpoint(path) == {"epoch": 1}
        write(0, str(path))
        assert path.is_dir()
        assert_whole(path)
    other = tmp_path / "theirs.ckpt"
    other.mkdir()
    (other / "notes.txt").touch()  # whatever it is, it is not ours to remove
    with pytest.raises(ValueError, match="not written by this command"):
        write(0, str(other))
    with pytest.raises(IsADirectoryError):
        io.save_checkpoint({"epoch": 1}, other)
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", "theirs.ckpt", "store"}


@pytest.mark.long
def test_two_ranks_read_what_four_wrote(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    on_ranks(4, write, tmp_path, str(path))
    (tmp_path / "two").mkdir()
    on_ranks(2, read, tmp_path / "two", str(path))


def test_damage_is_noticed_and_no_code_is_run(tmp_path: Path, alone: None) -> None:
    path = tmp_path / "last.ckpt"
    write(0, str(path))
    shard = next(path.glob("__0_*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        verify_folder(path)

    class Code:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    (path / ".metadata").write_bytes(pickle.dumps(Code()))
    with pytest.raises(pickle.UnpicklingError, match="mkdir is not what an index of tensors holds"):
        read_sharded(path)
    assert not (tmp_path / "ran").exists()


def test_one_that_was_being_replaced_comes_back(tmp_path: Path, alone: None) -> None:
    """A process killed between the two renames."""
    path = tmp_path / "last.ckpt"
    write(0, str(path))
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
    draft = tmp_path / f".last.ckpt.{boot}-x.partial"
    draft.mkdir()
    (draft / "lock").touch()
    path.rename(draft / "old")
    assert is_sharded(path)
    assert_whole(path)
