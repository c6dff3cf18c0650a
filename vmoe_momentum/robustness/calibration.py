"""Metrics beside accuracy. N images; confidence [N] in [0, 1], correct [N] 0 or 1."""

import numpy as np


def rms_calibration_error(confidence: np.ndarray, correct: np.ndarray, bin_size: int = 100) -> float:
    """sqrt(sum_b n_b / N (confidence_b - accuracy_b)^2) over bins of `bin_size` images of like confidence.

    Source: hendrycks/natural-adv-examples calibration_tools.py at 0777070, which leaves out the last bin (the most
    confident 100 images and more) by an off-by-one; here every bin counts, the last one takes the remainder.
    Images of one confidence count alike, wherever a bin's border falls among them (`_share_ties`).
    """
    if len(confidence) == 0:
        raise ValueError("calibration: no images")
    order = np.argsort(confidence, kind="stable")
    confidence, correct = confidence[order].astype(float), _share_ties(confidence, correct)[order]
    starts = np.arange(0, max(1, len(confidence) // bin_size)) * bin_size
    sizes = np.diff([*starts, len(confidence)])
    gaps = np.add.reduceat(confidence, starts) / sizes - np.add.reduceat(correct, starts) / sizes
    return float(np.sqrt((sizes / len(confidence) * gaps**2).sum()))


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """sum_b n_b / N |confidence_b - accuracy_b| over `bins` bins of one width, each open below: (0, 1/15] and so on.

    Source: Guo et al., arXiv:1706.04599, equation 3. torchmetrics has the bins open above, and so a sixteenth one for a
    confidence of exactly 1.
    """
    if len(confidence) == 0:
        raise ValueError("calibration: no images")
    place = np.searchsorted(np.linspace(0.0, 1.0, bins + 1)[1:-1], confidence.astype(float), side="left")
    gaps = np.bincount(place, weights=confidence.astype(float) - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def aurra(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Area under the response rate accuracy curve: mean over n of the accuracy of the n most confident images.

    Of images of one confidence, its expected value over their orders (`_share_ties`; the reference leaves it open).
    """
    if len(confidence) == 0:
        raise ValueError("aurra: no images")
    order = np.argsort(-confidence, kind="stable")
    return float((np.cumsum(_share_ties(confidence, correct)[order]) / np.arange(1, len(order) + 1)).mean())


def _share_ties(confidence: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """[N] the share of right answers among the images of the same confidence; without ties `correct` as it is.

    Nothing ranks these images, and a rule that did would let the order of files decide: sorted by class, or by name.
    """
    _, group, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    return (np.bincount(group, weights=correct.astype(float)) / counts)[group]


def average_precision(positive: np.ndarray, score: np.ndarray) -> float:
    """AUPR of `score` for finding the positives; ImageNet-O: positive = out of distribution, score = -confidence."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(positive, score))
