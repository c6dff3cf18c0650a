"""Folder names become labels by one rule a model, whoever else is compared; checkpoints keep folders and names."""

import json
import shutil
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from analysis_helpers import SIZE, write_checkpoint
from cli_helpers import fails, rows
from dataset_helpers import draw_pictures
from planted import paint, planted

from vmoe_momentum import cli, create_model
from vmoe_momentum.classifiers import open_models
from vmoe_momentum.datasets import FolderDataModule, prepare_folder
from vmoe_momentum.models.saved import KEY
from vmoe_momentum.robustness import Settings, labels, make_plan
from vmoe_momentum.robustness.sets import SETS, recognise
from vmoe_momentum.training import ImageClassifier
from vmoe_momentum.training.identity import check_checkpoint

PLAIN = Settings(attacks=(), regenerate=False)
WNIDS = ("n02979186", "n01440764", "n02102040")  # cassette player, tench, English springer
FOLDERS = {"numbers": [str(k) for k in range(12)], "wnids": list(WNIDS), "words": ["cat", "dog", "ant"]}


# ---- one rule a model


def knowing(label: str, count: int, ids: list[str] | None = None, names: list[str] | None = None):
    return planted(label, count, names)._replace(class_ids=ids)


def models_for(folders: list[str]) -> list:
    """Everything a model of these classes may know, right, reversed or nothing."""
    count, text = len(folders), sorted(folders)
    shown = [f"a {name}" for name in text]
    return [
        knowing("ids", count, text), knowing("ids and names", count, text, shown),
        knowing("reversed ids", count, text[::-1]), knowing("names", count, None, text),
        knowing("reversed names", count, None, text[::-1]), knowing("shown names", count, None, shown),
        knowing("nothing", count), knowing("nothing too", count),
    ]  # fmt: skip


def labels_of(root: Path, models: list) -> dict[str, int] | str:
    """Folder -> label, or the message of the refusal."""
    try:
        pictures = make_plan(PLAIN._replace(data=str(root)), models)[0].pictures
    except ValueError as error:
        return str(error)
    return {path.parent.name: label for path, label in zip(pictures.paths, pictures.labels, strict=True)}


@pytest.mark.parametrize("prepared", [False, True], ids=["folders", "prepared"])
@pytest.mark.parametrize("kind", list(FOLDERS))
def test_company_changes_no_models_labels(kind: str, prepared: bool, tmp_path: Path) -> None:
    """Each pair in both orders: the labels that each has alone, or a refusal that names both."""
    for name in FOLDERS[kind]:
        paint(tmp_path / name / "x.png", 3)
    if prepared:
        entries = [{"id": name, "name": f"a {name}"} for name in sorted(FOLDERS[kind])]
        (tmp_path / "classes.json").write_text(json.dumps({"classes": entries}))
    models = models_for(FOLDERS[kind])
    alone = {model.name: labels_of(tmp_path, [model]) for model in models}
    assert {name for name, found in alone.items() if isinstance(found, str)} <= {"shown names"}
    agreed = 0
    for first, second in permutations(models, 2):
        found, own = labels_of(tmp_path, [first, second]), (alone[first.name], alone[second.name])
        if own[0] == own[1] and not isinstance(own[0], str):
            assert found == own[0]
            agreed += 1
        elif isinstance(own[0], str) or isinstance(own[1], str):
            assert "--model=shown names: folder" in found
        else:
            assert f"{first.name} and {second.name} number their classes differently: folder " in found
    assert agreed >= 8
    right = {name: place for place, name in enumerate(sorted(FOLDERS[kind]))}
    assert alone["ids"] == alone["names"] == alone["ids and names"] == right
    assert alone["reversed ids"] == alone["reversed names"] == {k: len(right) - 1 - v for k, v in right.items()}
    if prepared:  # the data say what was trained on them
        assert alone["nothing"] == alone["shown names"] == right
    else:
        assert alone["nothing"] == ({name: int(name) for name in right} if kind == "numbers" else right)


