"""ImageNet-C: AlexNet's errors, mCE, and the published images on disk (Hendrycks and Dietterich, arXiv:1903.12261)."""

from collections.abc import Mapping
from pathlib import Path

from .asked import BENCHMARK, SEVERITIES
from .sets import SETS

# Top-1 error of AlexNet, mean over the severities, to the image (each times 250,000 is an integer): google-research/
# augmix at 9b9824c, where they are in the benchmark's order. Names, not positions: sorted lists have been zipped wrong.
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360,
    "snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592,
    "contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500,
    "speckle_noise": 0.845388, "gaussian_blur": 0.787108, "spatter": 0.717512, "saturate": 0.658248,
}  # fmt: skip
ALEXNET_CLEAN = 0.43478  # torchvision's AlexNet V1: acc@1 56.522

Errors = Mapping[str, Mapping[int, float]]  # corruption -> severity -> top-1 error in [0, 1]


def corruption_error(errors: Mapping[int, float], name: str) -> float:
    """CE in percent: the errors of five severities over AlexNet's. Raises ValueError: a severity is missing."""
    _complete(errors, name)
    return 100.0 * sum(errors.values()) / len(SEVERITIES) / ALEXNET[name]


def mean_corruption_error(errors: Errors) -> float:
    """mCE in percent: mean of the 15 CEs (not the ratio of means). Extras do not count.

    Raises ValueError: one of the 15, or a severity, is missing.
    """
    return _mean([corruption_error(_of(errors, name), name) for name in BENCHMARK])


def relative_mean_corruption_error(errors: Errors, clean_error: float) -> float:
    """Relative mCE in percent: mean of (mean error - clean error) / (AlexNet's - AlexNet's clean)."""
    ratios = []
    for name in BENCHMARK:
        _complete(_of(errors, name), name)
        rise = sum(errors[name].values()) / len(SEVERITIES) - clean_error
        ratios.append(100.0 * rise / (ALEXNET[name] - ALEXNET_CLEAN))
    return _mean(ratios)


def mean_corrupted_accuracy(errors: Errors, names: tuple[str, ...] = BENCHMARK) -> float:
    """Mean top-1 accuracy over the corruptions at five severities each, in [0, 1]; of the 15 RobustBench's headline."""
    for name in names:
        _complete(_of(errors, name), name)
    return _mean([1.0 - error for name in names for error in errors[name].values()])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _of(errors: Errors, name: str) -> Mapping[int, float]:
    if name not in errors:
        raise ValueError(f"{name}: no errors of it; mCE is the mean over all of {', '.join(BENCHMARK)}")
    return errors[name]


def _complete(errors: Mapping[int, float], name: str) -> None:
    missing = sorted(set(SEVERITIES) - set(errors))
    if missing or len(errors) != len(SEVERITIES):
        raise ValueError(f"{name}: severities {missing or sorted(errors)}; CE needs each of 1 to 5 once")


def find_tree(
    root: str, corruptions: list[str] | None = None, severities: list[int] | None = None, published: str = "imagenet_c"
) -> dict[tuple[str, int], Path]:
    """Where each (corruption, severity) of the published images lies.

    ROOT/<corruption>/<severity>/<wnid>/*, or ROOT/<group>/<corruption>/... as ImageNet-C's five archives unpack.
    corruptions, severities: only these are asked for; without them all must be there. published: a name of SETS.
    Raises FileNotFoundError and ValueError: no such folder, an unknown name, folders missing.
    """
    base, own, setting = Path(root), SETS[published], f"--{published}={root}"
    if not base.is_dir():
        raise FileNotFoundError(f"{setting}: no such folder")
    wanted = list(own.corruptions) if corruptions is None else corruptions
    for name in wanted:
        if name not in (*own.corruptions, *own.extra):
            raise ValueError(f"--corruptions={name}: not one of {', '.join((*own.corruptions, *own.extra))}")
    folders, missing = {}, []
    for name in wanted:
        places = [base / name, *(base / group / name for group in own.groups)]
        place = next((path for path in places if path.is_dir()), None)
        for severity in SEVERITIES if severities is None else severities:
            folder = None if place is None else place / str(severity)
            if folder is not None and _is_filled(folder, setting):
                folders[name, severity] = folder
            else:
                missing.append(f"{name}/{severity}")
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        around = f" and in {', '.join(own.groups)}" if own.groups else ""
        raise ValueError(
            f"{setting}: {shown} missing; looked for <corruption>/<severity> there{around}; name the ones you have "
            "with --corruptions and --severities (that is then not the set's mean)"
        )
    return folders


def _is_filled(folder: Path, setting: str) -> bool:
    """Raises ValueError: nobody can say, as it cannot be read."""
    try:
        return folder.is_dir() and any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{setting}: {folder} cannot be read ({error.strerror}); mend its permissions") from error
