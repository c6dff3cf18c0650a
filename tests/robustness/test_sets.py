"""Published sets beside ImageNet-C, -A, -R and -O, planted: what counts, over what a mean is, what is refused."""

from pathlib import Path

import pytest
from PIL import Image, ImageOps
from planted import VIEW, paint, planted, write_mappings
from test_pipeline import INDEX, PLAIN, TWO, report

from vmoe_momentum.robustness import SEVERITIES, describe_pictures, labels, make_plan
from vmoe_momentum.robustness.doubts import warnings_of
from vmoe_momentum.robustness.evaluate import evaluate
from vmoe_momentum.robustness.pictures import Pictures, batches
from vmoe_momentum.robustness.sets import SETS

GUIDE = Path(__file__).parents[2] / "vmoe_momentum" / "robustness" / "README.md"
KIN = [name for name, each in SETS.items() if each.corruptions and name != "imagenet_c"]


def write_tree(root: Path, name: str, per_folder: int = 4) -> dict[tuple[str, int], float]:
    """A whole set of corruptions; the share of wrong answers that was planted in each."""
    share = {}
    for i, corruption in enumerate(SETS[name].corruptions):
        for severity in SEVERITIES:
            wrong = (i + severity) % (per_folder + 1)
            share[corruption, severity] = wrong / per_folder
            for k in range(per_folder):
                wnid = TWO[k % 2]
                place = root / corruption / str(severity) / wnid
                paint(place / f"ILSVRC2012_val_{k:08d}.png", 9 if k < wrong else INDEX[wnid], size=24)
    return share


@pytest.mark.parametrize("name", KIN)
def test_other_corruptions_have_their_own_mean_and_no_mce(name: str, tmp_path: Path) -> None:
    share, own = write_tree(tmp_path / "c", name), SETS[name]
    settings = PLAIN._replace(sets={name: str(tmp_path / "c")})
    found = report(settings, [planted()], tmp_path / "out")
    dataset = name if own.count is None else f"{name} (4 of {own.count:,})"
    whole = ("planted", dataset, f"{len(own.corruptions)} corruptions", "mean", "top1")
    assert found[whole] == pytest.approx(1 - sum(share.values()) / len(share))
    assert found["n", *whole] == 4 * len(share)
    for corruption in own.corruptions:
        expected = 1 - sum(share[corruption, severity] for severity in SEVERITIES) / 5
        assert found["planted", dataset, corruption, "mean", "top1"] == pytest.approx(expected)
    assert not any(key[-1] in ("mce", "ce", "relative_mce") for key in found)
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"{dataset}, mean of {len(own.corruptions)} corruptions" in text and f"![corruptions, {dataset}]" in text
    assert f"where {own.title} has 224 x 224" in text  # the planted ones are smaller


def test_a_part_of_other_corruptions_is_said_and_sets_are_not_mixed(tmp_path: Path) -> None:
    """Beside ImageNet-C: a mean each; --corruptions picks of both, and what is of neither is refused."""
    for name, corruption in (("imagenet_c", "fog"), ("imagenet_c_bar", "sparkles"), ("imagenet_3dcc", "flash")):
        for severity in (1, 2):
            paint(tmp_path / name / corruption / str(severity) / TWO[0] / "a.png", 0 if severity == 1 else 5)
    sets = {name: str(tmp_path / name) for name in ("imagenet_c", "imagenet_c_bar")}
    settings = PLAIN._replace(sets=sets, corruptions=("fog", "sparkles"), severities=(1, 2))
    evaluation = evaluate(make_plan(settings, [planted()]), [planted()], tmp_path / "out")
    told = " ".join(warnings_of(evaluation, []))
    assert "imagenet_c (1 of 50,000): no mCE: it is the mean over 75 corruptions x severities, here are 2" in told
    assert "not ImageNet-C-bar's mean: that is the mean over 50 corruptions x severities, here are 2" in told
    found = report(settings, [planted()], tmp_path / "out")
    assert found["planted", "imagenet_c (1 of 50,000)", "2 of 75 corruptions x severities", "mean", "top1"] == 0.5
    assert found["planted", "imagenet_c_bar (1 of 50,000)", "2 of 50 corruptions x severities", "mean", "top1"] == 0.5
    for changed, message in (
        ({"corruptions": ("fog",)}, r"--imagenet_c_bar=.*none of --corruptions=\[fog\] is one of its"),
        ({"corruptions": ("fog", "sparkle")}, "--corruptions=sparkle: not one of gaussian_noise"),
        ({"corruptions": ("fog", "sparkles", "flash")}, "--corruptions=flash: it is of ImageNet-3DCC.*--imagenet_3dcc"),
        ({"corruptions": None}, "--imagenet_c=.*gaussian_noise/1, .*missing; looked for"),
        ({"sets": {"imagenet_c_bar": sets["imagenet_c"]}, "corruptions": None}, "blue_noise_sample/1, .*missing"),
    ):
        with pytest.raises(ValueError, match=message):
            make_plan(settings._replace(**changed), [planted()])


def test_stylized_pictures_are_never_cropped(tmp_path: Path) -> None:
    """Of their final size; of both layouts, and any class answers."""
    for place in (tmp_path / "flat", tmp_path / "split" / "val"):
        paint(place / TWO[0] / "ILSVRC2012_val_00000001.png", 0, size=224)
        paint(place / TWO[1] / "ILSVRC2012_val_00000002.png", 3, size=224)
    for root in ("flat", "split"):
        settings = PLAIN._replace(sets={"imagenet_stylized": str(tmp_path / root)})
        (cell,) = make_plan(settings, [planted()])
        assert cell.pictures.whole and cell.pictures.classes is None
        found = report(settings, [planted()], tmp_path / root / "out")
        assert found["planted", "imagenet_stylized (2 of 50,000)", "shifted", "", "top1"] == 0.5


