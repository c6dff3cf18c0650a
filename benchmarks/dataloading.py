"""Images per second of FFCV, the folder backend, and torchvision's and timm's loaders: same pictures, same transforms.

    python benchmarks/dataloading.py --csv benchmarks/results/dataloading.csv

Each gives random crops resized to 224 px, flipped or not, of JPEG photographs of 400 to 640 px (FFCV: of their betons,
500 px), as uint8 batches for a device to normalise; one row shows torchvision's with ToTensor and Normalize in its
workers, as its reference scripts long had them. Each loader runs in a process of its own; they take turns, and medians
over the rounds count, of ratios those within a round. Images per second and CPU seconds are those between a warm-up and
the last batch, so that neither starting workers nor compiling counts, as neither does over ImageNet's 10,000 batches.
Memory is what the loader adds, its workers' included.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import jsonargparse
import numpy as np
import psutil
from rich.console import Console
from timing import write_rows

from vmoe_momentum.datasets import FFCVDataModule, FolderDataModule
from vmoe_momentum.datasets.batches import BatchPlan
from vmoe_momentum.datasets.photos import prepare_photos

SIZE, WARM_UP = 224, 8
STANDARD = "torchvision ImageFolder"  # what ratios are over


def ours(root: str, cls: type, batch: int, workers: int, batches: int, **settings: str) -> Iterator:
    data = cls(root, image_size=SIZE, batch_size=batch, num_workers=workers, **settings)
    data.setup("fit")
    count = data.count("train")
    loader = data.build_loader("train", BatchPlan(count, batch, training=True))
    return loader.open(list(np.random.default_rng(0).integers(0, count, (batches, batch))), epoch=0)


def torchvision_loader(root: str, batch: int, workers: int, batches: int, normalize: bool = False) -> Iterator:
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(0.5, 0.5)] if normalize else [transforms.PILToTensor()]
    pictures = datasets.ImageFolder(f"{root}/train", transforms.Compose(steps))
    chosen = np.random.default_rng(0).integers(0, len(pictures), batches * batch).tolist()
    return iter(DataLoader(pictures, batch, sampler=chosen, num_workers=workers))


def timm_loader(root: str, batch: int, workers: int, batches: int) -> Iterator:
    import torch
    from timm.data import create_dataset, create_loader

    pictures = create_dataset("", f"{root}/train")
    samples = pictures.reader.samples
    pictures.reader.samples = (samples * (batches * batch // len(samples) + 1))[: batches * batch]
    made = create_loader(
        pictures, (3, SIZE, SIZE), batch, is_training=True, interpolation="bilinear", color_jitter=None,
        num_workers=workers, device=torch.device("cpu"), persistent_workers=False,
    )  # fmt: skip
    return iter(made.loader)  # what it gives before it normalises on the device


LOADERS = {  # the standard in the middle, beside those that are compared with it
    "timm create_loader": timm_loader,
    f"{STANDARD}, normalised": lambda root, *rest: torchvision_loader(root, *rest, normalize=True),
    STANDARD: torchvision_loader,
    "FolderDataModule": lambda root, *rest: ours(root, FolderDataModule, *rest),
    "FolderDataModule, decoder torchvision": lambda root, *rest: ours(
        root, FolderDataModule, *rest, decoder="torchvision"
    ),
    "FFCVDataModule, JPEG": lambda root, *rest: ours(f"{root}_jpeg", FFCVDataModule, *rest),
    "FFCVDataModule, raw": lambda root, *rest: ours(f"{root}_raw", FFCVDataModule, *rest),
}


def family() -> list[psutil.Process]:
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def megabytes() -> float:
    """Of this process and its workers: anonymous and shared memory, not the files they have mapped."""
    total = 0
    for process in family():
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon", "Pss_Shmem")))
    return total / 1e3


def cpu_seconds() -> float:
    return sum(sum(process.cpu_times()[:2]) for process in family())


def measure(name: str, root: str, batch: int, workers: int, batches: int) -> dict[str, float]:
    """One loader, in this process."""
    before, started = megabytes(), time.perf_counter()
    source = LOADERS[name](root, batch, workers, batches)
    for number in range(batches):
        images, _ = next(source)
        assert images.shape == (batch, 3, SIZE, SIZE), (name, images.shape)
        if number == 0:
            first = time.perf_counter() - started
        if number == WARM_UP - 1:
            start, cpu = time.perf_counter(), cpu_seconds()
    count = batch * (batches - WARM_UP)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - cpu
    return {
        "images_per_second": count / seconds, "cpu_ms_per_image": 1e3 * cpu / count,
        "megabytes": megabytes() - before, "seconds_to_first_batch": first,
    }  # fmt: skip


def main(
    csv: str | None = None,
    batch: int = 64,
    workers: int = 2,
    batches: int = 72,
    rounds: int = 5,
    one: str | None = None,
    root: str | None = None,
) -> None:
    """Measure every loader.

    Args:
        csv: Where the rows go.
        batch: Images a batch.
        workers: Worker processes, or FFCV's threads.
        batches: Batches a loader decodes, the first 8 as warm-up.
        rounds: Repetitions.
        one: Only this loader, in this process, as JSON; for the benchmark itself.
        root: Where the photographs of --one lie.
    """
    if one is not None:
        print(json.dumps(measure(one, str(root), batch, workers, batches)))
        return
    console, found = Console(), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        photos = f"{folder}/photos"
        for suffix, encoding in (("", "500_1.00_90"), ("_jpeg", "500_1.00_90"), ("_raw", "raw")):
            prepare_photos(photos + suffix, encoding=encoding)
        sizes = {"JPEG": f"{photos}_jpeg", "raw": f"{photos}_raw"}
        for number in range(rounds):
            for name in LOADERS:
                command = [sys.executable, __file__, f"--one={name}", f"--root={photos}", f"--batch={batch}"]
                command += [f"--workers={workers}", f"--batches={batches}"]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found[name].append(json.loads(done.stdout.splitlines()[-1]))
                console.print(f"round {number + 1}: {name}: {found[name][-1]['images_per_second']:.0f} images/s")
        kilobytes = {name: (Path(root) / "train.beton").stat().st_size / 520e3 for name, root in sizes.items()}
    middle = {name: {key: median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    speeds = {name: [run["images_per_second"] for run in runs] for name, runs in found.items()}
    ratios = {n: median(a / b for a, b in zip(own, speeds[STANDARD], strict=True)) for n, own in speeds.items()}
    rows = []
    for name, values in middle.items():
        rows.append({
            "loader": name, "images_per_second": round(values["images_per_second"]),
            "ratio": f"{ratios[name]:.2f}",
            "cpu_ms_per_image": f"{values['cpu_ms_per_image']:.2f}", "megabytes": round(values["megabytes"]),
            "seconds_to_first_batch": f"{values['seconds_to_first_batch']:.1f}",
            "kilobytes_an_image": next((f"{kb:.0f}" for kind, kb in kilobytes.items() if kind in name), ""),
            "batch": batch, "workers": workers, "rounds": rounds,
        })  # fmt: skip
    for row in rows:
        console.print(row)
    if csv is not None:
        write_rows(Path(csv), rows)


if __name__ == "__main__":
    jsonargparse.CLI(main, as_positional=False)
