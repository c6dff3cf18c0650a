"""RobustBench's models as a source, and ours for its benchmark; of its package what is installed, and a planted one."""

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import torch
from analysis_helpers import tiny, write_checkpoint
from cli_helpers import fails
from PIL import Image
from planted import Planted, paint
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from vmoe_momentum.classifiers import open_models, robustbench_zoo
from vmoe_momentum.classifiers.robustbench_zoo import VIEWS, open_zoo_model
from vmoe_momentum.models.saved import KEY
from vmoe_momentum.robustbench import PixelClassifier, open_model
from vmoe_momentum.robustness import labels
from vmoe_momentum.robustness.models import View
from vmoe_momentum.robustness.pictures import Pictures, batches

PLANTED = """
import enum, sys, torch
class Named(enum.Enum):
    cifar10, imagenet, Linf, L2 = "cifar10", "imagenet", "Linf", "L2"
class Net(torch.nn.Module):
    def __init__(self, classes, config=None):
        super().__init__()
        self.model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, classes))
        if config:
            self.model.default_cfg = config
        self.train()
    def forward(self, images):
        return self.model(images)
config = {"input_size": (3, 240, 240), "crop_pct": 0.95, "interpolation": "bicubic"}
model_dicts = {
    Named.cifar10: {Named.Linf: {"Standard": {}, "Ten": {}}, Named.L2: {"Standard": {}}},
    Named.imagenet: {Named.Linf: {
        "Bicubic": {"preprocessing": "BicubicRes256Crop224"}, "Whole": {"preprocessing": "Res224"}, "Timm": {},
        "Nothing": {}, "Crop": {"preprocessing": "Crop288"}, "Fails": {"preprocessing": "Res224"},
    }},
}
def load_model(model_name, model_dir, dataset, threat_model):
    if model_name == "Fails":
        raise OSError("no\\nnetwork")
    assert model_dir.name == "robustbench" and isinstance(dataset, str) and isinstance(threat_model, str)
    return Net(10 if dataset == "cifar10" else 1000, config if model_name == "Timm" else None)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch) -> Path:
    """A package of that name, its distribution beside it, instead of what is installed."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "robustbench"]:
        monkeypatch.delitem(sys.modules, name)
    folder = tmp_path / "site" / "robustbench"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import autoattack\n")  # as the published one
    (folder / "utils.py").write_text(PLANTED)
    (folder / "model_zoo.py").write_text("from .utils import model_dicts\n")
    told = folder.parent / "robustbench-1.1.1.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: robustbench\nVersion: 1.1.1\n")
    monkeypatch.syspath_prepend(folder.parent)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "robustbench"]:
        del sys.modules[name]


def test_models_of_the_zoo_are_opened_by_name(package: Path) -> None:
    """Each with the view its preprocessing says, in eval mode; what only its name has in common is told apart."""
    pytest.importorskip("pyautoattack")
    names = {
        "Bicubic": View(224, 0.875, "bicubic"), "Whole": View(224, 1.0, "bilinear", squash=True),
        "Timm": View(240, 0.95, "bicubic"), "Ten": View(32, 1.0, "bilinear"),
    }  # fmt: skip
    models = open_models([f"robustbench:{name}" for name in names] + ["mine=robustbench:cifar10/L2/Standard"])
    assert [model.name for model in models] == [*names, "mine"]
    assert [model.view for model in models] == [*names.values(), View(32, 1.0, "bilinear")]
    assert [model.num_classes for model in models] == [1000, 1000, 1000, 10, 10]
    assert models[3].class_names[:2] == ["airplane", "automobile"] and models[0].class_names is None
    assert not any(module.training for model in models for module in model.module.modules())
    assert models[0].architecture == "Sequential"
    told = models[4].provenance
    assert told["robustbench"] == "cifar10/L2/Standard" and len(told["weights_sha256"]) == 64
    assert "autoattack" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Standard", "several .* which: robustbench:cifar10/Linf/Standard or robustbench:cifar10/L2/Standard"),
        ("imagenet/Linf/Ten", "no such model; use one it has, such as robustbench:cifar10/Linf/Ten"),
        ("zzz", "no such model; use one it has, 9 of them"),
        ("L2/Ten", "no such model"),
        ("Crop", "it wants pictures prepared as Crop288; models here are shown them as one of Res256Crop224, "),
        ("Nothing", "neither RobustBench nor its network says how it wants pictures"),
        ("Fails", r"cannot load it \(OSError: no network\); its weights .* into .*robustbench/imagenet/Linf"),
    ],
)  # fmt: skip
def test_what_the_zoo_cannot_give_is_told_in_one_line(package: Path, name: str, message: str) -> None:
    pytest.importorskip("pyautoattack")
    with pytest.raises(ValueError, match=f"--model=robustbench:{name}: .*{message}") as told:
        open_zoo_model(f"robustbench:{name}")
    assert "\n" not in str(told.value)


