"""`vmoe-momentum export` and `classify`: four formats of one checkpoint, read by others, and what is refused."""

import io
import json
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from analysis_helpers import tiny, write_checkpoint
from cli_helpers import fails
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import vmoe_momentum
from vmoe_momentum import SoftRouter, cli
from vmoe_momentum.export import FORMATS, choose, open_served
from vmoe_momentum.export.round_trip import RoundTrip, check
from vmoe_momentum.models.saved import KEY, RAW
from vmoe_momentum.parsers import pick_device

pytest.importorskip("onnxruntime")


def network(made: Path):
    return choose(str(made / "run" / "checkpoints" / "last.ckpt")).model


@pytest.mark.parametrize("kind", list(FORMATS))
def test_what_a_folder_says_of_itself(made: Path, kind: str) -> None:
    told = json.loads((made / kind / "metadata.json").read_text())
    assert told["format"] == kind and told["image_size"] == 16 and told["input"] == "float32"
    assert told["source"] == {
        "file": "last.ckpt", "weights": "as trained, not averaged", "epoch": 5, "step": 50,
        "sha256": told["source"]["sha256"],
    }  # fmt: skip
    assert len(told["source"]["sha256"]) == 64 and told["scores"] == {"test/top1": 0.9125, "test/loss": 0.25}
    assert told["recipe"] == {"optimizer": {"name": "adamw", "lr": 0.002}, "max_epochs": 5} and told["data"] == "digits"
    found = told["round_trip"]
    assert found["pictures"] == 40 and found["max_difference"] < 1e-4 and found["agreement"] == 1.0
    assert (
        found["device"] == pick_device(None)
        and found["top1_before"] == found["top1_after"]
        and found["megabytes"] > 1
        and found["latency_ratio"] > 0
    )
    for path in (made / kind).iterdir():  # no places of this machine
        content = path.read_bytes()
        if path.suffix == ".pt2":
            content = b"".join(zipfile.ZipFile(path).read(name) for name in zipfile.ZipFile(path).namelist())
        assert str(made).encode() not in content and str(Path(vmoe_momentum.__file__).parent).encode() not in content
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (made / kind).iterdir())


