"""What can be asked for, and its ranges: what the command line has to know before torch is imported."""

from typing import Literal

from ..ranges import COUNT, NOT_NEGATIVE, Range

Norm = Literal["Linf", "L2"]

# The benchmark's order. mCE is the mean over these, whatever else is registered.
BENCHMARK = (
    "gaussian_noise", "shot_noise", "impulse_noise",
    "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness",
    "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
SEVERITIES = (1, 2, 3, 4, 5)
SEVERITY = Range(1, 5, whole=True)  # as positions in a list 0 is the last and True the second

ATTACK_NAMES = (  # for help: ATTACKS
    "fgsm", "pgd", "pgd-margin", "pma", "pgd-routing", "square", "spsa", "apgd", "apgd-dlr", "apgd-t", "malt", "fab",
    "autoattack", "mi-fgsm", "di-fgsm", "mi-di-fgsm",
)  # fmt: skip
# whose pictures differ from the clean ones also where the model they are made on stands
TRANSFER_NAMES = ("mi-fgsm", "di-fgsm", "mi-di-fgsm", "fgsm", "pgd", "pgd-margin")
BUDGET = {
    "eps": NOT_NEGATIVE.because("in pixel units, such as 4/255"), "steps": COUNT, "queries": COUNT,
    "seed": Range(0, 2**31 - 1, whole=True), "restarts": Range(1, 1000, whole=True), "eot": Range(1, 1000, whole=True),
}  # fmt: skip

RANGES = {
    **BUDGET, "severities": SEVERITY.or_(None), "query_images": COUNT.or_(None), "limit": COUNT.or_(None),
}  # fmt: skip
