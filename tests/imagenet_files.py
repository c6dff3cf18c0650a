"""A small ImageNet-1K: one colour a class."""

import io
from pathlib import Path

from PIL import Image

WNIDS = ("n01440764", "n02123045", "n15075141")  # tench, tabby, toilet tissue: labels 0, 281, 999
COLOURS = {"n01440764": (250, 0, 0), "n02123045": (0, 250, 0), "n15075141": (0, 0, 250)}


def picture(wnid: str, kind: str = "JPEG", mode: str = "RGB", size: tuple[int, int] = (48, 36), **options) -> bytes:
    content = io.BytesIO()
    image = Image.new("RGB", size, COLOURS[wnid]).convert(mode)
    image.save(content, kind, **({"quality": 95} if kind == "JPEG" else {}), **options)
    return content.getvalue()


def tree(folder: Path, each: int = 3) -> Path:
    for split, count in (("train", each), ("val", 2)):
        for wnid in WNIDS:
            (folder / split / wnid).mkdir(parents=True)
            for number in range(count):
                (folder / split / wnid / f"{wnid}_{number}.JPEG").write_bytes(picture(wnid))
    return folder