def test_timm_loads_the_directory(made: Path) -> None:
    net = timm.create_model(f"local-dir:{made / 'hf'}", pretrained=True).eval()
    pixels = torch.rand(5, 3, 16, 16)
    config = timm.data.resolve_model_data_config(net)
    mean, std = (torch.tensor(config[name]).view(1, 3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(net((pixels - mean) / std), network(made)(pixels), atol=1e-6, rtol=0)
    card = (made / "hf" / "README.md").read_text()
    for words in ("HeavyBall(mu=0.7", "TopKRouter(top_k=2", "test/top1: 0.9125", "lr: 0.002", "digits", "epoch 5"):
        assert words in card
    assert "library_name: timm" in card and str(made) not in card


def test_labels_go_with_the_directory(digits: Path, tmp_path: Path, capsys) -> None:
    path = write_checkpoint(tiny(), tmp_path / "a.ckpt")
    content = torch.load(path)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    content[KEY]["class_names"] = names
    torch.save(content, path)
    pictures = tmp_path / "pictures"
    for label, name in enumerate(names):
        shutil.copytree(digits / "val" / str(label), pictures / name)
    cli.run(["export", f"--ckpt_path={path}", "--to=hf", f"--out={tmp_path / 'o'}", f"--data={pictures}", "--limit=5"])
    assert json.loads((tmp_path / "o" / "config.json").read_text())["pretrained_cfg"]["label_names"] == names
    assert "without checksums" not in capsys.readouterr().err  # not even of the draft that is compared
    cli.run(["classify", str(tmp_path / "o"), str(next((pictures / "six").iterdir())), "--top_k=10"])
    shown = capsys.readouterr().out
    assert all(f"%  {name}" in shown for name in names)


def test_tensors_under_timms_names(made: Path) -> None:
    found, expected = load_file(made / "state-dict" / "model.safetensors"), network(made).net.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("kind", ["pt2", "onnx"])
def test_others_run_it_without_this_package(made: Path, kind: str, tmp_path: Path) -> None:
    pixels = torch.rand(17, 3, 16, 16)
    torch.save(pixels, tmp_path / "pixels.pt")
    run = {
        "pt2": "answer = torch.export.load(sys.argv[1] + '/model.pt2').module()\n",
        "onnx": "import onnxruntime\nsession = onnxruntime.InferenceSession(sys.argv[1] + '/model.onnx')\n"
        "answer = lambda x: torch.from_numpy(session.run(None, {'images': x.numpy()})[0])\n",
    }[kind]
    code = (
        "import sys, torch\nsys.modules['vmoe_momentum'] = sys.modules['timm'] = None  # importing them fails\n" + run
        + "pixels = torch.load(sys.argv[2] + '/pixels.pt')\n"
        "with torch.no_grad():\n"
        "    torch.save([answer(pixels[:size]) for size in (1, 2, 17)], sys.argv[2] + '/answers.pt')\n"
    )  # fmt: skip
    subprocess.run([sys.executable, "-c", code, str(made / kind), str(tmp_path)], check=True, cwd=tmp_path, timeout=120)
    with torch.no_grad():
        expected = network(made)(pixels)
    for size, found in zip((1, 2, 17), torch.load(tmp_path / "answers.pt"), strict=True):
        torch.testing.assert_close(found, expected[:size], atol=1e-4, rtol=0)
        assert torch.equal(found.argmax(1), expected[:size].argmax(1))


# ---- classify


@pytest.mark.parametrize("kind", list(FORMATS))
def test_every_format_classifies_alike(made: Path, digits: Path, kind: str, capsys) -> None:
    paths = [sorted((digits / "val" / name).iterdir())[0] for name in ("3", "8")]
    cli.run(["classify", str(made / kind), *map(str, paths), "--top_k=3", "--trust_program"])
    captured = capsys.readouterr()
    shown, told = captured.out.splitlines(), captured.err.splitlines()
    assert len(shown) == 8 and str(paths[0]) in shown[0]
    assert told == [f"on {pick_device(None)}"] or torch.cuda.is_available() and kind == "onnx"
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(p).convert("RGB"))) for p in paths])
    with torch.no_grad():
        best = network(made)(pixels.permute(0, 3, 1, 2)).softmax(dim=1).topk(3)
    for place in range(2):
        for rank in range(3):
            told = f"{100 * float(best.values[place, rank]):5.1f} %  {int(best.indices[place, rank])}"
            assert told in shown[4 * place + 1 + rank]


@pytest.mark.parametrize("kind", ["hf", "state-dict"])
def test_which_expert_each_patch_went_to(made: Path, digits: Path, kind: str, tmp_path: Path) -> None:
    from vmoe_momentum.analysis.expert_map import expert_maps

    path = sorted((digits / "val" / "3").iterdir())[0]
    cli.run(["classify", str(made / kind), str(path), f"--plot={tmp_path / 'a' / 'experts.png'}"])
    assert Image.open(tmp_path / "a" / "experts.png").width > 500
    served = open_served(str(made / kind))
    pixels = served.pixels(path)[None]
    maps = expert_maps(served.network(), pixels)
    assert list(maps) == [1, 3, 5, 7] and all(found.shape == (1, 4, 4) for found in maps.values())
    model, seen = served.network(), {}
    for index in maps:  # by hand: the router's own choice, class token first
        model.net.blocks[index].mlp.router.register_forward_hook(
            lambda m, i, o, index=index: seen.update({index: o[0].expert.reshape(1, 17, 2)[:, 1:, 0]})
        )
    with torch.no_grad():
        model(pixels)
    assert all(torch.equal(maps[index].reshape(1, 16), seen[index]) for index in maps)


def test_experts_of_soft_routers_and_of_none() -> None:
    from vmoe_momentum.analysis.expert_map import expert_maps
    from vmoe_momentum.models import PixelModel

    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    found = expert_maps(PixelModel(tiny(router=SoftRouter())).eval(), pixels)
    assert all(int(each.min()) >= 0 and int(each.max()) < 4 for each in found.values())
    with pytest.raises(ValueError, match="no MoE blocks"):
        expert_maps(PixelModel(timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1)), pixels)


