"""What is published: wheel and sdist as strangers get them, and the files that speak of the version."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import vmoe_momentum

ROOT = Path(__file__).parent.parent
ENDINGS = (".py", ".csv", ".json", ".txt", ".yaml", ".npz", ".jpg", ".png", "LICENSE", "NOTICE", "py.typed")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with both, made without network from a copy of the sources: the sdist, and from it the wheel."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(ROOT / "vmoe_momentum", source / "vmoe_momentum", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    made = subprocess.run(command, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return out


def package_files() -> set[str]:
    return {
        str(path.relative_to(ROOT)) for path in (ROOT / "vmoe_momentum").rglob("*")
        if path.name.endswith(ENDINGS) and "__pycache__" not in path.parts
    }  # fmt: skip


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_package_whole(built: Path) -> None:
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    assert wheel.name == f"vmoe_momentum-{vmoe_momentum.__version__}-py3-none-any.whl"
    held = set(zipfile.ZipFile(wheel).namelist())
    assert package_files() <= held
    assert not {name.split("/")[0] for name in held} - {
        "vmoe_momentum",
        f"vmoe_momentum-{vmoe_momentum.__version__}.dist-info",
    }
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() <= names and {"setup.cfg", "LICENSE", "README.md"} <= names


@pytest.mark.slow
def test_the_wheel_works_elsewhere(built: Path, tmp_path: Path) -> None:
    """Installed into a folder of its own, away from the sources; torch and the rest are those of this environment."""
    (wheel,) = built.glob("*.whl")
    target = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(target)  # what an installer does with one, its commands aside
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import vmoe_momentum, torch
assert vmoe_momentum.__file__.startswith({str(target)!r}), vmoe_momentum.__file__
net = vmoe_momentum.create_model("vmoe_tiny_patch4_16", rule="HeavyBall", num_classes=10)
assert net(torch.zeros(1, 3, 16, 16)).shape == (1, 10)
from vmoe_momentum.robustness import corrupt
import numpy as np
assert corrupt(np.zeros((32, 32, 3), np.uint8), "frost", 3, 0, "x").any()
from vmoe_momentum.cli import main
main(["--version"])
main(["data", "prepare", "digits", "--out", {str(tmp_path / "digits")!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"vmoe-momentum {vmoe_momentum.__version__}\n" in done.stdout
    assert (tmp_path / "digits" / "classes.json").exists()


def test_files_speak_of_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(cited["version"]) == vmoe_momentum.__version__
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    (first, *_) = re.findall(r"^## (\S+),", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first == vmoe_momentum.__version__
