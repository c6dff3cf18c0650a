"""`vmoe-momentum robustness` on real digits with our networks, and its refusals."""

import json
import os
from pathlib import Path

import pytest
import timm
import torch
from analysis_helpers import tiny, write_checkpoint
from cli_helpers import fails, rows
from PIL import Image

from vmoe_momentum import SoftRouter, cli
from vmoe_momentum.classifiers import open_models
from vmoe_momentum.models.saved import KEY
from vmoe_momentum.robustness import parse_eps

pytest.importorskip("torchattacks")
pytest.importorskip("cv2")
SHORT = ["--limit=6", "--corruptions=[contrast]", "--severities=[2]", "--attacks=[fgsm]", "--eps=[2/255]"]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_two_networks_and_a_timm_model_side_by_side(digits: Path, here: Path) -> None:
    """Every condition, n and routing; the dense model has no routing; nothing changes nothing."""
    write_checkpoint(tiny(), here / "a.ckpt")
    write_checkpoint(tiny(rule="HeavyBall"), here / "b.ckpt")
    dense = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1, embed_dim=32, num_heads=2)
    write_checkpoint(dense, here / "c.ckpt")
    argv = ["--model=a.ckpt", "--model=hb=b.ckpt", "--model=dense=c.ckpt", f"--data={digits}", "--out=o", *SHORT]
    cli.run(["robustness", *argv, "--attacks=[fgsm,pgd,pgd-margin,square]", "--queries=20", "--query_images=3"])
    found = rows(here / "o" / "rows.csv")
    assert {row["model"] for row in found} == {"Residual", "hb", "dense"}
    n = {(row["condition"], row["metric"]): row["n"] for row in found}
    assert n["clean", "top1"] == "6" and n["square-20q", "robust_top1"] == "3" and n["fgsm", "robust_top1"] == "6"
    assert {row["severity_or_eps"] for row in found if row["condition"] == "pgd-20"} == {"2"}
    routing = [row for row in found if row["metric"].startswith("routing_change/")]
    assert {row["model"] for row in routing} == {"Residual", "hb"}
    assert {row["condition"] for row in routing} >= {"clean", "contrast", "uniform-noise", "fgsm", "pgd-20"}
    assert all(float(row["value"]) == 0 for row in routing if row["condition"] == "clean")
    assert any(float(row["value"]) > 0 for row in routing if row["condition"] == "fgsm")
    cli.run(["robustness", *argv, "--out=q", "--batch_size=4", "--attacks=[fgsm,pgd,pgd-margin]"])
    smaller = {tuple(row.values())[:5]: float(row["value"]) for row in rows(here / "q" / "rows.csv")}
    for row in found:
        if not row["condition"].startswith(("square", "worst")):
            assert smaller[tuple(row.values())[:5]] == pytest.approx(float(row["value"]), abs=1e-4), row
    assert {row["dataset"] for row in found if row["condition"] == "contrast"} == {"data (regenerated)"}
    told = json.loads((here / "o" / "report.json").read_text())["provenance"]
    assert set(told["models"]) == {"Residual", "hb", "dense"} and len(told["models"]["hb"]["sha256"]) == 64
    assert told["settings"]["eps"] == [pytest.approx(2 / 255)] and told["versions"]["torch"]
    assert told["command"].startswith("vmoe-momentum robustness --model=a.ckpt") and told["versions"]["vmoe_momentum"]
    assert {path.name for path in (here / "o").iterdir()} >= {"report.html", "report.md", "rows.csv", "examples.png"}