# ---- which weights


def test_averaged_or_raw_is_said_and_done(tmp_path: Path) -> None:
    path = write_checkpoint(tiny(), tmp_path / "best.ckpt")
    content = torch.load(path)
    content[RAW] = {name: value + 1.0 for name, value in content["state_dict"].items()}
    torch.save(content, path)
    plain, raw = choose(str(path)), choose(str(path), "raw")
    assert plain.told["weights"] == "averaged" and raw.told["weights"] == "raw"
    name = "head.bias"
    assert torch.equal(raw.model.net.state_dict()[name], plain.model.net.state_dict()[name] + 1.0)
    single = write_checkpoint(tiny(), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"--weights=averaged: .*last.ckpt has none"):
        choose(str(single), "averaged")
    assert choose(str(tmp_path)).told["file"] == "best.ckpt"
    assert choose(str(tmp_path), pick="last").told["file"] == "last.ckpt"


def test_prefixes_of_compiled_networks_are_taken_off(tmp_path: Path) -> None:
    path = write_checkpoint(tiny(), tmp_path / "a.ckpt")
    content = torch.load(path)
    content["state_dict"] = {
        name.replace("model.", "model._orig_mod.", 1): value for name, value in content["state_dict"].items()
    }
    torch.save(content, path)
    assert torch.equal(choose(str(path)).model.net.head.weight, tiny().head.weight)


# ---- what is not opened


class Poison:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_poisoned_checkpoint_runs_no_code(tmp_path: Path, digits: Path, capsys) -> None:
    path, victim = write_checkpoint(tiny(), tmp_path / "a.ckpt"), tmp_path / "ran"
    torch.save({**torch.load(path), "extra": Poison(victim)}, path)
    argv = [
        "export",
        f"--ckpt_path={path}",
        "--to=state-dict",
        f"--out={tmp_path / 'o'}",
        f"--data={digits}",
        "--limit=5",
    ]
    line = fails(argv, capsys)
    assert "holds code, which is never run" in line and not victim.exists() and not (tmp_path / "o").exists()
    cli.run([*argv, "--trust_pickle"])  # asked for
    assert victim.exists() and (tmp_path / "o" / "model.safetensors").exists()


def test_a_program_is_opened_only_when_trusted(made: Path, digits: Path, tmp_path: Path, capsys) -> None:
    """Reading a pt2 file may run code: torch unpickles, evaluates and calls what stands in it."""
    shutil.copytree(made / "pt2", tmp_path / "pt2")
    content, victim = io.BytesIO(), tmp_path / "ran"
    torch.save(Poison(victim), content)
    source, target = made / "pt2" / "model.pt2", tmp_path / "pt2" / "model.pt2"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, content.getvalue() if "sample_inputs" in name else old.read(name))
    picture = str(sorted((digits / "val" / "3").iterdir())[0])
    line = fails(["classify", str(tmp_path / "pt2"), picture], capsys)
    assert "a pt2 file is a program" in line and "--trust_program" in line and not victim.exists()
    target.write_bytes(source.read_bytes()[:1000])
    assert "model.pt2 is damaged" in fails(["classify", str(tmp_path / "pt2"), picture, "--trust_program"], capsys)
    with pytest.raises(ValueError, match="model.pt2: cannot be read"):  # nor without checksums
        FORMATS["pt2"].open(tmp_path / "pt2", {})


def test_an_export_that_is_not_its_network_is_not_kept(made: Path, digits: Path, tmp_path: Path, monkeypatch, capsys):
    form = FORMATS["state-dict"]
    wrong = form._replace(open=lambda *given: lambda images: form.open(*given)(images) + 1e-3)
    monkeypatch.setitem(FORMATS, "state-dict", wrong)
    argv = ["export", f"--ckpt_path={made / 'run'}", "--pick=last", "--to=state-dict", f"--data={digits}", "--limit=5"]
    assert "not the network it comes from (differs by up to 0.001" in fails([*argv, f"--out={tmp_path / 'o'}"], capsys)
    assert list(tmp_path.iterdir()) == []
    fine = RoundTrip(9, 0.2, 0.89, 0.9, 0.8, 1.0, 1.0, None, "cpu")
    with pytest.raises(ValueError, match="--precision=int8: too coarse"):
        check(fine, "int8", "onnx")
    check(fine._replace(agreement=0.95), "int8", "onnx")
    with pytest.raises(ValueError, match="not finite"):
        check(fine._replace(max_difference=float("nan")), "fp16", "onnx")


