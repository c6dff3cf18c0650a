"""Constructing data modules: properties, refusals, and the names the command line knows them by."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch.distributed as dist
from dataset_helpers import HAS_FFCV, module
from lightning.pytorch.cli import LightningArgumentParser

from vmoe_momentum import datasets
from vmoe_momentum.datasets import FolderDataModule, ImageDataModule
from vmoe_momentum.datasets.resuming import rank_and_world_size


def test_properties_are_there_at_once(backend, digits):
    data = backend(str(digits), image_size=32)
    assert data.num_classes == 10 and data.image_size == 32
    assert data.class_names == [str(digit) for digit in range(10)]
    assert data.eval_batch_size == data.batch_size == 128


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("image_size", 0),
        ("batch_size", 0),
        ("eval_batch_size", -1),
        ("num_workers", -2),
        ("seed", -1),
        ("crop_scale", (0.5, 0.1)),
        ("crop_scale", (0.0, 1.0)),
        ("crop_scale", (0.5, 1.5)),
        ("crop_ratio", (2.0, 1.0)),
        ("eval_crop_ratio", 0.0),
        ("eval_crop_ratio", 1.1),
    ],
)
def test_impossible_settings_are_refused_by_name(backend, digits, setting, value):
    with pytest.raises(ValueError) as error:
        backend(str(digits), **{setting: value})
    assert f"data.{setting}={value}: use " in str(error.value)


def test_backend_settings_are_checked_too(digits):
    for policy in ("rand-x9", "nonsense", "augmix-m3"):
        with pytest.raises(ValueError, match=f"data.randaugment='{policy}'.*rand-m10-n2"):
            FolderDataModule(str(digits), randaugment=policy)
    if HAS_FFCV:
        from vmoe_momentum.datasets import FFCVDataModule

        with pytest.raises(ValueError, match="data.batches_ahead=0"):
            FFCVDataModule(str(digits), batches_ahead=0)


def test_a_missing_root_says_how_to_prepare_one(backend, digits, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*nowhere: no such folder; .*data prepare digits --out"):
        backend(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"data\.root=.*no classes\.json"):
        backend(str(tmp_path))
    for content in ("{", '{"classes": []}', '{"classes": [{"id": "a"}]}', '{"classes": [1]}', "[]"):
        (tmp_path / "classes.json").write_text(content)
        with pytest.raises(ValueError, match=r"classes\.json"):
            backend(str(tmp_path))


def test_setup_names_the_split_that_is_missing(tmp_path, pictures):
    import shutil

    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    shutil.rmtree(root / "train" / "bee")
    with pytest.raises(ValueError, match=r"train/bee: no images in class 'bee', where manifest.json says 8"):
        module(FolderDataModule, root)
    module(FolderDataModule, root, "test")
    shutil.move(root / "val" / "bee", root / "val" / "dog")
    with pytest.raises(ValueError, match="folder 'dog' is none of the 3 classes"):
        module(FolderDataModule, root, "test")
    shutil.rmtree(root / "val")
    with pytest.raises(FileNotFoundError, match=r"pictures/val"):
        module(FolderDataModule, root, "predict")


def test_labels_follow_classes_json_not_the_folders(tmp_path, pictures):
    import json
    import shutil

    root = tmp_path / "pictures"
    shutil.copytree(pictures, root)
    entries = [{"id": name, "name": name.upper()} for name in ("cat", "ant", "bee")]
    (root / "classes.json").write_text(json.dumps({"classes": entries}))
    (root / "manifest.json").unlink()  # which vouches for the names it was sealed with
    data = module(FolderDataModule, root, "test")
    assert data.class_names == ["CAT", "ANT", "BEE"]
    assert data._files["val"][0].path.parent.name == "cat" and data._files["val"][0].label == 0


def test_fewer_images_than_a_batch_are_refused(backend, digits):
    with pytest.raises(ValueError, match=r"data\.batch_size=2000 .* found 1437"):
        module(backend, digits, batch_size=2000).train_dataloader()


def test_the_parser_knows_both_by_bare_name(backend, digits):
    parser = LightningArgumentParser()
    parser.add_lightning_class_args(ImageDataModule, "data", subclass_mode=True)
    name = backend.__name__
    parsed = parser.parse_args([f"--data={name}", f"--data.root={digits}", "--data.crop_scale=[0.5, 1.0]"])
    data = parser.instantiate_classes(parsed).data
    assert type(data) is backend and data.crop_scale == (0.5, 1.0)
    with pytest.raises(SystemExit):
        parser.parse_args([f"--data={name}", f"--data.root={digits}", "--data.bathc_size=3"])


def test_rank_comes_from_the_strategy_where_it_has_an_opinion(monkeypatch):
    class Strategy:
        distributed_sampler_kwargs = {"rank": 1, "num_replicas": 2}

    class Trainer:
        strategy = Strategy()

    assert rank_and_world_size(Trainer()) == (0, 1)  # no process group
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 3)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    assert rank_and_world_size(Trainer()) == (1, 2)
    assert rank_and_world_size(None) == (3, 4)


def test_no_module_loads_ffcv_or_scikit_learn_when_imported():
    """Importing ffcv takes eight seconds; only the two modules imported inside functions may do it at their top."""
    lazy, heavy = {"ffcv_loader", "ffcv_decoder"}, {"ffcv", "numba", "sklearn", "cv2"}
    for path in Path(datasets.__file__).parent.glob("*.py"):
        names = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module)
        if path.stem not in lazy:
            assert not {name.split(".")[0] for name in names} & heavy, path
            assert not {name.split(".")[-1] for name in names} & lazy, path