def test_two_equal_runs_write_equal_files(digits: Path, here: Path, monkeypatch, capsys) -> None:
    """Byte for byte, but for times.json; whether cells were kept or made again. And a pipe is told what goes on."""
    argv = ["robustness", "--model=a.ckpt", "--model=b=b.ckpt", f"--data={digits}", "--out=o", *SHORT]
    found = []
    for folder in ("first", "second", "second"):
        (here / folder).mkdir(exist_ok=True)
        monkeypatch.chdir(here / folder)
        for name, rule in (("a", "Residual"), ("b", "HeavyBall")):
            if not (path := here / folder / f"{name}.ckpt").exists():
                torch.manual_seed(0)
                write_checkpoint(tiny(rule=rule), path)
        cli.run([*argv, "--seed=3"])
        out = here / folder / "o"
        paths = [path for path in out.rglob("*") if path.is_file() and path.parent.name != "cells"]
        found.append({str(path.relative_to(out)): path.read_bytes() for path in paths})
        assert set(json.loads(found[-1].pop("times.json"))) == {"seconds", "finished"}
        told = capsys.readouterr()
        going_on = "0 %, data: clean" if len(found) < 3 else "100 %, all cells are kept"
        assert "worst-case, eps 2/255" in told.out and f"robustness: {going_on}" in told.err
    assert set(found[0]) >= {
        "rows.csv", "report.json", "report.md", "report.html", "report.tex", "models.csv", "examples.png",
        "timm/results-digits.csv", "timm/results-digits-regenerated.csv",
    }  # fmt: skip
    for name in found[0]:
        assert found[0][name] == found[1][name] == found[2][name], name


def test_budgets_in_l2(digits: Path, here: Path, capsys) -> None:
    """Their defaults, noise of the same length, rows in units of 1; the comparison is on the terminal, too."""
    write_checkpoint(tiny(), here / "a.ckpt")
    argv = ["--model=a.ckpt", f"--data={digits}", "--out=o", "--limit=6", "--corruptions=[none]", "--norm=L2"]
    cli.run(["robustness", *argv, "--attacks=[fgsm,pgd,square]", "--queries=20", "--steps=3"])
    found = {(row["condition"], row["severity_or_eps"]) for row in rows(here / "o" / "rows.csv")}
    for name in ("uniform-noise-L2", "fgsm-L2", "pgd-3-L2", "square-20q-L2", "worst-case-L2"):
        assert {eps for condition, eps in found if condition == name} == {"0.5", "1", "2"}
    assert ("sanity-pgd", "64") in found  # in Linf always
    assert "fgsm-L2, eps 0.5 " in capsys.readouterr().out


def test_clean_accuracy_is_that_of_test(digits: Path, here: Path) -> None:
    """The same pictures, not cropped, normalised once: as `vmoe-momentum test` scores them."""
    net = tiny()
    write_checkpoint(net, here / "a.ckpt")
    cli.run(["robustness", "--model=a.ckpt", f"--data={digits}", "--out=o", "--corruptions=[none]", "--attacks=[]"])
    (score,) = [row for row in rows(here / "o" / "rows.csv") if row["metric"] == "top1"]
    right, total = 0, 0
    for folder in sorted((digits / "val").iterdir()):
        for path in sorted(folder.iterdir()):
            pixels = torch.frombuffer(bytearray(Image.open(path).convert("RGB").tobytes()), dtype=torch.uint8)
            with torch.no_grad():
                answer = net(pixels.view(1, 16, 16, 3).permute(0, 3, 1, 2) / 127.5 - 1).argmax()
            right, total = right + int(answer == int(folder.name)), total + 1
    assert float(score["value"]) == pytest.approx(right / total) and int(score["n"]) == total == 360


def test_names_of_pictures_need_not_be_utf8(here: Path) -> None:
    """Random numbers and cells follow from names; those that are UTF-8 give what they gave."""
    write_checkpoint(tiny(), here / "a.ckpt")
    for folder, name in (("3", b"\xe9.png"), ("4", "\xe9.png".encode())):
        place = os.fsencode(here / "data" / folder)
        os.makedirs(place)
        Image.new("RGB", (16, 16), (90, 20, 200)).save(os.fsdecode(os.path.join(place, name)), format="png")
    cli.run(["robustness", "--model=a.ckpt", "--data=data", "--out=o", *SHORT])
    assert {row["n"] for row in rows(here / "o" / "rows.csv") if row["metric"] == "top1"} == {"2"}


def test_pictures_are_cut_as_in_training(here: Path) -> None:
    """The data module's crop travels in the checkpoint; without one, timm's record of the network holds."""
    path, how = write_checkpoint(tiny(), here / "a.ckpt"), tiny().pretrained_cfg
    (model,) = open_models([str(path)])
    assert model.view[:3] == (16, how["crop_pct"], how["interpolation"])
    saved = torch.load(path)
    saved[KEY]["crop_pct"] = 0.625
    torch.save(saved, path)
    (model,) = open_models([str(path)])
    assert model.view[:3] == (16, 0.625, "bilinear")