# ---- ObjectNet


OBJECTS = {"alarm_clock": [409, 530], "banana": [954], "backpack": [414]}


def objectnet(root: Path, answers: dict[str, list[int]]) -> Path:
    """answers: folder -> what the planted model says of each of its pictures."""
    write_mappings(root, OBJECTS, without=("air_freshener",))
    for folder, those in answers.items():
        for number, answer in enumerate(those):
            path = paint(root / "images" / folder / f"{number}.png", answer, size=64)
            framed = ImageOps.expand(Image.open(path).crop((2, 2, 62, 62)), border=2, fill=(255, 0, 0))
            framed.save(path)
    return root


def test_objectnet_counts_its_classes_and_merges_those_of_one_object(tmp_path: Path) -> None:
    """Both clocks of ImageNet are the alarm clock; classes that no folder has are cut off; other folders left out."""
    tench = 0  # the likeliest class of all for blue == 1, and none of ObjectNet's
    root = objectnet(
        tmp_path / "o", {"alarm_clock": [409, 530, 954], "banana": [954, 414], "air_freshener": [409, 954]}
    )
    paint(root / "images" / "backpack" / "0.png", 414, blue=1, size=64)
    assert labels.wnids()[tench] == TWO[0]
    for wnid, answer in ((409, 530), (954, 954), (0, 0)):  # of --data: the analog clock, said to be a digital one
        paint(tmp_path / "in" / "val" / labels.wnids()[wnid] / "x.png", answer)
    settings = PLAIN._replace(data=str(tmp_path / "in"), sets={"objectnet": str(root)})
    found = report(settings, [planted()], tmp_path / "out")
    assert found["planted", "objectnet", "shifted", "", "top1"] == pytest.approx(4 / 6)
    assert found["n", "planted", "objectnet", "shifted", "", "top1"] == 6
    assert found["planted", "data on objectnet's classes", "clean", "", "top1"] == 1.0
    assert found["n", "planted", "data on objectnet's classes", "clean", "", "top1"] == 2
    (cell,) = make_plan(settings._replace(data=None), [planted()])
    assert cell.pictures.classes == [409, 414, 530, 954] and cell.pictures.labels_that_count == 3
    assert describe_pictures([cell])["objectnet"]["seen"].startswith("without the 2 px of its border; at 64 px")
    assert "objectnet, 3 classes" in (tmp_path / "out" / "report.md").read_text()


def test_objectnets_border_is_cut_before_anything_else(tmp_path: Path) -> None:
    root = objectnet(tmp_path / "o", {"banana": [954]})
    (cell,) = make_plan(PLAIN._replace(sets={"objectnet": str(root)}), [planted()])
    shown = next(batches(cell.pictures, [VIEW], 1, 0)).views[VIEW]
    assert shown.shape == (1, 3, 32, 32) and len(set(map(tuple, shown[0].flatten(1).T.tolist()))) == 1
    framed = next(batches(Pictures("x", cell.pictures.paths, [0]), [VIEW._replace(crop_pct=1.0)], 1, 0)).views
    assert (next(iter(framed.values()))[0, :, 0, 0] != shown[0, :, 0, 0]).any()
    Image.new("RGB", (4, 9)).save(root / "images" / "banana" / "small.png")
    (cell,) = make_plan(PLAIN._replace(sets={"objectnet": str(root)}), [planted()])
    with pytest.raises(ValueError, match=r"small.png: 4 x 9 px, of which a border of 2 is to be cut off"):
        list(batches(cell.pictures, [VIEW], 2, 0))


def test_objectnets_own_files_say_what_its_folders_are(tmp_path: Path) -> None:
    root = objectnet(tmp_path / "o", {"banana": [954]})
    settings = PLAIN._replace(sets={"objectnet": str(root)})
    paint(root / "images" / "n01440764" / "x.png", 0)
    with pytest.raises(ValueError, match="--objectnet=.*: folder n01440764 is none of ObjectNet's 4"):
        make_plan(settings, [planted()])
    (root / "images" / "n01440764" / "x.png").unlink()
    (root / "images" / "n01440764").rmdir()
    make_plan(settings, [planted()])
    for path in sorted((root / "mappings").iterdir()):
        content = path.read_bytes()
        for damaged in (b"{", b"[]", b'{"a": ["b"]}', content[: len(content) // 2], b"\xff\xfe"):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match="unpack ObjectNet again") as error:
                make_plan(settings, [planted()])
            assert "\n" not in str(error.value)
        path.unlink()
        with pytest.raises(FileNotFoundError, match=f"no mappings/{path.name} in it"):
            make_plan(settings, [planted()])
        path.write_bytes(content)
    write_mappings(root, {**OBJECTS, "banana": [409]})  # a class that is two objects
    with pytest.raises(ValueError, match="names a class of ImageNet-1k twice"):
        make_plan(settings, [planted()])


def test_every_set_has_its_row_in_the_guide() -> None:
    text = GUIDE.read_text()
    for name, each in SETS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `--{name}` |"))
        assert each.title in line
        assert each.count is None or f"{each.count:,}" in line
        assert not each.corruptions or f"{len(each.corruptions)} corruptions" in line