def test_without_the_package_the_way_to_it_is_told(package: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """Also where another package brought files of that name, without being it."""
    (package.parent / "robustbench-1.1.1.dist-info" / "METADATA").unlink()
    (package.parent / "robustbench-1.1.1.dist-info").rmdir()
    monkeypatch.setattr(robustbench_zoo, "version", missing)
    line = fails(["robustness", "--model=robustbench:Ten", f"--data={tmp_path}"], capsys)
    assert line.startswith(
        "vmoe-momentum: error: --model=robustbench:Ten: the package robustbench is missing (No package "
        "metadata was found for robustbench); "
        "pip install 'vmoe_momentum[robustbench]', then pip install --no-deps robustbench==1.1.1"
    )


def missing(name: str) -> str:
    raise PackageNotFoundError(name)


def installed() -> bool:
    try:
        return bool(version("robustbench"))
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not installed(), reason="RobustBench is not installed")
def test_the_real_package(tmp_path: Path, monkeypatch) -> None:
    """Weights that lie in its folder: ResNet-18 as torchvision has it, behind the normalisation."""
    from torchvision.models import resnet18

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    folder = tmp_path / "robustbench" / "imagenet" / "Linf"
    folder.mkdir(parents=True)
    net = resnet18().eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, folder / "Salman2020Do_R18.pt")
    (model,) = open_models(["robustbench:Salman2020Do_R18"])
    images = torch.rand(2, 3, 224, 224)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        torch.testing.assert_close(model.module(images), net((images - mean) / std))
    assert model.view == VIEWS["Res256Crop224"] and model.architecture == "ResNet"


@pytest.mark.skipif(not installed(), reason="RobustBench is not installed")
def test_its_own_code_reads_our_entries(tmp_path: Path, monkeypatch, capsys) -> None:
    """Its dataclass takes every field it knows, and its tables are made of them."""
    from test_travelling import attacked

    from vmoe_momentum.robustness.model_info import model_info

    with robustbench_zoo._robustbench("x"):
        from robustbench.utils import ModelInfo, get_leaderboard_bibtex, get_leaderboard_latex
    monkeypatch.chdir(tmp_path)
    made = attacked(labels=("a", "b"))
    texts = model_info(made, [])
    for path, text in texts.items():
        place = Path(path.replace("/digits/", "/imagenet/"))
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text)
    for text in texts.values():
        entry = {name: value for name, value in json.loads(text).items() if name not in ("external", "unreliable")}
        assert {"clean_acc", "autoattack_acc", "eps", "footnote"} <= set(vars(ModelInfo(**entry)))
    table = get_leaderboard_latex("imagenet", "Linf")
    for text in texts.values():
        entry = json.loads(text)
        assert f"& {entry['clean_acc']} & {entry['external']} & N & Planted & N/A" in table
    assert get_leaderboard_bibtex("imagenet", "Linf") == (set(), "")  # of no paper yet


# ---- ours for theirs


