"""What a manifest vouches for: no changed byte of a prepared dataset passes `verify`; odd pictures and odd folders."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from dataset_helpers import draw_pictures, module, requires_ffcv
from PIL import Image

from vmoe_momentum.datasets import FFCVDataModule, FolderDataModule, prepare_folder, shortened
from vmoe_momentum.datasets.commands import run
from vmoe_momentum.datasets.layout import own_digest
from vmoe_momentum.datasets.verify import verify

HARMLESS = ("verified.json",)  # says when a beton was last read; a wrong one has it read again


def flip(path: Path, where: int, mask: int) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= mask
    path.write_bytes(content)


def refused(root: Path) -> bool:
    try:
        verify(str(root), num_workers=1)
    except (ValueError, FileNotFoundError) as error:
        assert "\n" not in str(error)
        return True
    return False


def test_a_changed_byte_of_any_file_is_found_by_verify(pictures, tmp_path):
    """Every kind of file that `data prepare` writes, fifty bytes in all."""
    root = Path(shutil.copytree(pictures, tmp_path / "copy"))
    draws = random.Random(0)
    images = sorted(root.glob("*/*/*.jpg"))
    kinds = [[path] for path in sorted(root.iterdir()) if path.is_file() and path.name not in HARMLESS] + [images]
    assert len(kinds) >= 4
    for number in range(50):
        path = draws.choice(kinds[number % len(kinds)])
        whole = path.read_bytes()
        flip(path, draws.randrange(len(whole)), draws.randrange(1, 256))
        assert refused(root), f"{path.name} was changed unnoticed"
        path.write_bytes(whole)
    assert not refused(root)


@pytest.mark.parametrize("cls", [pytest.param(FFCVDataModule, marks=requires_ffcv), FolderDataModule])
def test_swapped_names_and_changed_files_are_refused_by_fit(pictures, tmp_path, cls, caplog, capsys):
    root = Path(shutil.copytree(pictures, tmp_path / "copy"))
    with caplog.at_level("INFO"):
        module(cls, root, batch_size=4)
    assert "not" in caplog.text and "`vmoe-momentum data verify` reads" in caplog.text
    whole = (root / "classes.json").read_text()
    swapped = json.loads(whole)
    first, second, *_ = swapped["classes"]
    first["name"], second["name"] = second["name"], first["name"]
    (root / "classes.json").write_text(json.dumps(swapped))
    with pytest.raises(ValueError, match=r"classes\.json: its contents differ"):
        module(cls, root, batch_size=4)
    (root / "classes.json").write_text(whole)
    if cls is FolderDataModule:
        victim = sorted((root / "train").glob("*/*"))[0]
        victim.rename(victim.with_name("renamed.jpg"))
        with pytest.raises(ValueError, match="train: names or sizes of its images differ"):
            module(cls, root, batch_size=4)


def test_older_manifests_work_and_say_what_they_do_not_cover(pictures, tmp_path, capsys):
    root = Path(shutil.copytree(pictures, tmp_path / "copy"))
    manifest = json.loads((root / "manifest.json").read_text())
    for name in ("classes", "checksums", "sha256"):
        del manifest[name]
    (root / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    (root / "checksums.sha256").unlink()
    module(FolderDataModule, root, batch_size=4)
    run(["verify", str(root)])
    assert "not covered: contents of image files, classes.json" in capsys.readouterr().out
    run(["verify", str(pictures)])
    told = capsys.readouterr().out
    assert "checksums of 33 files" in told and "not covered" not in told


def test_others_can_check_the_checksums(pictures, tmp_path):
    done = subprocess.run(["sha256sum", "-c", "--quiet", "checksums.sha256"], cwd=pictures, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")


SHAPES = [(20_000, 10), (10, 20_000), (1, 1), (1, 3000), (3000, 1), (2, 65_000)]


@pytest.fixture(scope="module")
def extreme(tmp_path_factory) -> Path:
    """Pictures of extreme shapes, twice in each of two classes."""
    source = tmp_path_factory.mktemp("extreme")
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("ant", "bee"):
            (source / "source" / split / name).mkdir(parents=True)
            for width, height in SHAPES:
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(source / "source" / split / name / f"{width}x{height}.png")
    return prepare_folder(str(source / "source"), str(source / "out"), encoding="500_0.50_90", num_workers=1).root


@pytest.mark.parametrize("cls", [pytest.param(FFCVDataModule, marks=requires_ffcv), FolderDataModule])
def test_every_shape_is_prepared_and_read(extreme, cls):
    data = module(cls, extreme, batch_size=4, num_workers=1 if cls is FFCVDataModule else 0)
    for loader, count in ((data.train_dataloader(), 12), (data.val_dataloader(), 12)):
        seen = [images for images, _ in loader]
        assert sum(map(len, seen)) == count and all(images.shape[1:] == (3, 16, 16) for images in seen)
        assert min(images.float().std() for images in seen) > 10
    assert verify(str(extreme), num_workers=1).train == 12


def test_one_class_and_names_that_are_not_utf8_are_refused_by_prepare_and_fit(pictures, tmp_path):
    draw_pictures(tmp_path / "source", per_class=6, classes=("ant",))
    with pytest.raises(ValueError, match=r"--source=.*one class, 'ant'.*add a second class"):
        prepare_folder(str(tmp_path / "source"), str(tmp_path / "out"))
    root = Path(shutil.copytree(pictures, tmp_path / "copy"))
    (root / "manifest.json").unlink()
    (root / "classes.json").write_text(json.dumps({"classes": [{"id": "ant", "name": "ant"}]}))
    with pytest.raises(ValueError, match=r"data\.root=.*one class, 'ant'"):
        FolderDataModule(str(root))
    draw_pictures(tmp_path / "source", per_class=6, classes=("bee",))
    os.mkdir(os.fsencode(tmp_path / "source") + b"/caf\xe9")
    with pytest.raises(ValueError, match=r"the name b'caf\\xe9' is not UTF-8"):
        prepare_folder(str(tmp_path / "source"), str(tmp_path / "out"))
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    with pytest.raises(ValueError, match="--out: the name .* is not UTF-8"):
        prepare_folder(str(tmp_path / "source"), odd)
    os.rmdir(os.fsencode(tmp_path / "source") + b"/caf\xe9")
    (tmp_path / "source" / "ant" / "0.jpg").rename(tmp_path / "source" / "ant" / os.fsdecode(b"\xff.jpg"))
    done = prepare_folder(
        str(tmp_path / "source"), str(tmp_path / "out"), val_fraction=0.5, num_workers=1
    )  # a file's name may be any
    assert verify(str(done.root), num_workers=1).compared == 12


def test_orientation_and_folders_below_are_kept_by_prepare(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("ant", "bee"):
        (tmp_path / "source" / name / "deep").mkdir(parents=True)
        for number in range(3):
            for folder in (".", "deep"):  # one name twice
                picture = Image.effect_mandelbrot((16, 32), (-2, -1, 1, 1), 9).convert("RGB")
                picture.save(tmp_path / "source" / name / folder / f"{number}.png", exif=exif)
    for upright, size in ((False, (16, 32)), (True, (32, 16))):
        root = prepare_folder(
            str(tmp_path / "source"), str(tmp_path / f"{upright}"), val_fraction=0.5, encoding="raw", num_workers=1,
            upright=upright,
        ).root  # fmt: skip
        data = FolderDataModule(str(root))
        assert data.upright == upright and verify(str(root), num_workers=1).train == 6
        if (root / "train.beton").is_file():
            from vmoe_momentum.datasets.beton import check_beton

            image = check_beton(root / "train.beton", 2).records["image"][0]
            assert (int(image["width"]), int(image["height"])) == size
    manifest = json.loads((tmp_path / "True" / "manifest.json").read_text())
    assert manifest["settings"]["upright"] is True and manifest["sha256"] == own_digest(manifest)


@requires_ffcv
def test_a_beton_cut_short_between_batches_ends_with_a_line(pictures, tmp_path):
    root = Path(shutil.copytree(pictures, tmp_path / "copy"))
    data = module(FFCVDataModule, root, batch_size=2, num_workers=1, batches_ahead=1)
    batches = iter(data.train_dataloader())
    next(batches)
    time.sleep(3)  # until the batch ahead is read: cut in the middle of one, the process ends (the test below)
    os.truncate(root / "train.beton", 10_000)
    with pytest.raises(ValueError, match=r"train\.beton: cut short while it was read .*--ckpt_path"):
        list(batches)


@requires_ffcv
@pytest.mark.parametrize("size", [0, 10, 100, 10_000])
def test_a_beton_cut_short_after_it_was_checked_ends_with_a_line(size: int, pictures, tmp_path):
    """Loaders are made anew where Lightning asks for them."""
    root = Path(shutil.copytree(pictures, tmp_path / "copy"))
    data = module(FFCVDataModule, root, batch_size=2, num_workers=1)
    os.truncate(root / "train.beton", size)
    with pytest.raises(ValueError, match=rf"train\.beton: .*{size} bytes .*prepare it again"):
        data.train_dataloader()


@requires_ffcv
def test_a_map_cut_short_under_a_read_ends_with_a_line(tmp_path):
    """In its own process, which the signal ends; without torch, for the time that takes."""
    code = (
        "import importlib.util, mmap, os, sys; from pathlib import Path\n"
        "spec = importlib.util.spec_from_file_location('shortened', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "path = Path(sys.argv[2]); path.write_bytes(bytes(1 << 16))\n"
        "mapped = mmap.mmap(os.open(path, os.O_RDONLY), 0, prot=mmap.PROT_READ)\n"
        "module.speak_before_sigbus(path.parent); os.truncate(path, 0); mapped[40_000]"
    )
    command = [sys.executable, "-c", code, shortened.__file__, str(tmp_path / "x.beton")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr
        == f"vmoe-momentum: {tmp_path}: cut short while it was read (SIGBUS); bring it back or prepare"
        + (" it again, then go on from the last checkpoint with --ckpt_path\n")
    )
