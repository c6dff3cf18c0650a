"""A folder that cannot be read is an error, never fewer pictures."""

import os
from pathlib import Path

import pytest
from planted import paint, planted, write_mappings

from vmoe_momentum.robustness import Settings, labels, make_plan
from vmoe_momentum.robustness.sets import SETS


@pytest.fixture
def forbid(monkeypatch):
    """Root may read everything, so the system's answer is made here."""

    def forbid(folder: Path) -> None:
        for name in ("scandir", "listdir"):
            real = getattr(os, name)

            def guarded(path=".", real=real):
                if Path(path) == folder:
                    raise PermissionError(13, "Permission denied", str(path))
                return real(path)

            monkeypatch.setattr(os, name, guarded)

    return forbid


@pytest.mark.parametrize("depth", ["class", "below"])
@pytest.mark.parametrize("name", ["data", *SETS])
def test_an_unreadable_folder_of_any_set_is_named(name: str, depth: str, tmp_path: Path, forbid) -> None:
    which = labels.subset(name[-1]) if name[-2:] in ("_a", "_r", "_o") else range(1000)
    wnids = [labels.wnids()[i] for i in list(which)[:3]]
    own = SETS.get(name)
    corruption = own.corruptions[0] if own and own.corruptions else "fog"
    root = tmp_path / name / (f"{corruption}/1" if own and own.corruptions else own.place if own else "")
    if name == "objectnet":
        write_mappings(tmp_path / name, {wnid: [index] for wnid, index in zip(wnids, range(3), strict=True)})
    for wnid in wnids:
        paint(root / wnid / "more" / "x.png", 0)
        paint(tmp_path / "data" / wnid / "x.png", 0)
    settings = Settings(
        data=str(tmp_path / "data"), attacks=(), corruptions=(corruption,), severities=(1,), regenerate=False
    )
    settings = settings._replace(**({} if name == "data" else {"sets": {name: str(tmp_path / name)}}))
    make_plan(settings, [planted()])
    place = root / wnids[1]
    forbid(place if depth == "class" else place / "more")
    with pytest.raises(ValueError, match=f"{wnids[1]}.*(cannot be read|Permission denied)") as told:
        make_plan(settings, [planted()])
    assert "\n" not in str(told.value)
