"""Preparing: what is written, what is refused, and that a failure leaves nothing behind."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import HAS_FFCV, draw_pictures, module, requires_ffcv
from PIL import Image

from vmoe_momentum.datasets import FFCVDataModule, FolderDataModule, prepare_digits, prepare_folder
from vmoe_momentum.datasets.commands import run
from vmoe_momentum.datasets.verify import verify
from vmoe_momentum.files import staging


@pytest.fixture
def source(tmp_path) -> Path:
    """A folder of three classes with six pictures each."""
    draw_pictures(tmp_path / "source", per_class=6)
    return tmp_path / "source"


@pytest.fixture
def no_ffcv(monkeypatch):
    """Python as it is where ffcv was never installed."""
    monkeypatch.setitem(__import__("sys").modules, "ffcv", None)


def prepare(source: Path, name: str = "out", **settings):
    return prepare_folder(str(source), str(source.parent / name), **{"val_fraction": 0.2, "num_workers": 2, **settings})


def leftovers(source: Path) -> list[str]:
    return sorted(path.name for path in source.parent.iterdir() if path.name != "source")


def test_digits_are_split_1437_to_360_and_stratified(digits):
    manifest = json.loads((digits / "manifest.json").read_text())
    train, val = manifest["splits"]["train"], manifest["splits"]["val"]
    assert (train["count"], val["count"]) == (1437, 360)
    assert max(abs(t / 1437 - v / 360) for t, v in zip(train["labels"], val["labels"], strict=True)) < 0.003
    assert (train["beton"] is not None) == HAS_FFCV
    names = {path.name for path in digits.glob("*/*/*.png")}
    assert len(names) == 1797
    image = np.array(Image.open(next(iter((digits / "val" / "0").iterdir()))))
    assert image.shape == (16, 16, 3) and image.dtype == np.uint8 and image.max() > 150


def test_the_same_settings_give_the_same_bytes(source):
    if HAS_FFCV:
        for name, workers in (("one", 1), ("two", 2)):
            prepare(source, name, num_workers=workers)
        manifests = [json.loads((source.parent / name / "manifest.json").read_text()) for name in ("one", "two")]
        assert manifests[0] == manifests[1]
    assert prepare(source, "other", seed=1).root.is_dir()
    first = {path.name for path in (prepare(source, "three").root / "val").rglob("*.jpg")}
    assert first  # a split exists


@requires_ffcv
def test_write_settings_reach_the_beton(source):
    from vmoe_momentum.datasets.beton import check_beton

    def images(name: str, **settings):
        beton = check_beton(prepare(source, name, **settings).root / "train.beton", 3)
        return beton.records["image"], int(beton.sizes.sum())

    raw, raw_bytes = images("raw", encoding="raw")
    assert set(raw["mode"]) == {1} and raw["width"].max() > 30
    jpg, fine_bytes = images("jpg", encoding="500_1.00_95")
    assert set(jpg["mode"]) == {0} and fine_bytes < raw_bytes
    assert images("coarse", encoding="500_1_30")[1] < fine_bytes
    small, _ = images("small", encoding="20_0.50_90")
    assert set(small["mode"]) == {0, 1} and max(small["width"].max(), small["height"].max()) == 20
    assert set(images("all", encoding="500_1.0_90")[0]["mode"]) == {0}


def test_a_given_split_is_kept_and_images_can_be_linked(tmp_path):
    for split, count in (("train", 4), ("val", 2)):
        draw_pictures(tmp_path / "source" / split, per_class=count)
    for path in (tmp_path / "source").rglob("*.jpg"):
        path.chmod(0o600)
    for images in ("copy", "hardlink", "symlink"):
        done = prepare(tmp_path / "source", images, images=images)
        assert (done.classes, done.train, done.val) == (3, 12, 6)
        placed = done.root / "train" / "ant" / "0.jpg"
        original = tmp_path / "source" / "train" / "ant" / "0.jpg"
        assert placed.read_bytes() == original.read_bytes()
        assert original.stat().st_mode & 0o777 == 0o600  # the user's files stay as they are
        assert placed.is_symlink() == (images == "symlink")
        assert placed.samefile(original) == (images != "copy")
        verify(str(done.root))


def test_imagenet_folders_get_readable_names(tmp_path):
    draw_pictures(tmp_path / "source", per_class=4, classes=("n01440764", "n01443537"))
    data = module(FolderDataModule, prepare(tmp_path / "source", val_fraction=0.5).root, batch_size=2)
    assert data.classes[0].id == "n01440764" and "tench" in data.class_names[0]


def test_an_existing_out_is_refused_replaced_or_accepted(source):
    done = prepare(source)
    with pytest.raises(ValueError, match=r"--out=.*it exists.*--overwrite"):
        prepare(source)
    stamp = (done.root / "manifest.json").stat().st_mtime_ns
    assert prepare(source, exist_ok=True) == done
    assert (done.root / "manifest.json").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="prepared with .*'seed': 0.* not with .*'seed': 1"):
        prepare(source, exist_ok=True, seed=1)
    prepare(source, overwrite=True, seed=1)
    assert (done.root / "manifest.json").stat().st_mtime_ns != stamp
    assert leftovers(source) == ["out"]


def test_overwrite_never_deletes_what_it_did_not_make(source):
    precious = source.parent / "out" / "thesis.tex"
    precious.parent.mkdir()
    precious.write_text("ten years")
    with pytest.raises(ValueError, match="no manifest.json"):
        prepare(source, overwrite=True)
    for name in ("source", "source/out", "."):
        with pytest.raises(ValueError, match="overlaps"):
            prepare_folder(str(source), str(source.parent / name), overwrite=True)
    assert precious.read_text() == "ten years" and len(list(source.rglob("*.jpg"))) == 18


def test_bad_images_are_named_and_nothing_is_left(source):
    (source / "bee" / "3.jpg").write_bytes(b"no picture")
    whole = (source / "cat" / "1.jpg").read_bytes()
    (source / "cat" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError) as error:
        prepare(source)
    first = [path for path in (source / "bee" / "3.jpg", source / "cat" / "1.jpg") if str(path) in str(error.value)]
    assert len(first) == 1 and "--on_error list finds all of them" in str(error.value)
    assert leftovers(source) == []
    with pytest.raises(ValueError, match=r"all are listed in .*out\.unreadable\.txt"):
        prepare(source, on_error="list")
    (listed,) = leftovers(source)
    lines = (source.parent / listed).read_text().splitlines()
    assert sorted(line.partition(": ")[0] for line in lines) == [str(source / "bee/3.jpg"), str(source / "cat/1.jpg")]


def test_a_failure_while_replacing_keeps_the_old_dataset(source):
    done = prepare(source)
    before = sorted(path.name for path in done.root.rglob("*"))
    (source / "ant" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"ant/0\.jpg"):
        prepare(source, overwrite=True)
    assert sorted(path.name for path in done.root.rglob("*")) == before and leftovers(source) == ["out"]
    verify(str(done.root))


def test_what_a_killed_attempt_left_is_removed_and_a_living_one_is_not(source):
    """At once, however young; and what it was about to replace comes back."""
    code = (
        "import importlib.util, sys, time; from pathlib import Path\n"
        "spec = importlib.util.spec_from_file_location('staging', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "with module.staged(Path(sys.argv[2]), False, 'mark') as work: print(work, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, staging.__file__, str(source.parent / "out")]
    one, two = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2))
    try:
        dead, alive = (Path(process.stdout.readline().strip()) for process in (one, two))
        one.kill()
        one.wait()
        (dead.parent / "old").mkdir()
        assert dead.is_dir() and alive.is_dir()
        prepare(source, "other")
        assert dead.is_dir()
        staging.remove_abandoned(source.parent / "out")
        assert not dead.parent.exists() and alive.is_dir() and (source.parent / "out").is_dir()
        (source.parent / "out").rmdir()
        prepare(source)
        assert alive.is_dir()
    finally:
        two.kill()
        two.wait()
    assert prepare(source, exist_ok=True).train
    assert not alive.parent.exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_drafts_of_other_kernels_and_without_locks_are_kept(tmp_path, kind, monkeypatch):
    target = tmp_path / "x.out"

    def left(kernel: str) -> Path:
        draft = tmp_path / f"{kernel}abcd.partial"
        if kind == "file":
            draft.write_bytes(b"half")
        else:
            (draft / "new").mkdir(parents=True)
            (draft / "lock").touch()
        return draft

    def start() -> None:
        if kind == "folder":
            with staging.staged(target, True, "mark") as work:
                (work / "mark").touch()
        else:
            with staging.draft_of(target) as file:
                file.write(b"whole")

    def old(draft: Path) -> None:
        for path in (draft, *draft.rglob("*")):
            os.utime(path, (0, 0))

    ours, theirs, former = left(staging._prefix(target)), left(".x.out.f00d-"), left(".x.out.12345.")
    with monkeypatch.context() as patched:

        def no_locks(*_):
            raise OSError(95, "Operation not supported")

        patched.setattr(staging.fcntl, "flock", no_locks)
        start()
        assert ours.exists() and theirs.exists() and former.exists()
    start()
    assert not ours.exists() and theirs.exists() and former.exists()
    old(theirs)
    start()
    assert not theirs.exists() and former.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"x.out", former.name}


def test_hopeless_sources_are_refused(source, tmp_path):
    with pytest.raises(FileNotFoundError, match="--source=.*nowhere"):
        prepare(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="6 loose images"):
        prepare(source / "ant", "../out")
    (source / "dog").mkdir()
    with pytest.raises(ValueError, match="class 'dog' has no images"):
        prepare(source)
    (source / "dog").rmdir()
    for setting, value in (
        ("val_fraction", 0.01),
        ("val_fraction", 1.5),
        ("encoding", "jpg"),
        ("encoding", "0_0.5_90"),
        ("encoding", "500_1.5_90"),
        ("encoding", "500_0.5_0"),
        ("encoding", "500_0.5_101"),
        ("encoding", "20000_0_9"),
    ):
        with pytest.raises(ValueError, match=f"--{setting}={value}"):
            prepare(source, **{setting: value})
    with pytest.raises(ValueError, match="--size=4"):
        prepare_digits(str(tmp_path / "tiny"), size=4)
    (source / "train").mkdir()
    with pytest.raises(ValueError, match="it has train/ but not both"):
        prepare(source)
    assert leftovers(source) == []


def test_without_ffcv_folders_work_and_betons_are_missed_clearly(no_ffcv, source, caplog):
    assert importlib.util.find_spec("ffcv") is None
    with caplog.at_level(logging.WARNING):
        done = prepare(source)
    assert not done.betons and "no betons are written" in caplog.text
    assert verify(str(done.root)).betons == 0
    assert len(module(FolderDataModule, done.root, batch_size=4).train_dataloader()) == 3
    with pytest.raises(ValueError, match=r"class_path=FFCVDataModule.*not installed.*or use FolderDataModule"):
        FFCVDataModule(str(done.root))
    (source / "ant" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"ant/0\.jpg"):
        prepare(source, "second")


@requires_ffcv
def test_betons_missing_from_a_prepared_dataset_are_reported(source, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setitem(__import__("sys").modules, "ffcv", None)
        root = prepare(source).root
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*train\.beton.*or use FolderDataModule"):
        module(FFCVDataModule, root)
    with pytest.raises(ValueError, match="ffcv None"):
        prepare(source, exist_ok=True)


def test_the_command_line_prepares_and_verifies(source, capsys):
    out = str(source.parent / "out")
    run(["prepare", "folder", "--source", str(source), "--out", out, "--val_fraction", "0.2", "--num_workers", "2"])
    run(["prepare", "folder", "--source", str(source), "--out", out, "--val_fraction=0.2", "--exist_ok"])
    run(["verify", out, "--sample", "2"])
    printed = capsys.readouterr().out
    assert f"{out}: 3 classes, 14 training and 4 validation images" in printed and f"{out}: sound" in printed
    run(["info", out])
    told = capsys.readouterr().out
    assert "14" in told and "5 to 5, median 5" in told or "4 to 5, median 5" in told
    assert "encoding 500_0.50_90" in told and ("% raw" in told) == HAS_FFCV
    sheet = source.parent / "sheet.png"
    for more in (["--augment"], ["--split=val", "--backend=folder", "--count=3", "--image_size=32"]):
        run(["sample", out, f"--out={sheet}", *more])
        with Image.open(sheet) as picture:
            assert picture.format == "PNG" and min(picture.size) > 200
        sheet.unlink()
    with pytest.raises(ValueError, match=r"--out=.*ending in \.png"):
        run(["sample", out, "--out=sheet.jpg"])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        run(["verify", "/nowhere"])
    with pytest.raises(SystemExit):
        run(["--help"])
    assert "data prepare digits --out data/digits" in capsys.readouterr().out