def test_router_aware_attacks_are_others(digits: Path, here: Path) -> None:
    write_checkpoint(tiny(), here / "a.ckpt")
    argv = ["--model=a.ckpt", f"--data={digits}", *SHORT, "--attacks=[pgd-margin]"]
    cli.run(["robustness", *argv, "--out=o"])
    cli.run(["robustness", *argv, "--out=p", "--router_aware"])
    assert "pgd-margin-20-router" in {row["condition"] for row in rows(here / "p" / "rows.csv")}
    plain, aware = (
        {row["metric"]: row["value"] for row in rows(here / f / "rows.csv") if "pgd-m" in row["condition"]}
        for f in "op"
    )
    changed = [sum(float(v) for k, v in each.items() if k.startswith("routing_change")) for each in (plain, aware)]
    assert changed[1] > changed[0] > 0  # it drives the routers, too
    cli.run(["robustness", *argv, "--out=q", "--attacks=[pgd-routing]", "--random_start", "--restarts=2"])
    found = rows(here / "q" / "rows.csv")
    assert "pgd-routing-20-rs-r2" in {row["condition"] for row in found}
    together = [float(r["value"]) for r in found if "pgd-r" in r["condition"] and r["metric"].startswith("routing")]
    assert sum(together) > changed[0]


def test_models_from_everywhere(here: Path, monkeypatch) -> None:
    from vmoe_momentum.models.directory import save

    save(tiny(rule="Nesterov"), here / "net")
    (here / "mine.py").write_text(
        "import torch\n"
        "class Mine(torch.nn.Module):\n"
        "    image_size = 20\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.layer = torch.nn.Linear(1200, 7)\n"
        "    def forward(self, x):\n"
        "        return self.layer(x.flatten(1))\n"
        "number = lambda: 3\n"
    )
    monkeypatch.syspath_prepend(here)
    write_checkpoint(tiny(router=SoftRouter()), here / "a=b.ckpt")
    other = tiny(router=SoftRouter())
    torch.nn.init.normal_(other.head.weight)
    write_checkpoint(other, here / "c.ckpt")
    models = open_models(["local-dir:net", "x=net", "mine:Mine", "hb=./a=b.ckpt", "hb=c.ckpt"])
    assert [model.name for model in models] == ["Nesterov", "x", "Mine", "hb#1", "hb#2"]
    assert [model.view.size for model in models] == [16, 16, 20, 16, 16] and models[2].num_classes == 7
    assert models[2].routing is None and models[0].routing is not None
    images = torch.rand(2, 3, 16, 16)
    logits, routes = models[0].routing(images)
    torch.testing.assert_close(logits, models[0].module(images))
    assert {block: tuple(r.shape) for block, r in routes.items()} == {f"block{i}": (2, 17, 4) for i in (1, 3, 5, 7)}
    assert models[3].routing(images)[1] == {}
    (dense,) = open_models(["vit_tiny_patch16_224"], pretrained=False)
    assert dense.view[:3] == (224, pytest.approx(0.9), "bicubic") and dense.num_classes == 1000
    with pytest.raises(ValueError, match="no such module:callable"):
        open_models(["mine:Nothing"])
    with pytest.raises(ValueError, match="gives int, not a torch module"):
        open_models(["mine:number"])
    with pytest.raises(ValueError, match="no such timm model"):
        open_models(["vit_tinny"])
    write_checkpoint(tiny(rule="HeavyBall"), here / "d.ckpt")
    for sources, message in (
        (["hb=c.ckpt", "hb=c.ckpt"], "hb is the same weights twice"),
        (["hb=c.ckpt", "hb=d.ckpt"], "different networks are called hb"),
        (["hb#1=c.ckpt", "hb=./a=b.ckpt", "hb=c.ckpt"], "two are called hb#1"),
        (["hb="], "--model=hb=: no source"),
        ([":x"], "--model=:x: write module:callable"),
    ):
        with pytest.raises(ValueError, match=message):
            open_models(sources)
    (here / "odd.py").write_text(
        "import torch\n"
        "def raises():\n    raise KeyError('boom')\n"
        "def needs(argument):\n    pass\n"
        "class Pair(torch.nn.Module):\n"
        "    def forward(self, x):\n        return x, x\n"
    )
    for name, message in (("raises", "raises KeyError"), ("needs", "raises TypeError"), ("Pair", "fails on 224-pixel")):
        with pytest.raises(ValueError, match=f"--model=odd:{name}: {message}"):
            open_models([f"odd:{name}"])


