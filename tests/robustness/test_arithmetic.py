"""mCE, calibration, class lists and intervals against published numbers and hand arithmetic."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest

from vmoe_momentum.robustness import labels
from vmoe_momentum.robustness.bootstrap import group_difference, mean_interval
from vmoe_momentum.robustness.calibration import (
    aurra,
    average_precision,
    expected_calibration_error,
    rms_calibration_error,
)
from vmoe_momentum.robustness.corruptions import BENCHMARK, EXTRA, SEVERITIES
from vmoe_momentum.robustness.imagenet_c import (
    ALEXNET,
    ALEXNET_CLEAN,
    corruption_error,
    find_tree,
    mean_corrupted_accuracy,
    mean_corruption_error,
    relative_mean_corruption_error,
)

ORACLES = Path(__file__).parent.parent / "oracles" / "corruptions"


def table(mean_error: dict[str, float]) -> dict[str, dict[int, float]]:
    """The same mean spread unevenly over severities, never constant."""
    return {name: {s: error * (0.8 + 0.1 * (s - 1)) for s in SEVERITIES} for name, error in mean_error.items()}


def test_alexnets_errors_to_the_image() -> None:
    known = json.loads((ORACLES / "params.json").read_text())
    assert known["alexnet_error"] == ALEXNET and known["alexnet_clean_error"] == ALEXNET_CLEAN
    assert tuple(known["benchmark"]) == BENCHMARK and tuple(known["extra"]) == EXTRA


def test_alexnet_is_100() -> None:
    errors = table(ALEXNET)
    assert mean_corruption_error(errors) == pytest.approx(100.0, abs=1e-9)
    assert relative_mean_corruption_error(errors, ALEXNET_CLEAN) == pytest.approx(100.0, abs=1e-9)
    assert all(abs(error * 250_000 - round(error * 250_000)) < 1e-6 for error in ALEXNET.values())


# torchvision's ResNet-50 V1, CE in the benchmark's order, to a whole percent, as published
RESNET50 = (80, 82, 83, 75, 89, 78, 80, 78, 75, 66, 57, 71, 85, 77, 77)


def test_resnet50_from_its_published_ces() -> None:
    errors = table({name: ce / 100 * ALEXNET[name] for name, ce in zip(BENCHMARK, RESNET50, strict=True)})
    assert mean_corruption_error(errors) == pytest.approx(76.87, abs=0.01)  # 76.7 from unrounded CEs
    assert relative_mean_corruption_error(errors, 0.2385) == pytest.approx(105.4, abs=0.1)
    assert mean_corrupted_accuracy(errors) == pytest.approx(1 - 0.6096, abs=0.0005)
    # two wrong means that are in public code
    ratio_of_means = sum(np.mean(list(e.values())) for e in errors.values()) / sum(ALEXNET[n] for n in BENCHMARK)
    assert abs(100 * ratio_of_means - mean_corruption_error(errors)) > 0.3


def test_expected_calibration_error_by_hand() -> None:
    """15 bins, open below: 1/15 is in the first, a little more in the second, and 1 in the last."""
    confidence = np.array([1 / 15, 1 / 15 + 1e-6, 0.5, 0.52, 0.95, 1.0])
    correct = np.array([1, 0, 1, 0, 1, 1], dtype=bool)
    by_hand = (14 / 15) / 6 + (1 / 15) / 6 + abs(1.02 - 1) / 6 + abs(1.95 - 2) / 6
    assert expected_calibration_error(confidence, correct) == pytest.approx(by_hand, abs=1e-6)
    rng = np.random.default_rng(0)
    confidence, correct = rng.uniform(size=2000), rng.uniform(size=2000) < 0.7
    edges, gap = np.linspace(0, 1, 16), 0.0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (confidence > low) & (confidence <= high)
        gap += inside.mean() * abs(confidence[inside].mean() - correct[inside].mean())
    assert expected_calibration_error(confidence, correct) == pytest.approx(gap, abs=1e-12)
    assert expected_calibration_error(np.full(7, 0.9), np.ones(7, dtype=bool)) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="no images"):
        expected_calibration_error(np.zeros(0), np.zeros(0, dtype=bool))


def test_extras_never_count() -> None:
    errors = table(ALEXNET)
    without = {name: errors[name] for name in BENCHMARK}
    assert mean_corruption_error(errors | {name: dict.fromkeys(SEVERITIES, 0.0) for name in EXTRA}) == (
        mean_corruption_error(without)
    )


def test_missing_parts_are_refused() -> None:
    errors = table({name: ALEXNET[name] for name in BENCHMARK})
    less = {name: dict(found) for name, found in errors.items()}
    del less["fog"][3]
    for function in (mean_corruption_error, mean_corrupted_accuracy, lambda e: relative_mean_corruption_error(e, 0.3)):
        with pytest.raises(ValueError, match=r"fog: severities \[3\]"):
            function(less)
        with pytest.raises(ValueError, match="snow: no errors of it"):
            function({name: found for name, found in errors.items() if name != "snow"})
    with pytest.raises(ValueError, match="severities"):
        corruption_error({**errors["fog"], 6: 0.5}, "fog")


@pytest.mark.parametrize("grouped", [False, True])
def test_both_layouts_are_found_and_partial_trees_refused(grouped: bool, tmp_path) -> None:
    groups = {
        name: ("noise", "blur", "weather", "digital")[(i >= 3) + (i >= 7) + (i >= 11)]
        for i, name in enumerate(BENCHMARK)
    }
    for name in BENCHMARK:
        for severity in SEVERITIES:
            place = tmp_path / (f"{groups[name]}/{name}" if grouped else name) / str(severity) / "n01440764"
            place.mkdir(parents=True)
    folders = find_tree(str(tmp_path))
    assert list(folders) == [(name, severity) for name in BENCHMARK for severity in SEVERITIES]
    assert folders["snow", 2].parent.name == "snow"
    (folders["snow", 2] / "n01440764").rmdir()
    with pytest.raises(ValueError, match=r"snow/2 missing; looked for <corruption>/<severity>"):
        find_tree(str(tmp_path))
    part = find_tree(str(tmp_path), ["fog", "snow"], [1, 5])
    assert list(part) == [("fog", 1), ("fog", 5), ("snow", 1), ("snow", 5)]
    with pytest.raises(ValueError, match="corruptions=smoke: not one of"):
        find_tree(str(tmp_path), ["smoke"])
    (tmp_path / ("extra/spatter" if grouped else "spatter") / "1" / "n01440764").mkdir(parents=True)
    assert list(find_tree(str(tmp_path), ["spatter"], [1])) == [("spatter", 1)]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_tree(str(tmp_path / "none"))


# ---- class lists


def test_class_lists() -> None:
    a, r, o = (labels.subset(which) for which in "aro")
    assert (len(a), sum(a), a[:6], a[-5:]) == (200, 102178, [6, 11, 13, 15, 17, 22], [981, 984, 986, 987, 988])
    assert (len(r), sum(r), r[:6], r[-5:]) == (200, 86135, [1, 2, 4, 6, 8, 9], [967, 980, 981, 983, 988])
    assert (len(o), len(set(a) & set(r)), len(set(a) | set(r)), len(set(a) & set(o))) == (200, 86, 314, 59)
    assert list(labels.wnids()) == sorted(labels.wnids()) and len(labels.wnids()) == 1000


def test_another_list_is_refused(monkeypatch) -> None:
    for name in labels.SHA:
        monkeypatch.setitem(labels.SHA, name, "0" * 16)
        with pytest.raises(ValueError, match=f"timm's {name} is another list"):
            labels._info(name)


def test_real_labels() -> None:
    known = labels.real_labels()
    assert len(known) == 50_000 and sum(not k for k in known) == 3163 and sum(len(k) > 1 for k in known) == 7443


def test_folders_become_labels_by_name_never_by_order(tmp_path) -> None:
    for folder in ("n02119789", "n01440764"):
        (tmp_path / "w" / folder).mkdir(parents=True)
        (tmp_path / "w" / folder / "x.JPEG").touch()
    listing = labels.list_pictures(tmp_path / "w", None, 1000, "--data")
    index = {wnid: i for i, wnid in enumerate(labels.wnids())}
    assert listing.labels == [0, index["n02119789"]]
    for folder in ("10", "9", "0"):  # ImageNetV2's folders: sorted as text 10 comes before 9
        (tmp_path / "n" / folder).mkdir(parents=True)
        (tmp_path / "n" / folder / "x.png").touch()
    assert labels.list_pictures(tmp_path / "n", None, 1000, "--data").labels == [0, 10, 9]
    for folder in ("cat", "dog"):
        (tmp_path / "c" / folder).mkdir(parents=True)
        (tmp_path / "c" / folder / "x.png").touch()
    assert labels.list_pictures(tmp_path / "c", ["dog", "eel", "cat"], 3, "--data").labels == [2, 0]
    assert labels.list_pictures(tmp_path / "c", None, 2, "--data").labels == [0, 1]
    for folder in ("7", "0007"):
        (tmp_path / "z" / folder).mkdir(parents=True)
        (tmp_path / "z" / folder / "x.png").touch()
    with pytest.raises(ValueError, match="folder 0007 is no class of this model"):
        labels.list_pictures(tmp_path / "z", None, 10, "--data")
    with pytest.raises(ValueError, match="folder cat is no class of this model"):
        labels.list_pictures(tmp_path / "c", None, 3, "--data")
    with pytest.raises(ValueError, match="folder cat is no class of this model"):
        labels.list_pictures(tmp_path / "c", None, 1000, "--data")
    with pytest.raises(ValueError, match="folder 10 is no class of this model"):
        labels.list_pictures(tmp_path / "n", None, 10, "--data")
    with pytest.raises(FileNotFoundError, match="--data=.*no such folder"):
        labels.list_pictures(tmp_path / "none", None, 10, "--data")


# ---- calibration


def test_rms_calibration_error_by_hand() -> None:
    confidence = np.array([0.9, 0.2, 0.4, 0.8])
    correct = np.array([1, 0, 1, 0])
    # bins of two by confidence: (.2, .4) accuracy .5, (.8, .9) accuracy .5
    expected = np.sqrt(0.5 * (0.3 - 0.5) ** 2 + 0.5 * (0.85 - 0.5) ** 2)
    assert rms_calibration_error(confidence, correct, 2) == pytest.approx(expected)
    # every image counts: the remainder joins the last bin, which the reference leaves out altogether
    more = rms_calibration_error(np.append(confidence, 1.0), np.append(correct, 0), 2)
    assert more == pytest.approx(np.sqrt(0.4 * (0.3 - 0.5) ** 2 + 0.6 * (0.9 - 1 / 3) ** 2))
    assert rms_calibration_error(confidence, correct, 100) == pytest.approx(abs(confidence.mean() - 0.5))
    many, right = np.linspace(0, 1, 250), np.arange(250) % 3 == 0
    assert rms_calibration_error(many, right) == rms_calibration_error(many, right, 100)  # the published size
    assert rms_calibration_error(many, right) != rms_calibration_error(many, right, 50)
    with pytest.raises(ValueError, match="no images"):
        rms_calibration_error(np.zeros(0), np.zeros(0))


def test_a_calibrated_model_has_no_error_and_order_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=200_000)
    correct = rng.uniform(size=200_000) < confidence
    assert rms_calibration_error(confidence, correct, 10_000) < 0.01
    order = rng.permutation(1000)
    assert rms_calibration_error(confidence[:1000], correct[:1000]) == pytest.approx(
        rms_calibration_error(confidence[:1000][order], correct[:1000][order])
    )


METRICS = {
    "rms of 100": rms_calibration_error,
    "rms of 7": lambda confidence, correct: rms_calibration_error(confidence, correct, 7),
    "aurra": aurra,
    "aupr": lambda confidence, correct: average_precision(correct, -confidence),
}
TIED = {
    "constant": np.full(1000, 0.7),
    "saturated": np.minimum(np.linspace(0.5, 1.3, 1000), 1.0).astype(np.float32),
    "rounded": np.round(np.random.default_rng(3).uniform(size=1000), 1),
    "untied": np.random.default_rng(4).permutation(1000) / 1000,
}


@pytest.mark.parametrize("confidence", TIED.values(), ids=TIED)
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_the_order_of_files_decides_nothing(metric, confidence: np.ndarray) -> None:
    """Right ones first, last, and shuffled: to the bit."""
    correct = np.arange(1000) % 10 < 7
    orders = [np.argsort(correct, kind="stable"), np.argsort(~correct, kind="stable")]
    orders += [np.random.default_rng(seed).permutation(1000) for seed in range(3)]
    assert {metric(confidence[order], correct[order]) for order in orders} == {metric(confidence, correct)}


def test_ties_are_expected_values_and_untied_data_are_as_published() -> None:
    correct = np.repeat([1, 0], [700, 300])
    assert rms_calibration_error(np.full(1000, 0.7), correct) == 0.0
    assert aurra(np.full(1000, 0.7), correct) == pytest.approx(0.7)
    rng = np.random.default_rng(5)
    confidence, right = np.round(rng.uniform(size=60), 1), rng.uniform(size=60) < 0.6
    drawn = []
    for _ in range(4000):  # the mean over orders of ties, of the definition without a rule for them
        order = rng.permutation(60)
        order = order[np.argsort(-confidence[order], kind="stable")]
        drawn.append((np.cumsum(right[order]) / np.arange(1, 61)).mean())
    assert aurra(confidence, right) == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / np.sqrt(4000))
    untied = rng.permutation(250) / 250
    right, order = rng.uniform(size=250) < untied, np.argsort(untied)
    sizes = (100, 150)
    bins = np.split(order, [100])
    gaps = [untied[b].sum() / n - right[b].astype(float).sum() / n for b, n in zip(bins, sizes, strict=True)]
    expected = np.sqrt((np.array(sizes) / 250 * np.array(gaps) ** 2).sum())
    assert rms_calibration_error(untied, right) == pytest.approx(expected, rel=1e-12)
    falling = np.cumsum(right[order[::-1]]) / np.arange(1, 251)
    assert aurra(untied, right) == falling.mean()


def test_aurra_and_aupr_by_hand() -> None:
    assert aurra(np.array([0.1, 0.9, 0.5]), np.array([0, 1, 0])) == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert aurra(np.array([0.5, 0.5]), np.array([1, 0])) == pytest.approx((1 / 2 + 1 / 2) / 2)  # either is first
    assert average_precision(np.array([1, 0, 1, 0]), np.array([0.9, 0.8, 0.7, 0.1])) == pytest.approx((1 + 2 / 3) / 2)


# ---- intervals


def test_bootstrap_interval_is_the_binomial_one() -> None:
    outcomes = np.repeat([1, 0], [700, 300])
    found = mean_interval(outcomes)
    half = 1.96 * np.sqrt(0.7 * 0.3 / 1000)
    assert found.value == 0.7
    assert (found.low, found.high) == (pytest.approx(0.7 - half, abs=0.003), pytest.approx(0.7 + half, abs=0.003))


@pytest.mark.parametrize("count", [1, 6, 100, 5000])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_no_interval_collapses(value: float, count: int) -> None:
    """Accuracies of 0 and 100 %, a mean over conditions that is the same for every image, differences of nothing."""
    bound = binomtest(0, count).proportion_ci(0.95, method="exact").high
    same, zero = np.full((2, count), value), np.zeros(count)
    found = mean_interval(same)
    assert found.value == value and found.high - found.low == pytest.approx(bound)
    assert 0.0 <= found.low <= value <= found.high <= 1.0
    exact = binomtest(round(count * value), count).proportion_ci(0.95, method="exact")
    if value != 0.5:
        assert (found.low, found.high) == (pytest.approx(exact.low), pytest.approx(exact.high))
    none = group_difference(same, same).images
    assert none.value == 0.0 and (none.low, none.high) == (pytest.approx(-bound), pytest.approx(bound))
    rise = group_difference(zero, zero + 1).images
    assert (rise.value, rise.high) == (1.0, 1.0) and rise.low == pytest.approx(1 - 2 * bound)
    scaled = mean_interval(same * 3, largest=3.0)  # mCE's contributions are not in [0, 1]
    assert scaled.high - scaled.low == pytest.approx(3 * bound)
    if count > 1:  # one image that differs, and the bootstrap sees something
        differs = np.r_[1.0 - value if value != 0.5 else 1.0, np.full(count - 1, value)]
        seen = mean_interval(differs)
        assert seen.low < seen.high and seen.low <= seen.value <= seen.high


def test_seeds_are_no_more_images() -> None:
    outcomes = (np.arange(200) % 3 > 0).astype(float)
    assert mean_interval(np.stack([outcomes] * 5)) == mean_interval(outcomes)


def test_paired_differences_are_narrower_and_seeds_are_apart() -> None:
    rng = np.random.default_rng(1)
    hard = rng.uniform(size=500)
    first = np.stack([hard > 0.30, hard > 0.32]).astype(float)
    second = np.stack([hard > 0.25, hard > 0.29]).astype(float)
    found = group_difference(first, second)
    alone = mean_interval(first)
    assert found.images.value == pytest.approx(second.mean() - first.mean())
    assert found.images.high - found.images.low < 0.7 * (alone.high - alone.low)
    per_model = [group.mean(axis=1) for group in (first, second)]
    assert found.seeds == pytest.approx(np.sqrt(sum(m.var(ddof=1) / 2 for m in per_model)))
    assert group_difference(first[:1], second).seeds is None
    with pytest.raises(ValueError, match="the same images: 500 and 400"):
        group_difference(first, second[:, :400])