@pytest.mark.long
def test_a_full_disk_leaves_nothing(made: Path, digits: Path, tmp_path: Path) -> None:
    """Files may grow to 300 kB only, in a process of its own."""
    code = (
        "import resource, signal, sys\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from vmoe_momentum import cli\nimport vmoe_momentum.export.commands\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, {resource.RLIM_INFINITY}))\n"
        f"for kind in {list(FORMATS)}:\n"
        "    try:\n"
        "        cli.main([*sys.argv[1:], f'--to={kind}'])\n"
        "    except SystemExit as stopped:\n"
        "        assert stopped.code == 2\n"
    )
    argv = ["export", f"--ckpt_path={made / 'run'}", "--pick=last", f"--data={digits}", "--limit=5"]
    done = subprocess.run(
        [sys.executable, "-c", code, *argv, f"--out={tmp_path / 'o'}"], capture_output=True, text=True, timeout=200
    )
    told = [line for line in done.stderr.splitlines() if "o: cannot be written" in line]
    assert done.returncode == 0 and len(told) == len(FORMATS) and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--ckpt_path=none.ckpt"], "none.ckpt: no such file"),
        (["--ckpt_path=https://x/y.ckpt"], "local files only"),
        (["--ckpt_path=cut.ckpt"], "cut.ckpt: not a checkpoint that can be read safely"),
        (["--ckpt_path=other.ckpt"], "its tensors do not fit the network it describes"),
        (["--ckpt_path=empty"], "no checkpoints in it"),
        (["--ckpt_path={m}/run"], "no best.ckpt in it; name one: last.ckpt"),
        (["--ckpt_path=a.ckpt", "--pick=last"], "says which checkpoint of a folder"),
        (["--ckpt_path=a.ckpt", "--to=jpeg"], "to=jpeg: expected 'hf', 'pt2'"),
        (["--ckpt_path=a.ckpt", "--out=a.ckpt"], "--out=a.ckpt: it exists"),
        (["--ckpt_path=a.ckpt", "--out=empty", "--overwrite", "--data=none"], "--data=none: no such folder"),
        (["--ckpt_path=a.ckpt", "--out=mine", "--overwrite"], "not written by this command"),
        (["--ckpt_path=a.ckpt", "--limit=0"], "--limit=0: use a whole number from 1"),
        (["--ckpt_path=a.ckpt", "--precision=fp16"], "--precision"),
        (["--ckpt_path=a.ckpt", "--input=uint8"], "are for pt2 and onnx"),
        (["--ckpt_path=a.ckpt", "--to=pt2", "--precision=int8"], "--precision=int8: pt2 knows fp32; use --to onnx"),
        (["--ckpt_path=a.ckpt", "--push=me/net"], "--push=me/net: the hub takes --to hf"),
        (["--ckpt_path=a.ckpt", "--scores=empty"], "empty: no metrics.csv in it"),
        (["--ckpt_path=a.ckpt", "--weights=averaged"], "--weights=averaged: a.ckpt has none"),
        (["--ckpt_path=a.ckpt", "--device=cuda:9"], "--device=cuda:9: not on this machine; use cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(
    argv: list[str], message: str, made: Path, digits: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(tiny(), tmp_path / "a.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    content = torch.load(path)
    content["state_dict"]["model.net.head.bias"] = torch.zeros(3)
    torch.save(content, tmp_path / "other.ckpt")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    given = {"to": "state-dict", "out": "o", "data": str(digits), **dict(w[2:].partition("=")[::2] for w in argv)}
    words = [f"--{name}" if name == "overwrite" else f"--{name}={value}" for name, value in given.items()]
    assert message in fails(["export", *[word.format(m=made) for word in words]], capsys)
    assert sorted(tmp_path.rglob("*")) == before


def test_overwriting_replaces_only_exports(made: Path, digits: Path, tmp_path: Path) -> None:
    argv = ["export", f"--ckpt_path={made / 'run'}", "--pick=last", "--to=state-dict", f"--data={digits}", "--limit=5"]
    cli.run([*argv, f"--out={tmp_path / 'o'}"])
    (tmp_path / "o" / "extra").touch()
    cli.run([*argv, f"--out={tmp_path / 'o'}", "--overwrite"])
    assert not (tmp_path / "o" / "extra").exists() and (tmp_path / "o" / "metadata.json").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["none", "x.png"], "x.png: no such file"),
        (["none", "{p}"], "none: no such folder; give one that vmoe-momentum export wrote"),
        (["empty", "{p}"], "empty: no metadata.json of vmoe-momentum export in it"),
        (["{m}/hf", "bad.png"], "bad.png: not a readable image"),
        (["{m}/hf", "{p}", "--top_k=0"], "--top_k=0: use a whole number from 1"),
        (["{m}/onnx", "{p}", "--plot=o.png"], "--plot: onnx files keep no experts to look at"),
        (["{m}/hf", "{p}", "--plot=bad.png/o.png"], "--plot=bad.png/o.png: cannot be written"),
        (["{m}/hf", "{p}", "--device=gpu"], "--device=gpu: not on this machine; use cpu"),
        (["damaged", "{p}"], "damaged"),
    ],
)  # fmt: skip
def test_classify_refuses_in_one_line(
    argv: list[str], message: str, made: Path, digits: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.png").write_bytes(b"no picture")
    shutil.copytree(made / "state-dict", tmp_path / "damaged")
    (tmp_path / "damaged" / "model.safetensors").write_bytes(b"\0" * 100)
    picture = sorted((digits / "val" / "3").iterdir())[0]
    assert message in fails(["classify", *[word.format(m=made, p=picture) for word in argv]], capsys)


@pytest.mark.long
def test_an_imported_directory_can_be_exported(digits: Path, tmp_path: Path) -> None:
    from vmoe_momentum.models.directory import save

    net = tiny(rule="Nesterov")
    nn.init.normal_(net.head.weight)
    save(net, tmp_path / "net")
    cli.run(["export", f"--ckpt_path=local-dir:{tmp_path / 'net'}", "--to=pt2", f"--out={tmp_path / 'o'}",
             f"--data={digits}", "--limit=5", "--input=uint8", "--output=probabilities"])  # fmt: skip
    served = open_served(str(tmp_path / "o"), trust_program=True)
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    with torch.no_grad():
        expected = net(pixels.float() / 127.5 - 1).softmax(dim=1)
    torch.testing.assert_close(served.probabilities(pixels), expected, atol=1e-5, rtol=0)
    cli.run(["export", f"--ckpt_path=local-dir:{tmp_path / 'net'}", "--to=state-dict", f"--out={tmp_path / 's'}",
             f"--data={digits}", "--limit=5"])  # fmt: skip
    torch.testing.assert_close(open_served(str(tmp_path / "s")).probabilities(pixels), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("router", ["ExpertChoiceRouter", "SoftRouter", "TopKRouter"])
def test_networks_that_route_images_together_are_compared_in_the_same_company(
    router: str, digits: Path, tmp_path: Path, capsys
) -> None:
    """Groups of 4 images: tensors are written; a program, which answers for any number, is refused."""
    settings = {"group_size": 17 * 4} | ({"eval_capacity_factor": 0.6} if router == "TopKRouter" else {})
    path = write_checkpoint(tiny(router={"class_path": router, "init_args": settings}), tmp_path / "a.ckpt")
    argv = ["export", f"--ckpt_path={path}", f"--data={digits}", "--limit=22"]
    for kind in FORMATS:
        words = [*argv, f"--to={kind}", f"--out={tmp_path / kind}"]
        if kind in ("hf", "state-dict"):
            cli.run(words)
            told = json.loads((tmp_path / kind / "metadata.json").read_text())["round_trip"]
            assert told["agreement"] == 1.0 and told["max_difference"] < 1e-6
        else:
            assert "routes 4 images together" in fails(words, capsys)
            assert not (tmp_path / kind).exists()