def test_eps_in_pixels() -> None:
    assert parse_eps("4/255") == pytest.approx(4 / 255) and parse_eps("0.01") == 0.01
    for wrong in ("four", "1/0", "4/x"):
        with pytest.raises(ValueError, match="such as 4/255"):
            parse_eps(wrong)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--data={d}"], "--model: none given"),
        (["--model=none.ckpt", "--data={d}"], "none.ckpt: no such file"),
        (["--model=a.ckpt"], "nothing to evaluate: give --data"),
        (["--model=a.ckpt", "--data=nowhere"], "--data=nowhere: no such folder"),
        (["--model=a.ckpt", "--data={d}", "--eps=[4]"], "eps=4: pixels lie in [0, 1]"),
        (["--model=a.ckpt", "--data={d}", "--eps=[x]"], "--eps=x: use a number in pixels"),
        (["--model=a.ckpt", "--data={d}", "--eps=[1/255,0.00392157]"], "--eps: 1/255 is there twice"),
        (["--model=a.ckpt", "--data={d}", "--attacks=[pdg]"], "attacks=pdg: no such attack; valid:"),
        (["--model=a.ckpt", "--data={d}", "--norm=L1"], "norm=L1: expected 'Linf', 'L2'"),
        (["--model=a.ckpt", "--data={d}", "--corruptions=[smoke]"], "--corruptions=smoke: not one of"),
        (["--model=a.ckpt", "--data={d}", "--severities=[0]"], "--severities=[0]: use a whole number from 1 to 5"),
        (["--model=a.ckpt", "--data={d}", "--limit=0"], "--limit=0: use a whole number from 1"),
        (["--model=a.ckpt", "--data={d}", "--ids=nowhere.txt"], "--ids=nowhere.txt: no such file"),
        (["--model=a.ckpt", "--data={d}", "--ids=a.ckpt"], "--ids=a.ckpt: cannot be read as text"),
        (["--model=a.ckpt", "--data={d}", "--batch_size=0"], "--batch_size=0: use a whole number from 1"),
        (["--model=a.ckpt", "--data={d}", "--workers=-1"], "--workers=-1: use a whole number from 0"),
        (["--model=a.ckpt", "--data={d}", "--steps=0"], "steps=0: use a whole number from 1"),
        (["--model=a.ckpt", "--data={d}", "--device=cuda:9"], "--device=cuda:9: not on this machine"),
        (["--model=a.ckpt", "--imagenet_c=nowhere"], "imagenet_c=nowhere: no such folder"),
        (["--model=a.ckpt", "--imagenet_c=partial"], "gaussian_noise/1"),
        (["--model=a.ckpt", "--imagenet_a=partial"], "it is for models of ImageNet's 1,000 classes, not 10"),
        (["--model=a.ckpt", "--data=strange"], "folder cat is no class of this model"),
        (["--model=a.ckpt", "--data=broken", "--corruptions=[none]"], "x.jpg: not a readable image"),
        (["--model=a.ckpt", "--data={d}", "--out=a.ckpt"], "--out=a.ckpt: cannot be written"),
        (["--model=a.ckpt", "--data={d}", "--attack=[fgsm]"], "attack"),
        (["--model=a.ckpt", "--data={d}", "--attacks=fgsm"], "attacks=fgsm: expected list, such as [fgsm]"),
        (["--model=a.ckpt", "--data={d}", "--attacks=[pgd,pgd]"], "--attacks: pgd is there twice"),
        (["--model=a.ckpt", "--data={d}", "--corruptions=[fog,fog]"], "--corruptions: fog is there twice"),
        (["--model=a.ckpt", "--data={d}", "--severities=[1,1]"], "--severities: 1 is there twice"),
        (["--model=a.ckpt", "--data={d}", "--severities=[]"], "--severities=[]: use some of 1 to 5"),
        (["--model=a.ckpt", "--data={d}", "--eps=[]"], "--eps=[]: give budgets"),
        (["--model=a.ckpt", "--data={d}", "--seed=-1"], "--seed=-1: use a whole number from 0 to"),
        (["--model=a.ckpt", "--data={d}", "--seed=99999999999999999999"], "use a whole number from 0 to 2147483647"),
        (["--model=a.ckpt", "--data={d}", "--out="], "--out=: name a folder"),
        (["--model=a.ckpt", "--data={d}", "--attacks=[square]", "--router_aware"], "['square'] uses it"),
        (["--model=dense.ckpt", "--data={d}", "--router_aware"], "--router_aware: none of the models has routers"),
        (["--model=a.ckpt", "--model=dense.ckpt", "--data={d}", "--attacks=[pgd-routing]"],
         "attacks=pgd-routing: --model=dense has no routers; leave one of them out"),
        (["--model=a.ckpt", "--data={d}", "--eot=4"], "--eot=4: every model answers the same again"),
        (["--model=a.ckpt", "--data={d}", "--restarts=0"], "--restarts=0: use a whole number from 1 to 1000"),
        (["--model=a.ckpt", "--data={d}", "--eot=0"], "--eot=0: use a whole number from 1 to 1000"),
        (["--model=a.ckpt", "--data={d}", "--attacks=[autoattack]", "--restarts=2"],
         "--restarts: has no effect here; it needs --data and, in --attacks, one of fgsm, pgd"),
        (["--model=a.ckpt", "--data={d}", "--attacks=[spsa]", "--queries=20"], "spsa needs 128 for one step"),
        (["--model=a.ckpt", "--imagenet_o={d}"], "--imagenet_o={d}: needs --data"),
        (["--model=none", "--data={d}", "--corruptions=[smoke]"], "--corruptions=smoke: not one of"),
        (["--model=a.ckpt", "--data=broken", "--corruptions=[none]", "--workers=1"], "x.jpg: not a readable image"),
        (["--model=a.ckpt", "--data=dangling"], "leads to no file; remove it"),
        (["--model=a.ckpt", "--imagenet_c=partial", "--attacks=[pgd]"], "--attacks: has no effect here; it needs"),
        (["--model=a.ckpt", "--data={d}", "--transfer=[mi-fgsm]"], "--transfer: pictures made on one model are shown"),
        (["--model=a.ckpt", "--data={d}", "--transfer=[square]"], "--transfer=square: not one of mi-fgsm, di-fgsm"),
        (["--model=a.ckpt", "--data={d}", "--attacks=[]", "--steps=3"], "--steps: has no effect here; it needs --data"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_no_report(
    argv: list[str], message: str, digits: Path, here: Path, capsys
) -> None:
    write_checkpoint(tiny(), here / "a.ckpt")
    dense = timm.create_model("vit_tiny_patch16_224", img_size=16, patch_size=4, depth=1, embed_dim=32, num_heads=2)
    write_checkpoint(dense, here / "dense.ckpt")
    (here / "dangling" / "3").mkdir(parents=True)
    (here / "dangling" / "3" / "x.png").symlink_to("nowhere.png")
    (here / "partial" / "fog" / "1" / "0").mkdir(parents=True)
    (here / "strange" / "cat").mkdir(parents=True)
    (here / "strange" / "cat" / "x.png").touch()
    (here / "broken" / "3").mkdir(parents=True)
    source = Image.radial_gradient("L").convert("RGB")
    source.save(here / "broken" / "3" / "x.jpg")
    content = (here / "broken" / "3" / "x.jpg").read_bytes()
    (here / "broken" / "3" / "x.jpg").write_bytes(content[: len(content) // 2])
    line = fails(["robustness", *[word.format(d=digits) for word in argv]], capsys)
    assert message.format(d=digits) in line and "Traceback" not in line and not (here / "runs").exists()
    assert not list(here.rglob("rows.csv")) and not list(here.rglob("report.*")) and not list(here.rglob("*.npz"))


def test_help_teaches(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["robustness", "--help"])
    text = capsys.readouterr().out
    assert "examples:" in text and "--imagenet_c" in text and "pgd-margin" in text
