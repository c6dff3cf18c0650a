"""Flipped bytes: whatever fit and import write is either read as it was written, or refused."""

import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from analysis_helpers import tiny, write_checkpoint
from cli_helpers import fails
from flips import flipped, turned

from vmoe_momentum import UpcycledViT, create_model
from vmoe_momentum.files.checksums import SEALED, listed, sealed, verify_archive, verify_folder
from vmoe_momentum.models.directory import save
from vmoe_momentum.models.saved import KEY, open_saved, read_checkpoint
from vmoe_momentum.training import AtomicCheckpointIO

FLIPS = [pytest.param(6), pytest.param(50, marks=pytest.mark.long)]
CONFIG = Path(__file__).parent.parent / "configs" / "digits.yaml"


def as_fit_writes(path: Path) -> Path:
    content = torch.load(write_checkpoint(tiny(), path))
    content[KEY]["class_names"] = [f"class {k}" for k in range(10)]
    AtomicCheckpointIO().save_checkpoint(content, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return as_fit_writes(tmp_path_factory.mktemp("sealed") / "last.ckpt")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("imported") / "net"
    save(tiny(), path)
    return path


def read_is_refused_or_equal(read, expected: dict) -> bool:
    """Was it refused? Raises AssertionError: other tensors or names."""
    try:
        found = read()
    except ValueError as error:
        assert "\n" not in str(error).split(" (")[0]
        return True
    assert all(torch.equal(found["state_dict"][name], value) for name, value in expected["state_dict"].items())
    assert found[KEY] == expected[KEY] and found["epoch"] == expected["epoch"]
    return False


@pytest.mark.parametrize("count", FLIPS)
@pytest.mark.parametrize("kind", ["as fit writes", "without a checksum"])
def test_flipped_bytes_of_a_checkpoint(checkpoint: Path, kind: str, count: int, tmp_path: Path) -> None:
    expected = torch.load(checkpoint, weights_only=True)
    if kind == "without a checksum":  # of an earlier version: the CRC32 of each record is read instead
        torch.save(expected, tmp_path / "old.ckpt")
    content, path = (tmp_path / "old.ckpt" if kind != "as fit writes" else checkpoint).read_bytes(), tmp_path / "x.ckpt"
    refused = 0
    for changed in flipped(content, count):
        path.write_bytes(changed)
        both = [
            read_is_refused_or_equal(read, expected)
            for read in (lambda: read_checkpoint(path), lambda: AtomicCheckpointIO().load_checkpoint(path))
        ]
        refused += all(both)
    assert refused == count if kind == "as fit writes" else refused > count / 2


def test_every_byte_at_the_end_of_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """The archive's last record and the checksum itself: refused, or read as written."""
    content, path, expected = checkpoint.read_bytes(), tmp_path / "x.ckpt", torch.load(checkpoint, weights_only=True)
    for place in range(1, SEALED + 30, 9):
        path.write_bytes(turned(content, len(content) - place))
        read_is_refused_or_equal(lambda: read_checkpoint(path), expected)


def test_records_and_tools_see_an_ordinary_archive(checkpoint: Path) -> None:
    with zipfile.ZipFile(checkpoint) as archive:
        assert archive.testzip() is None and archive.comment.startswith(b"vmoe_momentum sha256 ")
    assert open_saved(str(checkpoint)).build().net.num_classes == 10
    for mapped in (True, False):
        assert torch.load(checkpoint, mmap=mapped)["epoch"] == 0


@pytest.mark.parametrize("sizes", [[1] * 60, [100], [22, 22], [21, 1, 30], [5, 40, 3]])
def test_sealing_in_any_pieces(sizes: list[int], tmp_path: Path) -> None:
    content = bytes(range(256))[: sum(sizes) - 2] + b"\0\0"
    with (tmp_path / "x").open("wb") as file, sealed(file) as archive:
        for size in sizes:
            assert archive.write(content[:size]) == size
            content = content[size:]
    verify_archive(tmp_path / "x")
    assert (tmp_path / "x").stat().st_size == sum(sizes) + SEALED


def test_what_has_no_checksums_is_read_with_a_remark(tmp_path: Path, capsys) -> None:
    path = write_checkpoint(tiny(), tmp_path / "old.ckpt")  # plain torch.save
    save(tiny(), tmp_path / "net")
    (tmp_path / "net" / "checksums.json").unlink()
    for _ in range(2):
        open_saved(str(path)).build()
        create_model(f"local-dir:{tmp_path / 'net'}")
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "old.ckpt: written without a sha256" in told[0]
    assert "net: written without checksums" in told[1]


# ---- folders


@pytest.mark.parametrize("count", FLIPS)
def test_flipped_bytes_of_an_imported_directory(directory: Path, count: int, tmp_path: Path) -> None:
    place, expected = tmp_path / "net", tiny().state_dict()
    for file in sorted(path.name for path in directory.iterdir()):
        for changed in flipped((directory / file).read_bytes(), count):
            shutil.copytree(directory, place, dirs_exist_ok=True)
            (place / file).write_bytes(changed)
            try:
                found = create_model(f"local-dir:{place}")
            except ValueError:
                continue
            assert file == "checksums.json"  # a space, say
            assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())


