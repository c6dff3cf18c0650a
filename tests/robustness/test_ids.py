"""Lists of pictures: RobustBench's format as it is, whatever it names and only that, and one line for each mistake."""

import json
import re
from pathlib import Path

import pytest
from planted import paint, planted

from vmoe_momentum.robustness import Settings, make_plan
from vmoe_momentum.robustness.commands import run
from vmoe_momentum.robustness.ids import read_ids

TWO = ("n01440764", "n02123045")
PLAIN = Settings(attacks=(), regenerate=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ten pictures of two classes, every second one wrong; a.png in both."""
    for i in range(10):
        paint(
            tmp_path / "in" / "val" / TWO[i % 2] / f"ILSVRC2012_val_{i + 1:08d}.png", 7 if i % 4 < 2 else 281 * (i % 2)
        )
    for wnid in TWO:
        paint(tmp_path / "in" / "val" / wnid / "a.png", 0)
    return tmp_path


def listed(root: Path, text: str | bytes, **settings) -> list[str]:
    """CLASS/NAME of the clean pictures that a list leaves."""
    file = root / "ids.txt"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    cells = make_plan(PLAIN._replace(data=str(root / "in"), ids=str(file), **settings), [planted()])
    return [f"{path.parent.name}/{path.name}" for path in cells[0].pictures.paths]


def test_class_and_name_or_name_alone(root: Path) -> None:
    """In the set's order, whatever the list's; as RobustBench's file it ends without a line end; labels go along."""
    names = [f"{TWO[1]}/ILSVRC2012_val_00000004.png", "ILSVRC2012_val_00000001.png", f"{TWO[0]}/a.png"]
    wanted = [f"{TWO[0]}/ILSVRC2012_val_00000001.png", f"{TWO[0]}/a.png", names[0]]
    for text in ("\n".join(names), "\r\n".join(names) + "\r\n\r\n", "\ufeff" + "\n".join(reversed(names)) + "\n"):
        assert listed(root, text) == wanted
    (root / "all.txt").write_text("\n".join(names))
    settings = PLAIN._replace(data=str(root / "in"), ids=str(root / "all.txt"))
    assert make_plan(settings, [planted()])[0].pictures.labels == [0, 0, 281]


def test_other_sets_are_whole_and_corruptions_are_not(root: Path) -> None:
    """ImageNet-C's folders hold the same names; A's do not, and of its classes the clean pictures are the list's."""
    for severity in (1, 2):
        for i in range(4):
            paint(root / "c" / "fog" / str(severity) / TWO[0] / f"{i}.png", 0)
    paint(root / "in" / "val" / TWO[0] / "2.png", 0)
    a = "n01498041"  # a class of ImageNet-A
    paint(root / "a" / a / "z.png", 6)
    paint(root / "in" / "val" / a / "y.png", 6)
    paint(root / "in" / "val" / a / "x.png", 6)
    ids = root / "ids.txt"
    corrupted = PLAIN._replace(
        sets={"imagenet_c": str(root / "c")}, corruptions=("fog",), severities=(1, 2), ids=str(ids)
    )
    natural = PLAIN._replace(data=str(root / "in"), sets={"imagenet_a": str(root / "a")}, ids=str(ids))
    ids.write_text("2.png\nx.png")
    with pytest.raises(ValueError, match=r"--ids=.*ids.txt: x.png is not in --imagenet_c=.*c, which has 4 pictures"):
        make_plan(corrupted, [planted()])
    found = {
        cell.pictures.name: [path.name for path in cell.pictures.paths] for cell in make_plan(natural, [planted()])
    }
    assert found == {
        "data": ["2.png", "x.png"], "imagenet_a (1 of 7,500)": ["z.png"], "data on imagenet_a's classes": ["x.png"],
    }  # fmt: skip
    ids.write_text("2.png")
    cells = make_plan(corrupted, [planted()])
    assert [[path.name for path in cell.pictures.paths] for cell in cells] == [["2.png"]] * 2
    assert cells[0].pictures.name == "imagenet_c (1 of 50,000)"
    with pytest.raises(ValueError, match="--ids=.*: none of its pictures is of the 1 classes that count"):
        make_plan(natural, [planted()])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no line in it; name a picture a line"),
        ("\n \n", "no line in it"),
        (b"\xff\xfe\x00", "cannot be read as text"),
        ("x.png", "x.png is not in --data=.*in, which has 12 pictures such as n01440764/ILSVRC2012_val_00000001.png"),
        ("x.png\ny.png\nz/y.png\n", "x.png and 2 more are not in --data="),
        (f"{TWO[1]}/ILSVRC2012_val_00000001.png", f"{TWO[1]}/ILSVRC2012_val_00000001.png is not in"),
        ("a.png", f"a.png is {TWO[0]}/a.png as well as {TWO[1]}/a.png of --data=.*write it as CLASS/NAME"),
        (f"{TWO[0]}/a.png\n{TWO[0]}/a.png", f"{TWO[0]}/a.png is there 2 times; name each picture once"),
        (
            f"ILSVRC2012_val_00000001.png\n{TWO[0]}/ILSVRC2012_val_00000001.png",
            f"ILSVRC2012_val_00000001.png and {TWO[0]}/ILSVRC2012_val_00000001.png are one picture of --data=",
        ),
    ],
)
def test_mistakes_are_one_line(root: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"--ids={root}/ids.txt: {message}") as told:
        listed(root, text)
    assert "\n" not in str(told.value)


def test_no_file_and_a_limit_beside_it(root: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--ids=nowhere: no such file"):
        read_ids("nowhere")
    with pytest.raises(FileNotFoundError, match=r"--ids=.*: no such file"):
        read_ids(str(root))
    with pytest.raises(ValueError, match=r"--ids=.*ids.txt: it says which pictures, so leave out --limit=3"):
        listed(root, "a.png", limit=3)


def test_the_report_says_which_list(root: Path, monkeypatch, capsys) -> None:
    """Its file and what was in it; and answers are those of the pictures named."""
    monkeypatch.chdir(root)
    (root / "ids.txt").write_text("\n".join(f"ILSVRC2012_val_{i:08d}.png" for i in (1, 3, 4)))
    argv = ["--model=x", "--data=in", "--ids=ids.txt", "--out=o", "--corruptions=[none]", "--attacks=[]"]
    run(argv, lambda names: [planted()])
    told = json.loads((root / "o" / "report.json").read_text())
    assert (
        told["provenance"]["settings"]["ids"] == "ids.txt" and told["provenance"]["pictures"]["data"]["pictures"] == 3
    )
    assert re.fullmatch("[0-9a-f]{64}", told["provenance"]["ids_sha256"])
    (row,) = [row for row in told["rows"] if (row["condition"], row["metric"]) == ("clean", "top1")]
    assert (row["value"], row["n"]) == (pytest.approx(2 / 3), 3)
    run([*argv, "--out=p"][:2] + argv[3:], lambda names: [planted()])
    assert "ids_sha256" not in json.loads((root / "o" / "report.json").read_text())["provenance"]