def test_our_models_take_pixels_and_prepare_pictures_as_evaluation_does(tmp_path: Path) -> None:
    """Logits of pictures prepared here are those of the benchmark's own loader; also of one that lies on its side."""
    path = write_checkpoint(tiny(), tmp_path / "a.ckpt")
    saved = torch.load(path)
    saved[KEY] |= {"crop_pct": 0.625, "upright": True}
    torch.save(saved, path)
    model = open_model(str(path))
    assert not model.training and model.preprocessing.view == View(16, 0.625, "bilinear", upright=True)
    rng = np.random.default_rng(0)
    folder, exif = tmp_path / "3", Image.Exif()
    folder.mkdir()
    exif[0x0112] = 6  # lies on its side
    for i, size in enumerate(((16, 16), (70, 90), (120, 66))):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / f"{i}.png", exif=exif)
    paths = sorted(folder.iterdir())
    found = torch.stack([model.preprocessing(Image.open(each)) for each in paths])
    (batch,) = batches(Pictures("data", paths, [3] * 3), [model.preprocessing.view], 3, 0)
    assert found.dtype == torch.float32 and torch.equal(found, batch.views[model.preprocessing.view].float() / 255)
    big = Image.open(paths[1]).rotate(-90, expand=True)
    by_hand = TF.to_tensor(TF.center_crop(TF.resize(big, 25, InterpolationMode.BILINEAR), [16, 16]))
    torch.testing.assert_close(found[1], by_hand)
    (ours,) = open_models([str(path)])
    with torch.no_grad():
        assert torch.equal(model(found), ours.module(found))
    import pickle

    assert torch.equal(pickle.loads(pickle.dumps(model.preprocessing))(Image.open(paths[0])), found[0])


def test_logits_come_in_the_order_of_folders() -> None:
    """RobustBench numbers classes by their folders' names, sorted."""
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    images = torch.rand(4, 3, 2, 2)
    plain = PixelClassifier(module, View(2, 1.0, "bilinear"))
    sorted_ = PixelClassifier(module, View(2, 1.0, "bilinear"), ["n3", "n1", "n2"])
    assert torch.equal(plain(images), module(images)) and torch.equal(sorted_(images), module(images)[:, [1, 2, 0]])


@pytest.mark.skipif(not installed(), reason="RobustBench is not installed")
def test_its_benchmark_takes_our_models(tmp_path: Path, monkeypatch) -> None:
    """On the first of its 5,000 pictures, by its own loader and labels; something quick stands for AutoAttack."""
    with robustbench_zoo._robustbench("x"):
        from robustbench import eval as theirs
    monkeypatch.chdir(tmp_path)

    class Darker:
        def __init__(self, model, norm, eps, **_) -> None:
            assert norm == "Linf"
            self.eps = eps

        def run_standard_evaluation(self, images, labels, bs, state_path):
            return (images - self.eps).clamp(0, 1)

    monkeypatch.setattr(theirs, "AutoAttack", Darker)
    ids = (Path(theirs.__file__).parent / "helper_files" / "imagenet_test_image_ids.txt").read_text().split()
    assert len(ids) == 5000
    for wnid in labels.wnids():
        (tmp_path / "val" / wnid).mkdir(parents=True)
    for place, name in enumerate(ids[:8]):  # right on every second
        answer = labels.wnids().index(name.partition("/")[0]) + 8 * (place % 2)
        paint(tmp_path / "val" / "x.png", answer).rename(tmp_path / "val" / name)
    model = PixelClassifier(Planted(), View(32, 0.875, "bilinear")).eval()
    found = theirs.benchmark(
        model, n_examples=8, dataset="imagenet", threat_model="Linf", eps=4 / 255, data_dir=str(tmp_path),
        preprocessing=model.preprocessing, to_disk=True, model_name="mine",
    )  # fmt: skip
    assert found == (0.5, 0.0)  # another colour is another class
    told = json.loads((tmp_path / "model_info" / "imagenet" / "Linf" / "mine.json").read_text())
    assert (told["clean_acc"], told["autoattack_acc"]) == ("50.0", "0.0")
