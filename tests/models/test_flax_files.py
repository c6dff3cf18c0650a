"""Reading checkpoints: bit for bit, in any number of shards and pieces, and by name when something is wrong."""

import json
import shutil
import warnings
import zipfile
from pathlib import Path

import msgpack
import numpy as np
import pytest
from flax_files import pack, pack_box, random_params, shard_path, truncated, write_official
from oracle_files import FOLDER

from vmoe_momentum import read_flax

OFFICIAL = FOLDER / "official_checkpoint"
EXPECTED = np.load(OFFICIAL / "expected.npz")


def assert_equal(read: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert read.keys() == expected.keys()
    for name, array in read.items():
        assert array.dtype == np.float32
        assert array.shape == expected[name].shape
        assert array.tobytes() == np.ascontiguousarray(expected[name]).tobytes(), name


@pytest.mark.parametrize("prefix", json.loads(str(EXPECTED["meta_json"]))["prefixes"])
def test_the_official_samples_bit_for_bit(prefix: str) -> None:
    expected = {name.removeprefix("params/"): EXPECTED[name] for name in EXPECTED.files if name.startswith("params/")}
    assert len(expected) == 76
    assert_equal(read_flax(str(OFFICIAL / prefix)), expected)


@pytest.mark.parametrize("train_state", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 7])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_boxes_in_any_shards(tmp_path: Path, shards: int, train_state: bool, seed: int) -> None:
    """More than ten blocks too: `encoderblock_10` is numbered before `encoderblock_2`."""
    params = random_params(seed, depth=12, moe=(1, 11))
    write_official(tmp_path / "c.k", params, shards, train_state=train_state, seed=seed)
    for source in ("c.k", "c.k.index", f"c.k.data-00000-of-{shards:05d}"):
        assert_equal(read_flax(str(tmp_path / source)), params)


def test_bfloat16(tmp_path: Path) -> None:
    params = truncated(random_params())
    write_official(tmp_path / "c", params, 2, bfloat16=True)
    assert_equal(read_flax(str(tmp_path / "c")), params)
    halves = {name: (array.view(np.uint32) >> 16).astype("<u2").view("V2") for name, array in params.items()}
    np.savez(tmp_path / "c.npz", **halves)  # as numpy saves jax's bfloat16
    assert_equal(read_flax(str(tmp_path / "c.npz")), params)


def test_npz_with_and_without_a_train_state(tmp_path: Path) -> None:
    params = random_params()
    np.savez(tmp_path / "a.npz", **params)
    assert_equal(read_flax(str(tmp_path / "a.npz")), params)
    np.savez_compressed(tmp_path / "b.npz", step=3, **{f"params/{name}": array for name, array in params.items()})
    assert_equal(read_flax(str(tmp_path / "b.npz")), params)
    np.savez(tmp_path / "c.npz", **{name: array.astype(np.float64) for name, array in params.items()})
    assert_equal(read_flax(str(tmp_path / "c.npz")), params)


class Damage:
    """A checkpoint of three shards that tests break in one place each."""

    def __init__(self, folder: Path) -> None:
        self.prefix, self.params = folder / "c", random_params()
        write_official(self.prefix, self.params, 3, seed=3)
        self.index = self.prefix.with_name("c.index")

    def shard(self, number: int) -> Path:
        return shard_path(self.prefix, number, 3)

    def edit(self, path: Path, change) -> None:
        value = msgpack.unpackb(path.read_bytes())
        path.write_bytes(pack(change(value) or value))

    def leaf(self, number: int) -> str:
        """A leaf that this shard holds whole or in part."""
        return next(key for key in msgpack.unpackb(self.shard(number).read_bytes()) if key.isdecimal())

    def refuses(self, error: type[Exception], *words: str) -> None:
        with pytest.raises(error) as caught:
            read_flax(str(self.prefix))
        for word in words:
            assert word in str(caught.value)


@pytest.fixture
def damage(tmp_path: Path) -> Damage:
    return Damage(tmp_path)


