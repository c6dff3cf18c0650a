"""Trees that `data prepare imagenet-c` makes: the bytes, whatever happened on the way; and the numbers of --data."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import fails
from dataset_helpers import draw_pictures
from PIL import Image
from planted import paint, planted
from test_pipeline import PLAIN
from torch import Tensor, nn

from vmoe_momentum import cli
from vmoe_momentum.datasets.photos import PICTURES, _open
from vmoe_momentum.robustness import Model, Settings, View, describe_pictures, make_plan
from vmoe_momentum.robustness.doubts import warnings_of
from vmoe_momentum.robustness.evaluate import evaluate
from vmoe_momentum.robustness.regenerating import prepare_imagenet_c
from vmoe_momentum.robustness.summary import make_rows

FEW = ("shot_noise", "snow", "elastic_transform", "jpeg_compression")
PHOTOGRAPHS = ("cat", "galaxies", "retina", "temple")


class Seeing(nn.Module):
    """A class a photograph, by fixed weights; every pixel counts."""

    def __init__(self, size: int) -> None:
        super().__init__()
        weights = torch.randn(len(PHOTOGRAPHS), 3, size, size, generator=torch.Generator().manual_seed(size))
        self.weights = nn.Parameter(weights - weights.mean())

    def forward(self, images: Tensor) -> Tensor:
        return (images[:, None] * self.weights).sum(dim=(2, 3, 4)) / 10


def seeing(size: int, upright: bool = False) -> Model:
    name = f"{size} px{', upright' if upright else ''}"
    view = View(size, 0.875, "bicubic", upright)
    return Model(name, name, Seeing(size).eval(), view, len(PHOTOGRAPHS), None, None, None, {"source": name})


def photographs(root: Path) -> Path:
    """Real ones: wide, tall and turned by EXIF, 300 to 1411 px, as JPEG and PNG; and a drawing of 40 px among them."""
    for number, name in enumerate(PHOTOGRAPHS):
        picture = _open(*PICTURES[name])
        place = root / "val" / name
        place.mkdir(parents=True)
        tall = picture.crop((0, 0, picture.width // 2, picture.height))
        for side, part in (("wide", picture), ("tall", tall)):
            exif = part.getexif()
            exif[0x0112] = 6
            kept = {"exif": exif, "quality": 92} if number % 2 else {}
            part.save(place / f"{side}.{'jpg' if number % 2 else 'png'}", **kept)
    paint(root / "val" / "cat" / "drawn.png", 7)
    return root


def tree_of(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return photographs(tmp_path_factory.mktemp("photos") / "photos")


@pytest.fixture(scope="module")
def tree(photos: Path) -> Path:
    """One severity of a corruption of each kind."""
    out = photos.parent / "tree"
    prepare_imagenet_c(str(photos), str(out), corruptions=list(FEW), severities=[4], seed=3, num_workers=1)
    return out


def test_photographs_are_stored_as_published_and_small_pictures_exactly(photos: Path, tree: Path) -> None:
    """JPEGs of 224 x 224 under the pictures' names; and a page, and a mark, that say what it is."""
    names = {path.relative_to(tree / "snow" / "4").as_posix() for path in (tree / "snow" / "4").rglob("*.*")}
    assert len(names) == 9 and "cat/drawn.png" in names and "retina/wide.JPEG" in names
    for path in (tree / "snow" / "4").rglob("*.JPEG"):
        with Image.open(path) as picture:
            assert (picture.format, picture.size, picture.mode) == ("JPEG", (224, 224), "RGB")
            assert picture.quantization == _tables(85) and not picture.getexif()
    with Image.open(tree / "snow" / "4" / "cat" / "drawn.png") as small:
        assert small.size == (40, 40)
    told = json.loads((tree / "regenerated.json").read_text())
    assert told["settings"]["seed"] == 3 and told["pictures"] == 9 and told["conditions"] == 4
    assert "pillow" in told["versions"] and "not the published" in (tree / "README.md").read_text()
    assert not [path for path in photos.parent.iterdir() if path.name not in ("photos", "tree")]


def _tables(quality: int) -> dict[int, list[int]]:
    from io import BytesIO

    file = BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
    return Image.open(file).quantization