def test_a_callable_says_its_classes(tmp_path: Path, monkeypatch) -> None:
    """Twelve numbered folders: 16.7 % by numbers, all of them by what it says; and a list of another length."""
    (tmp_path / "twelve.py").write_text(
        "import torch\n"
        "class Twelve(torch.nn.Module):\n"
        "    image_size = 8\n"
        "    def forward(self, x):\n"
        "        return torch.zeros(len(x), 12) + x.mean()\n"
        "class Says(Twelve):\n    class_ids = sorted(str(k) for k in range(12))\n"
        "class Wrong(Twelve):\n    class_names = ['one']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in FOLDERS["numbers"]:
        paint(tmp_path / "data" / name / "x.png", 3)
    says, silent = open_models(["twelve:Says", "twelve:Twelve"])
    assert labels_of(tmp_path / "data", [says])["10"] == 2 and labels_of(tmp_path / "data", [silent])["10"] == 10
    told = labels_of(tmp_path / "data", [silent, says])
    assert "folder 10 is class 10 of Twelve (by numbers) and 2 of Says (by the folder names it was trained on)" in told
    with pytest.raises(ValueError, match="its class_names has 1 entries for 12 classes"):
        open_models(["twelve:Wrong"])


def test_thousand_classes_are_imagenets_only_where_they_are(tmp_path: Path) -> None:
    """Numbers and wnids for those that say nothing, or ImageNet's; not where the 1,000 are others."""
    index = {wnid: place for place, wnid in enumerate(labels.wnids())}
    for folder, answer in (("n", "10"), ("w", WNIDS[0])):
        paint(tmp_path / folder / answer / "x.png", 3)
    text = sorted(str(k) for k in range(1000))
    nothing, wnids = planted(), planted()._replace(class_ids=list(labels.wnids()))
    numbers = planted("numbers")._replace(class_ids=text)
    for model in (nothing, wnids, planted(names=[f"a {wnid}" for wnid in index])):
        assert labels_of(tmp_path / "n", [model]) == {"10": 10}
        assert labels_of(tmp_path / "w", [model]) == {WNIDS[0]: index[WNIDS[0]]}
    assert labels_of(tmp_path / "n", [numbers]) == {"10": text.index("10")}
    for other in (numbers, planted("numbers", names=text)):
        assert f"folder {WNIDS[0]} is no class of this model" in labels_of(tmp_path / "w", [other])
    shuffled = planted("shuffled")._replace(class_ids=list(labels.wnids())[::-1])
    for name in ("imagenet_a", "imagenet_v2", "imagenet_sketch"):
        for other in (numbers, shuffled):
            with pytest.raises(ValueError, match=f"those of --model={other.name} are others, or in another order"):
                make_plan(PLAIN._replace(sets={name: str(tmp_path / "w")}), [other])


# ---- folders with display names


@pytest.fixture(scope="module")
def imagenette(tmp_path_factory) -> Path:
    """Three folders named by wnids, with display names; and a checkpoint as fit describes it."""
    here = tmp_path_factory.mktemp("imagenette")
    draw_pictures(here / "source", 4, WNIDS)
    root = prepare_folder(str(here / "source"), str(here / "data"), val_fraction=0.5, num_workers=1).root
    data = FolderDataModule(str(root), image_size=SIZE)
    assert data.class_ids == sorted(WNIDS) and data.class_names[0].startswith("tench")
    module = ImageClassifier(
        create_model("vmoe_tiny_patch4_16"), num_classes=3, image_size=SIZE, class_names=data.class_names
    )
    module._trainer = SimpleNamespace(datamodule=data)
    content = {"state_dict": module.state_dict(), "epoch": 0, "global_step": 1, KEY: module.facts()}
    torch.save(content, here / "a.ckpt")
    del content[KEY]["class_ids"]
    torch.save(content, here / "old.ckpt")
    return here


LONG = pytest.mark.long


@pytest.mark.parametrize("kind", ["hf", "state-dict", *(pytest.param(k, marks=LONG) for k in ("pt2", "onnx"))])
def test_every_format_takes_the_data_it_was_trained_on(imagenette: Path, kind: str, tmp_path: Path, capsys) -> None:
    """By folder names, which the export keeps beside the names that classify shows."""
    if kind == "onnx":
        pytest.importorskip("onnxruntime")
    out = tmp_path / "out"
    cli.run(["export", f"--ckpt_path={imagenette / 'a.ckpt'}", f"--to={kind}", f"--out={out}",
             f"--data={imagenette / 'data'}"])  # fmt: skip
    told = json.loads((out / "metadata.json").read_text())
    assert told["class_ids"] == sorted(WNIDS) and "tench" in told["class_names"][0]
    if kind == "hf":
        (model,) = open_models([f"x=local-dir:{out}"])
        assert model.class_ids == told["class_ids"] and model.class_names == told["class_names"]
        picture = next((imagenette / "data" / "val" / WNIDS[0]).iterdir())
        capsys.readouterr()
        cli.run(["classify", str(out), str(picture)])
        assert told["class_names"][0] in capsys.readouterr().out
        again = tmp_path / "again"  # and an export of the export
        cli.run(["export", f"--ckpt_path=local-dir:{out}", "--to=hf", f"--out={again}",
                 f"--data={imagenette / 'data'}"])  # fmt: skip
        assert json.loads((again / "metadata.json").read_text())["class_ids"] == told["class_ids"]


@pytest.mark.parametrize("name", ["a", "old"])
def test_robustness_takes_the_data_it_was_trained_on(imagenette: Path, name: str, tmp_path: Path, capsys) -> None:
    """An old checkpoint, which kept names only, takes the folders of data with these names; and no others."""
    (model,) = open_models([str(imagenette / f"{name}.ckpt")])
    right = {wnid: place for place, wnid in enumerate(sorted(WNIDS))}
    assert labels_of(imagenette / "data", [model]) == right
    shutil.copytree(imagenette / "data" / "val", tmp_path / "bare")
    found = labels_of(tmp_path / "bare", [model])
    if name == "a":
        assert found == right
    else:
        assert f"folder {min(WNIDS)} is no class of this model (by its class names)" in found
    short = ["--corruptions=[none]", "--attacks=[]", f"--out={tmp_path / 'o'}"]
    argv = ["robustness", f"--model={imagenette / name}.ckpt", *short]
    cli.run([*argv, f"--data={imagenette / 'data'}"])
    assert {row["n"] for row in rows(tmp_path / "o" / "rows.csv")} == {"6"}
    told = json.loads((tmp_path / "o" / "report.json").read_text())["provenance"]["pictures"]["data"]["labels"]
    assert told == "by the folder names it was trained on"
    (tmp_path / "bare" / "n03000000").mkdir()
    paint(tmp_path / "bare" / "n03000000" / "x.png", 3)
    assert "is no class of this model" in fails([*argv, f"--data={tmp_path / 'bare'}"], capsys)


def test_a_damaged_classes_json_is_named(tmp_path: Path) -> None:
    paint(tmp_path / "0" / "x.png", 3)
    for content in ("{", "[]", '{"classes": [{"id": "0"}]}', '{"classes": 3}'):
        (tmp_path / "classes.json").write_text(content)
        assert "classes.json: not written by data prepare" in labels_of(tmp_path, [planted(num_classes=10)])


def test_data_of_another_order_is_refused(tmp_path: Path) -> None:
    """Resuming and testing: the same folder as another class would give wrong scores; other folders would not."""
    checkpoint = torch.load(write_checkpoint(create_model("vmoe_tiny_patch4_16", num_classes=10), tmp_path / "a.ckpt"))
    checkpoint[KEY]["class_ids"] = [str(k) for k in range(10)]
    for ids, fits in ((checkpoint[KEY]["class_ids"], True), (list("abcdefghij"), True), (list("9876543210"), False)):
        module = ImageClassifier(create_model("vmoe_tiny_patch4_16", num_classes=10), num_classes=10, image_size=SIZE)
        data = SimpleNamespace(class_ids=ids, eval_crop_ratio=1.0, eval_image_size=SIZE)
        module._trainer = SimpleNamespace(datamodule=data)
        if fits:
            check_checkpoint(module, checkpoint, module.facts(), module.override_model)
            continue
        with pytest.raises(ValueError, match="class_ids: folder 9 is class 9, in the data 0; .*--override-model"):
            check_checkpoint(module, checkpoint, module.facts(), module.override_model)
        module.override_model = True
        check_checkpoint(module, checkpoint, module.facts(), module.override_model)


# ---- the set that was named


def tree(root: Path, kind: str) -> Path:
    """Folders and file names of a published set, whole."""
    index = labels.wnids()
    if kind in ("imagenet_a", "imagenet_r", "imagenet_o"):
        folders = [index[k] for k in labels.subset(kind[-1])]
    else:
        folders = [str(k) for k in range(1000)] if kind == "imagenet_v2" else list(index)
    val = "ILSVRC2012_val_00000007"
    names = {"imagenet_r": "art_0", "imagenet_sketch": "sketch_3", "val": val, "imagenet_stylized": val}
    picture = paint(root / "x.png", 3)
    for folder in folders:
        (root / kind / folder).mkdir(parents=True)
        (root / kind / folder / f"{names.get(kind, '0.01_x')}.png").hardlink_to(picture)
    return root / kind


FOLDERS_OF_CLASSES = [name for name, each in SETS.items() if not each.corruptions and each.mapping is None]


@pytest.mark.parametrize("kind", [*FOLDERS_OF_CLASSES, "val"])
def test_another_set_than_named_is_refused(kind: str, tmp_path: Path) -> None:
    """Every published set given as every other one: each is taken as itself, and what was found is named.

    Stylized ImageNet has the names of the pictures that it was made of.
    """
    root = tree(tmp_path, kind)
    looks = "val" if kind == "imagenet_stylized" else kind
    assert recognise(labels.list_folders(root, "--x")) == looks
    title = "ImageNet's validation pictures, or made of these" if looks == "val" else SETS[looks].title
    for name in FOLDERS_OF_CLASSES:
        data = str(root) if name == "imagenet_o" else None
        settings = PLAIN._replace(sets={name: str(root)}, data=data)
        if name == kind or (name == "imagenet_stylized" and looks == "val"):
            (cell,) = [c for c in make_plan(settings, [planted()]) if c.pictures.name.startswith(name)]
            assert len(cell.pictures.paths) == len(list(root.iterdir()))
            continue
        with pytest.raises(ValueError, match=f"--{name}={root}: .*it looks like {title}"):
            make_plan(settings, [planted()])
