"""Imports go one way only, and maths reads no environment."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "vmoe_momentum"
ALLOWED = {  # room -> rooms it may import
    "ranges": set(),
    "lazily": set(),
    "names": set(),
    "registering": set(),
    "specs": {"names"},
    "momentum": {"ranges"},
    "moe": {"ranges"},
    "files": set(),
    "stopping": set(),
    "resources": set(),
    "pictures": set(),
    "parsers": {"ranges"},
    "progress": set(),
    "datasets": {"files", "lazily", "parsers", "pictures", "progress", "ranges", "resources", "stopping"},
    "models": {"files", "moe", "momentum", "names", "parsers", "ranges", "resources", "specs"},
    "language": {
        "datasets",
        "files",
        "lazily",
        "models",
        "moe",
        "momentum",
        "names",
        "ranges",
        "resources",
        "specs",
        "training",
    },
    "kinds": {"configs", "datasets", "language", "models", "moe", "momentum", "training"},
    "training": {
        "configs",
        "files",
        "models",
        "moe",
        "momentum",
        "names",
        "parsers",
        "ranges",
        "resources",
        "robustness",
        "specs",
        "stopping",
    },
    "analysis": {"configs", "models", "moe", "momentum", "parsers", "progress", "ranges", "stopping"},
    "robustness": {"files", "lazily", "parsers", "pictures", "progress", "ranges", "resources", "stopping"},
    "classifiers": {"analysis", "files", "models", "moe", "robustness"},
    "robustbench": {"classifiers", "pictures", "robustness"},
    "export": {
        "analysis",
        "classifiers",
        "files",
        "lazily",
        "models",
        "parsers",
        "pictures",
        "progress",
        "ranges",
        "robustness",
        "specs",
    },
    "messages": {"configs", "names", "parsers", "resources", "stopping", "training"},
    "configs": set(),
    "lightning_cli": {
        "configs",
        "files",
        "kinds",
        "messages",
        "models",
        "moe",
        "momentum",
        "parsers",
        "ranges",
        "resources",
        "training",
    },
    "completion": {"names", "progress"},
    "cli": {
        "__version__",
        "analysis",
        "classifiers",
        "completion",
        "configs",
        "datasets",
        "export",
        "language",
        "lightning_cli",
        "messages",
        "models",
        "names",
        "robustness",
        "stopping",
        "training",
    },
    "__main__": {"cli"},
    "__init__": {"models", "moe", "momentum", "registering"},
}


def rooms_imported(path: Path) -> set[str]:
    """Rooms of ours that a file imports, absolute or relative, wherever in the file."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*parts[: len(parts) - node.level]] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{stem}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("vmoe_momentum.")}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert rooms_imported(path) - {room} <= ALLOWED[room]


def test_the_check_sees_both_forms(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "vmoe_momentum")
    file = tmp_path / "vmoe_momentum" / "momentum" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text("from ..moe import Router\nfrom vmoe_momentum.training import Y\nimport vmoe_momentum.cli\n")
    assert rooms_imported(file) == {"moe", "training", "cli"}


def test_maths_reads_no_environment() -> None:
    for room in ("momentum", "moe", "models"):
        for path in (PACKAGE / room).glob("*.py"):
            assert "environ" not in path.read_text(), path


def test_no_two_files_of_the_tests_have_one_name() -> None:
    """pytest puts all their folders on the path: the second would be the first."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))


def imported(path: Path) -> set[Path]:
    """Files of ours that a file imports when it is read, or for a type checker alone; not inside functions."""
    own = path.relative_to(PACKAGE.parent).with_suffix("").parts
    found, todo = set(), list(ast.parse(path.read_text()).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If | ast.Try):
            todo += [*node.body, *node.orelse]
        elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("vmoe_momentum")):
            base = PACKAGE.parent.joinpath(
                *own[: len(own) - node.level] if node.level else (), *(node.module or "").split(".")
            )
            for place in [base, *(base / alias.name for alias in node.names)]:
                found |= {file for file in (place.with_suffix(".py"),) if file.exists()}
    return found - {path}


def waiting(files: list[Path]) -> list[Path]:
    """What is left once files are taken away whose imports are: those of circles, and those that import them."""
    graph = {path: imported(path) for path in files}
    while leaves := [path for path, deps in graph.items() if not deps & graph.keys()]:
        for path in leaves:
            del graph[path]
    return sorted(graph)


def test_no_file_waits_for_itself() -> None:
    """No circle of imports, also none that only a type checker would walk."""
    assert not waiting(FILES)
    assert sum(len(imported(path)) for path in FILES) > 500


def test_a_circle_is_seen(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(f"{__name__}.PACKAGE", tmp_path / "vmoe_momentum")
    texts = {
        "a": "from .b import B",
        "b": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vmoe_momentum.room.a import A",
        "c": "from . import d",
        "d": "def f():\n    from .c import C",
    }
    (tmp_path / "vmoe_momentum" / "room").mkdir(parents=True)
    files = {name: tmp_path / "vmoe_momentum" / "room" / f"{name}.py" for name in texts}
    for name, text in texts.items():
        files[name].write_text(text + "\n")
    assert waiting(list(files.values())) == [files["a"], files["b"]]