@pytest.mark.parametrize("limit", [None, pytest.param(5, marks=pytest.mark.long)])
def test_its_numbers_are_those_of_data_to_the_bit(photos: Path, tree: Path, tmp_path: Path, limit: int | None) -> None:
    """Every answer, confidence and row, of models of the pictures' size and of another."""
    models = [seeing(224), seeing(96)]
    shared = Settings(attacks=(), corruptions=FEW, severities=(4,), seed=3, limit=limit)
    made = evaluate(make_plan(shared._replace(data=str(photos)), models), models, tmp_path / "a")
    settings = shared._replace(sets={"imagenet_c": str(tree)}, regenerate=False)
    read = evaluate(make_plan(settings, models), models, tmp_path / "b")
    assert [cell.condition for cell in read.cells] == [cell.condition for cell in made.cells[1:]]
    seen = set()
    for model in models:
        for number in range(len(read.cells)):
            one, other = read.outcomes[model.name, number], made.outcomes[model.name, number + 1]
            for name in ("index", "correct", "predicted", "confidence"):
                assert np.array_equal(getattr(one, name), getattr(other, name)), (model.name, number, name)
            seen |= set(one.confidence.tolist())
            assert torch.equal(read.examples[number], made.examples[number + 1])
    assert len(seen) > 20  # the models tell pictures apart
    wanted = [row for row in make_rows(made) if row.dataset == "data (regenerated)"]
    assert [row._replace(dataset="data (regenerated)") for row in make_rows(read)] == wanted


def test_it_is_never_taken_for_the_published_set(tmp_path: Path, tree: Path) -> None:
    """All 75, of a planted model: no CE and no mCE; and a mark that was edited, or lost midway, is no mark."""
    for number in range(2):
        paint(tmp_path / "in" / str(number) / f"{number}.png", number, size=20)
    prepare_imagenet_c(str(tmp_path / "in"), str(tmp_path / "c"), num_workers=1)
    settings = PLAIN._replace(sets={"imagenet_c": str(tmp_path / "c")})
    model = planted(num_classes=10)
    cells = make_plan(settings, [model])
    evaluation = evaluate(cells, [model], tmp_path / "out")
    found = make_rows(evaluation)
    assert {row.dataset for row in found} == {"imagenet_c (regenerated)"}
    assert any((row.condition, row.severity_or_eps) == ("15 corruptions", "mean") for row in found)
    assert not any(row.metric in ("mce", "ce", "relative_mce") for row in found)
    assert "data prepare imagenet-c with seed 0" in describe_pictures(cells)["imagenet_c (regenerated)"]["seen"]
    (line,) = warnings_of(evaluation, [])
    assert line.startswith("imagenet_c (regenerated): corrupted by data prepare imagenet-c with seed 0, not the publ")
    mark = tmp_path / "c" / "regenerated.json"
    content = mark.read_text()
    for wrong in (content.replace('"seed": 0', '"seed": 1'), "{", "[]", ""):
        mark.write_text(wrong)
        with pytest.raises(ValueError, match=r"regenerated.json: not as data prepare wrote it"):
            make_plan(settings, [model])
    mark.rename(mark.with_name("unfinished.json"))
    with pytest.raises(ValueError, match="--imagenet_c=.*: not finished; run its `data prepare imagenet-c` again"):
        make_plan(settings, [model])


def test_classes_json_goes_with_it(tmp_path: Path) -> None:
    """So that a model that says nothing of its classes takes them in the data's order."""
    paint(tmp_path / "in" / "val" / "b" / "x.png", 3)
    paint(tmp_path / "in" / "val" / "a" / "x.png", 3)
    entries = [{"id": "b", "name": "bee"}, {"id": "a", "name": "ant"}]
    (tmp_path / "in" / "classes.json").write_text(json.dumps({"classes": entries}))
    prepare_imagenet_c(str(tmp_path / "in"), str(tmp_path / "c"), ["fog"], [1], num_workers=1)
    settings = PLAIN._replace(sets={"imagenet_c": str(tmp_path / "c")}, corruptions=("fog",), severities=(1,))
    (cell,) = make_plan(settings, [planted(num_classes=2)])
    assert [(path.parent.name, label) for path, label in zip(cell.pictures.paths, cell.pictures.labels, strict=True)] \
        == [("a", 1), ("b", 0)]  # fmt: skip


# ---- stopped, killed, damaged


def small(root: Path) -> Path:
    draw_pictures(root / "source", per_class=4)
    return root / "source"


ARGV = ["data", "prepare", "imagenet-c", "--corruptions=[fog,snow]", "--severities=[1,3]"]