def test_a_list_is_of_every_file_and_of_itself(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.bin", "deep/b.bin", "README.md"):
        (tmp_path / name).write_text(name)
    told = listed(tmp_path, {"class_names": ["cat", "dog"]})
    (tmp_path / "metadata.json").write_text(json.dumps(told))
    verify_folder(tmp_path)
    assert set(told["sha256"]) == {"a.bin", "deep/b.bin", "README.md"}
    (tmp_path / "README.md").write_text("edited by hand: read by people only")
    verify_folder(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps({**told, "class_names": ["dog", "cat"]}))
    with pytest.raises(ValueError, match="metadata.json is damaged: its content is not that of its own sha256"):
        verify_folder(tmp_path)
    (tmp_path / "metadata.json").write_text(json.dumps(told, indent=3))  # laid out otherwise, the same content
    (tmp_path / "deep" / "b.bin").unlink()
    with pytest.raises(ValueError, match=r"b.bin is missing: metadata.json lists it"):
        verify_folder(tmp_path)
    (tmp_path / "metadata.json").write_text('{"title": "of another program"}')
    verify_folder(tmp_path)


# ---- every reader

FILE = {
    "fit": [f"--config={CONFIG}", "--data.root={d}", "--ckpt_path={c}"],
    "validate": [f"--config={CONFIG}", "--data.root={d}", "--ckpt_path={c}"],
    "test": [f"--config={CONFIG}", "--data.root={d}", "--ckpt_path={c}"],
    "predict": [f"--config={CONFIG}", "--data.root={d}", "--ckpt_path={c}"],
    "robustness": ["--model={c}", "--data={d}", "--out={t}/o"],
    "export": ["--ckpt_path={c}", "--to=state-dict", "--data={d}", "--out={t}/o"],
    "analyze load": ["--data=FolderDataModule", "--data.root={d}", "--model={c}", "--out={t}/o"],
}
FOLDER = {
    "robustness": ["--model=local-dir:{c}", "--data={d}", "--out={t}/o"],
    "export": ["--ckpt_path=local-dir:{c}", "--to=state-dict", "--data={d}", "--out={t}/o"],
    "analyze load": ["--data=FolderDataModule", "--data.root={d}", "--model=local-dir:{c}", "--out={t}/o"],
    "import timm": ["--source=local-dir:{c}", "--out={t}/o"],
}


@pytest.mark.parametrize("command", [f"{name} file" for name in FILE] + [f"{name} folder" for name in FOLDER])
def test_every_reader_refuses(
    command: str, checkpoint: Path, directory: Path, digits: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    name, _, kind = command.rpartition(" ")
    if kind == "file":
        bad = tmp_path / "bad.ckpt"
        bad.write_bytes(turned(checkpoint.read_bytes(), checkpoint.stat().st_size // 2))
    else:
        bad = tmp_path / "bad"
        shutil.copytree(directory, bad)
        weights = bad / "model.safetensors"
        weights.write_bytes(turned(weights.read_bytes(), weights.stat().st_size // 2))
    words = (FILE if kind == "file" else FOLDER)[name]
    line = fails([*name.split(), *[word.format(c=bad, d=digits, t=tmp_path) for word in words]], capsys)
    assert "is damaged: its bytes are not" in line and str(bad) in line


def test_readers_of_other_makes(checkpoint: Path, directory: Path, tmp_path: Path) -> None:
    """What has no command of its own: a backbone to upcycle, Lightning's own way to a checkpoint."""
    bad = tmp_path / "bad"
    shutil.copytree(directory, bad)
    (bad / "config.json").write_text((bad / "config.json").read_text().replace("0.5", "0.6"))
    with pytest.raises(ValueError, match="backbone=local-dir:.*config.json is damaged"):
        UpcycledViT(f"local-dir:{bad}", pretrained=True)
    cut = tmp_path / "x.ckpt"
    cut.write_bytes(turned(checkpoint.read_bytes(), 5000))
    with pytest.raises(ValueError, match="ckpt_path=.*x.ckpt is damaged"):
        AtomicCheckpointIO().load_checkpoint(cut)