def test_a_cut_off_shard_is_named(damage: Damage) -> None:
    whole = damage.shard(1).read_bytes()
    for length in (0, 1, len(whole) // 2, len(whole) - 1):
        damage.shard(1).write_bytes(whole[:length])
        damage.refuses(ValueError, "c.data-00001-of-00003", "cut off")


def test_a_missing_shard_is_named(damage: Damage) -> None:
    damage.shard(2).unlink()
    damage.refuses(FileNotFoundError, "c.data-00002-of-00003: shard missing, the index announces 3")


def test_another_number_of_shards_is_hinted_at(damage: Damage) -> None:
    damage.shard(2).rename(shard_path(damage.prefix, 2, 4))
    damage.refuses(FileNotFoundError, "c.data-00002-of-00003", "there is c.data-00002-of-00004")


def test_a_duplicated_shard_is_named(damage: Damage) -> None:
    shutil.copy(damage.shard(0), damage.shard(1))
    damage.refuses(ValueError, "c.data-0000")  # pieces of 0 in 1, or too few bytes


def test_exchanged_shards_are_named(damage: Damage) -> None:
    contents = [damage.shard(i).read_bytes() for i in (0, 1)]
    damage.shard(0).write_bytes(contents[1])
    damage.shard(1).write_bytes(contents[0])
    damage.refuses(ValueError, "c.data-0000")


def test_a_lost_piece_is_named(damage: Damage) -> None:
    """The reference gives zeros here."""
    damage.edit(damage.shard(1), lambda value: value[damage.leaf(1)].pop() and None)
    damage.refuses(ValueError, "c.data-00001-of-00003")


def test_a_lost_leaf_is_named(damage: Damage) -> None:
    def lose(value: dict) -> None:
        value.pop(damage.leaf(1))
        value["padding"] = "x" * 100_000

    damage.edit(damage.shard(1), lose)
    damage.refuses(ValueError, "c.data-00001-of-00003", "padding")


def test_a_lost_leaf_is_named_by_its_tensor(damage: Damage) -> None:
    """So small that the file is still long enough for all that is announced."""
    write_official(damage.prefix, damage.params, 1, seed=3)
    path = shard_path(damage.prefix, 0, 1)
    numbers = sorted(damage.params, key=lambda name: name.split("/"))
    damage.edit(path, lambda value: value.pop(str(numbers.index("Encoder/encoder_norm/bias"))) and None)
    damage.refuses(ValueError, "incomplete, announced pieces are missing: Encoder/encoder_norm/bias [(0, ")


def test_a_doubled_piece_is_named(damage: Damage) -> None:
    def double(value: dict) -> None:
        value[damage.leaf(0)] += value[damage.leaf(0)]

    damage.edit(damage.shard(0), double)
    damage.refuses(ValueError, "c.data-00000-of-00003", "comes a second time")


def test_extra_bytes_and_foreign_files_are_named(damage: Damage) -> None:
    whole = damage.shard(0).read_bytes()
    damage.shard(0).write_bytes(whole + b"\x00")
    damage.refuses(ValueError, "c.data-00000-of-00003", "1 extra bytes")
    damage.edit(damage.shard(1), lambda value: value.pop("__msgpack_array_chunk_a87ca2__") and None)
    damage.shard(0).write_bytes(whole)
    damage.refuses(ValueError, "c.data-00001-of-00003", "the marker of a shard is missing")
    damage.shard(1).write_bytes(b"\x93" + bytes(1_000_000))
    damage.refuses(ValueError, "c.data-00001-of-00003", "not a whole shard")


def test_a_shard_of_another_checkpoint_is_named(damage: Damage, tmp_path: Path) -> None:
    write_official(tmp_path / "d", random_params(width=32, heads=4), 3, seed=3)
    shutil.copy(shard_path(tmp_path / "d", 1, 3), damage.shard(1))
    damage.refuses(ValueError, "c.data-00001-of-00003")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda v: v | {"version": "20990101"}, "version '20990101'"),
        (lambda v: v | {"shard_count": 0}, "shard_count=0"),
        (lambda v: v | {"shard_count": "3"}, "shard_count='3'"),
        (lambda v: v | {"index": {"a": 1}}, "neither parameters of a vision transformer"),
        (lambda v: {"a": 1}, "not the index of a V-MoE checkpoint"),
        (lambda v: v | {"index": v["index"] | {"cls": 3}}, "cls: unreadable index entry"),
    ],
)
def test_a_damaged_index_is_named(damage: Damage, change, word: str) -> None:
    damage.edit(damage.index, change)
    damage.refuses(ValueError, "c.index", word)


def test_an_index_that_lost_a_byte_is_named(tmp_path: Path) -> None:
    index, broken = (OFFICIAL / "released_layout.index").read_bytes(), tmp_path / "c.index"
    shard = OFFICIAL / "released_layout.data-00000-of-00001"
    shutil.copy(shard, tmp_path / "c.data-00000-of-00001")
    for offset in range(0, len(index), 61):
        broken.write_bytes(index[:offset] + index[offset + 1 :])
        with pytest.raises((ValueError, FileNotFoundError), match=r"c\.(index|data)"):
            read_flax(str(tmp_path / "c"))