def test_workers_and_interruptions_change_no_byte(tmp_path: Path, capsys) -> None:
    """A picture that does not decode stops it; what was done stays, also where a crash left parts of files."""
    source, words = small(tmp_path), [*ARGV, f"--source={tmp_path / 'source'}"]
    cli.run([*words, f"--out={tmp_path / 'whole'}", "--num_workers=1"])
    expected = tree_of(tmp_path / "whole")
    bad = source / "cat" / "0.jpg"
    content = bad.read_bytes()
    table = content.index(b"\xff\xc4") + 5  # of a Huffman table: it opens, as large as before, and does not decode
    bad.write_bytes(content[:table] + b"\xff" * 16 + content[table + 16 :])
    out, work = tmp_path / "c", tmp_path / "c.unfinished"
    assert "cat/0.jpg: not a readable image" in fails([*words, f"--out={out}", "--num_workers=2"], capsys)
    assert not out.exists()
    bad.write_bytes(content)
    done = sorted(work.rglob("*.png"))
    assert len(done) >= 4 * 8
    done[0].write_bytes(done[0].read_bytes()[:30])
    done[1].write_bytes(b"")
    done[2].rename(done[2].with_name(f".{done[2].name}.new"))
    before = done[5].stat().st_mtime_ns
    cli.run([*words, f"--out={out}", "--num_workers=2"])
    assert tree_of(out) == expected and not work.exists()
    assert (out / done[5].relative_to(work)).stat().st_mtime_ns == before


@pytest.mark.long
def test_a_killed_run_goes_on(photos: Path, tree: Path, tmp_path: Path) -> None:
    """SIGKILL to all of its processes, twice, at some file; photographs."""
    argv = [
        "data", "prepare", "imagenet-c", f"--source={photos}", f"--out={tmp_path / 'c'}", "--num_workers=2",
        f"--corruptions=[{','.join(FEW)}]", "--severities=[4]", "--seed=3",
    ]  # fmt: skip
    work = tmp_path / "c.unfinished"
    for count in (3, 20):
        process = subprocess.Popen([sys.executable, "-m", "vmoe_momentum", *argv], start_new_session=True)
        limit = time.monotonic() + 120
        while len(list(work.rglob("*.JPEG"))) < count and time.monotonic() < limit:
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "c").exists()
    cli.run(argv)
    assert tree_of(tmp_path / "c") == tree_of(tree)


def test_other_settings_and_other_peoples_folders_are_not_mixed(tmp_path: Path, capsys, monkeypatch) -> None:
    small(tmp_path)
    out = tmp_path / "c"
    words = [*ARGV, f"--source={tmp_path / 'source'}", f"--out={out}", "--num_workers=1"]

    def told(*more: str) -> str:
        return fails([*words, *more], capsys)

    work = tmp_path / "c.unfinished"
    work.mkdir()
    (work / "mine.txt").write_text("x")
    assert "c.unfinished holds something else" in told()
    assert (work / "mine.txt").read_text() == "x"
    shutil.rmtree(work)
    with monkeypatch.context() as patch:
        patch.setattr("vmoe_momentum.robustness.regenerating._beside", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli.run(words)
    assert "was begun with other settings; give the same ones again" in told("--seed=1")
    with monkeypatch.context() as patch:
        patch.setattr("vmoe_momentum.robustness.versions.version", lambda name: "0.1")
        from vmoe_momentum.robustness.versions import versions

        versions.cache_clear()
        assert "was begun with other versions" in told()
    versions.cache_clear()
    extra = paint(tmp_path / "source" / "cat" / "new.png", 3)
    assert "was begun with other pictures" in told()
    extra.unlink()
    cli.run(words)
    assert "it exists; choose another folder, or replace it with --overwrite" in told()
    cli.run([*words, "--exist_ok"])
    assert "prepared with" in told("--exist_ok", "--seed=1")
    before = tree_of(out)
    cli.run([*words, "--overwrite", "--seed=1"])
    assert tree_of(out).keys() == before.keys() and tree_of(out) != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "source"]


def test_two_at_once_are_refused(tmp_path: Path, capsys) -> None:
    from vmoe_momentum.files.staging import resumed

    small(tmp_path)
    with resumed(tmp_path / "c", False, "regenerated.json") as work:
        told = fails([*ARGV, f"--source={tmp_path / 'source'}", f"--out={tmp_path / 'c'}"], capsys)
        assert f"another process fills {work}" in told


def test_a_lock_that_killed_processes_are_letting_go_of_is_waited_for(tmp_path: Path) -> None:
    from vmoe_momentum.files.staging import _lock, resumed

    with pytest.raises(RuntimeError), resumed(tmp_path / "c", False, "mark"):
        raise RuntimeError
    held = os.open(tmp_path / "c.unfinished" / ".lock", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    threading.Timer(0.5, os.close, [held]).start()
    start = time.monotonic()
    with resumed(tmp_path / "c", False, "mark") as work:
        assert time.monotonic() - start > 0.3
        (work / "mark").write_text("")
    assert (tmp_path / "c" / "mark").exists()

    gone = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)  # whoever held it is done and took it along
    (tmp_path / "lock").unlink()
    assert not _lock(gone, close=False)
    os.close(gone)  # still ours to close


def test_hopeless_requests_are_refused_before_any_work(tmp_path: Path, capsys) -> None:
    source = small(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("x")

    def told(*words: str, out: Path = tmp_path / "c", source: Path = source) -> str:
        return fails(["data", "prepare", "imagenet-c", f"--source={source}", f"--out={out}", *words], capsys)

    assert "--corruptions=smoke: not one of gaussian_noise" in told("--corruptions=[smoke]")
    assert "--corruptions=[fog,fog]: name some, each once" in told("--corruptions=[fog,fog]")
    assert "--corruptions=[]: name some" in told("--corruptions=[]")
    assert "--severities=[6]: use a whole number from 1 to 5" in told("--severities=[6]")
    assert "overlaps --source" in told(out=source / "c")
    assert "no such folder" in told(source=tmp_path / "none")
    assert "no class folders" in told(source=tmp_path / "text")
    broken = source / "ant" / "broken.png"
    broken.write_bytes(b"no picture")
    assert "broken.png: not a readable image" in told()
    broken.unlink()
    (source / "ant" / "line\nend.png").write_bytes(paint(tmp_path / "x.png", 3).read_bytes())
    assert "has a line end or backslash in its name; rename it" in told()
    assert not (tmp_path / "c").exists() and not (tmp_path / "c.unfinished").exists()


def test_pictures_of_one_name_keep_apart_and_in_order(tmp_path: Path) -> None:
    """x.png and x.jpg; a.b.png and a.png, whose order another suffix would change: --limit takes by place."""
    for number, name in enumerate(("x.png", "x.bmp", "a.png", "a.b.png", "below/a.png")):
        paint(tmp_path / "in" / "cat" / name, number)
    paint(tmp_path / "in" / "dog" / "a.png", 3)
    prepare_imagenet_c(str(tmp_path / "in"), str(tmp_path / "c"), ["fog"], [1], num_workers=1)
    settings = PLAIN._replace(sets={"imagenet_c": str(tmp_path / "c")}, corruptions=("fog",), severities=(1,))
    (cell,) = make_plan(settings, [planted(num_classes=2)])
    (clean,) = make_plan(PLAIN._replace(data=str(tmp_path / "in")), [planted(num_classes=2)])
    pairs = zip(cell.pictures.paths, clean.pictures.paths, strict=True)
    assert all(one.name.startswith(other.name.partition(".")[0]) for one, other in pairs)
    assert len(cell.pictures.paths) == 6 and cell.pictures.labels == clean.pictures.labels


# ---- verify


def test_verify_finds_what_changed(tmp_path: Path, capsys) -> None:
    small(tmp_path)
    out = tmp_path / "c"
    cli.run([*ARGV, f"--source={tmp_path / 'source'}", f"--out={out}", "--num_workers=1"])
    capsys.readouterr()
    cli.run(["data", "verify", str(out), "--sample=3"])
    assert "sound (regenerated corruptions of 12 pictures, 4 of each, 3 decoded, checksums of 49 files)" in (
        capsys.readouterr().out
    )
    for name in ("fog/1/cat/0.png", "README.md", "checksums.sha256", "regenerated.json"):
        path = out / name
        content = path.read_bytes()
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        assert path.name in fails(["data", "verify", str(out)], capsys)
        path.unlink()
        assert fails(["data", "verify", str(out)], capsys)
        path.write_bytes(content)
    more = shutil.copy(out / "fog/1/cat/0.png", out / "fog/1/cat/more.png")
    assert "more.png: not prepared with the others" in fails(["data", "verify", str(out)], capsys)
    Path(more).unlink()
    cli.run(["data", "verify", str(out)])
    assert "pictures to test on, not a dataset to train on" in fails(["data", "info", str(out)], capsys)


def test_help_names_it(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.run(["data", "prepare", "imagenet-c", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "OUT.unfinished" in text and "--num_workers" in text