def entry(shape: list[int], boxes: list, shards: list[int], dtype: str = "float32") -> msgpack.ExtType:
    info = pack([shape, dtype, False, {}])
    return msgpack.ExtType(8, pack([info, [pack_box(box) for box in boxes], shards]))


@pytest.mark.parametrize(
    ("cls", "word"),
    [
        (entry([1, 1, 16], [((0, 1), (0, 1), (0, 15))], [0]), "do not cover"),
        (entry([1, 1, 16], [((0, 1), (0, 1), (0, 17))], [0]), "outside of shape"),
        (entry([1, 1, 16], [((0, 1), (0, 1), (0, 9)), ((0, 1), (0, 1), (9, 15)), ((0, 1), (0, 1), (3, 4))], [0] * 3),
         "overlap"),
        (entry([1, 1, 16], [((0, 1), (0, 1), (0, 16))], [5]), "lies in shard 5 of 3"),
        (entry([1, 1, 16], [((0, 1), (0, 1), (0, 16))], [0], "int32"), "cls is int32"),
        (entry([1, 1, 16], [((0, 1), (0, 1), (0, 16))], ["0"]), "unreadable index entry"),
        (entry([1, 1, 16.0], [((0, 1), (0, 1), (0, 16))], [0]), "unreadable index entry"),
        (entry([1, 1, 16], [((0, 1), (0, 1), (0, 16.0))], [0]), "unreadable index entry"),
        (entry([1, 1, 16], [((0, 1), (0, 1), (0, 16))], [0], ["float32"]), "unreadable index entry"),
        (entry([10**7, 10**5], [((0, 10**7), (0, 10**5))], [0]), "announces 4000"),
    ],
)  # fmt: skip
def test_an_index_that_cannot_be_is_refused_before_memory_is_taken(damage: Damage, cls, word: str) -> None:
    damage.edit(damage.index, lambda value: value | {"index": value["index"] | {"cls": cls}})
    damage.refuses(ValueError, "c.index" if "announces" not in word else "c.data-00000-of-00003", word)


def test_an_unversioned_file_is_read_only_where_its_order_is_known(damage: Damage, tmp_path: Path) -> None:
    damage.edit(damage.index, lambda value: value.pop("version") and None)
    assert_equal(read_flax(str(damage.prefix)), damage.params)
    write_official(tmp_path / "t", damage.params, 1, train_state=True)
    damage.edit(tmp_path / "t.index", lambda value: value.pop("version") and None)
    with pytest.raises(ValueError, match="unversioned train state"):
        read_flax(str(tmp_path / "t"))


def test_files_that_are_not_there(tmp_path: Path) -> None:
    (tmp_path / ".tmp.c.index").touch()
    for source, word in (("c", "interrupted save"), ("c.npz", "no such file"), (".", "a folder")):
        with pytest.raises(FileNotFoundError, match=word):
            read_flax(str(tmp_path / source))


def test_damaged_npz_files_are_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **random_params())
    whole = (tmp_path / "a.npz").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    np.savez(tmp_path / "o.npz", cls=np.array([None], dtype=object))
    for content in (b"", whole[: len(whole) // 2], b"hello", bytes(flipped), (tmp_path / "o.npz").read_bytes()):
        (tmp_path / "b.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"b.npz: not a readable .npz"):
            read_flax(str(tmp_path / "b.npz"))
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as file, warnings.catch_warnings(action="ignore"):
        for _ in range(2):
            file.writestr("head/bias.npy", b"x")
    with pytest.raises(ValueError, match=r"b.npz: not a readable .npz \(a name comes twice"):
        read_flax(str(tmp_path / "b.npz"))
    for offset, value in ((8, 77), (6, 1)):  # compression method, encryption flag of the first local header
        flipped = bytearray(whole)
        central = whole.index(b"PK\x01\x02")
        flipped[offset], flipped[central + offset + 2] = value, value
        (tmp_path / "b.npz").write_bytes(flipped)
        with pytest.raises(ValueError, match=r"b.npz: not a readable .npz"):
            read_flax(str(tmp_path / "b.npz"))
    np.savez(tmp_path / "i.npz", **random_params(), step=3)
    with pytest.raises(ValueError, match="not floating-point: step"):
        read_flax(str(tmp_path / "i.npz"))


def test_numbers_that_are_none_are_named(tmp_path: Path) -> None:
    params = random_params()
    params["head/bias"][1] = np.nan
    write_official(tmp_path / "c", params, 2)
    with pytest.raises(ValueError, match="not finite, so damaged: head/bias"):
        read_flax(str(tmp_path / "c"))
