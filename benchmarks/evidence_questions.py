"""What is asked of the rows of benchmarks/evidence.py: pairs, measures, thresholds.

Fixed before the first run; the questions of SMALL before the first run of theirs.
"""

from typing import NamedTuple

CHANCE = 0.1  # what a run that became not finite counts as, in top1 and corrupted_top1: ten classes
LOST = 0.05  # of top-1, against the same rule and seed at gamma 1: more is no longer borne
BLIND = 0.12  # of top-1: a network that learned nothing has no more, by chance and the luck of 10,000 pictures
LEVEL, POWER, DRAWS = 0.05, 0.8, 10_000  # of each family of tests; of the smallest difference; of the bootstrap


class Question(NamedTuple):
    """The paired difference `arm` minus `control`, seed by seed."""

    number: int
    asked: str
    arm: str
    control: str


class Measure(NamedTuple):
    column: str
    told: str
    unit: str
    scale: float  # from the column to the unit
    counts: float  # the smallest difference that counts, in the unit
    step: float = 0.0  # between two values that it can have, in the unit: a smaller spread than its rounding is none


# Primary. Each measure is a family of its own: Holm over its ten questions.
MAIN = (
    Question(1, "Does momentum help as the paper writes it (mu 0.7, no norm)?", "heavy_ball_07", "residual"),
    Question(2, "Does it help behind the norm of the authors' vision code?", "heavy_ball_07_norm", "residual_norm"),
    Question(3, "Does the authors' vision setting help (mu 0.9, norm in both)?", "heavy_ball_09_norm", "residual_norm"),
    Question(4, "What does the norm do without momentum?", "residual_norm", "residual"),
    Question(5, "Does Adam in depth help?", "adam", "residual"),
    Question(6, "Does the robust rule help in the paper's form?", "robust", "residual"),
    Question(7, "Does the robust rule help as released (norm in both)?", "robust_released_norm", "residual_norm"),
    Question(8, "Is it momentum, or a larger step? Total steps of 1/(1 - 0.7)", "heavy_ball_07", "residual_step_of_07"),
    Question(9, "Is it momentum, or a larger step? Total steps of 1", "heavy_ball_07_small_step", "residual"),
    Question(10, "Does momentum in dense blocks, too, help beyond that in sparse ones?", "heavy_ball_07_dense_blocks",
             "heavy_ball_07"),
)  # fmt: skip
PRIMARY = (
    Measure("top1", "clean top-1", "points", 100.0, 0.5, 0.01),
    Measure("corrupted_top1", "top-1 over 75 corruptions", "points", 100.0, 1.0, 0.004),
)
# The paper's mechanism: a third family of four. "arm" and "control" are rules there, compared as `told` says.
DEPTH = (
    Question(11, "Does what momentum gains in clean top-1 grow from 8 to 56 blocks?", "heavy_ball_07", "residual"),
    Question(12, "And behind the norm?", "heavy_ball_07_norm", "residual_norm"),
)
MARGIN = (
    Question(13, "Does mu 0.7 bear a larger gamma?", "heavy_ball_07", "residual"),
    Question(14, "Does mu 0.9 bear a larger gamma?", "heavy_ball_09", "residual"),
)
# On a GPU: the shapes of V-MoE-S/32. Each of the two primary measures is a family of three there.
SMALL = (
    Question(15, "As 1, at the shapes of V-MoE-S/32", "small_heavy_ball_07", "small_residual"),
    Question(16, "As 3, at the shapes of V-MoE-S/32", "small_heavy_ball_09_norm", "small_residual_norm"),
    Question(17, "As 4, at the shapes of V-MoE-S/32", "small_residual_norm", "small_residual"),
)
GAIN_OF_DEPTH = Measure("top1", "gain at 56 blocks minus gain at 8", "points", 100.0, 0.5, 0.01)
BORNE = Measure("top1", "largest gamma borne", "gamma", 1.0, 0.5, 0.5)

# Shown with plain 95 % intervals and without a verdict.
SECONDARY = (
    Measure("nll", "negative log-likelihood", "nats", 1.0, 0.0),
    Measure("ece", "calibration error (ECE)", "points", 100.0, 0.0),
    Measure("pgd_2", "robust top-1, PGD-20, 2/255", "points", 100.0, 0.0, 100 / 150),
    Measure("pgd_8", "robust top-1, PGD-20, 8/255", "points", 100.0, 0.0, 100 / 150),
    Measure("square_2", "robust top-1, Square, 2/255", "points", 100.0, 0.0, 100 / 60),
    Measure("square_8", "robust top-1, Square, 8/255", "points", 100.0, 0.0, 100 / 60),
    Measure("epochs_to_85", "epochs to 85 %", "epochs", 1.0, 0.0, 1.0),
    Measure("epochs_to_88", "epochs to 88 %", "epochs", 1.0, 0.0, 1.0),
    Measure("epochs_to_90", "epochs to 90 %", "epochs", 1.0, 0.0, 1.0),
    Measure("load_cv", "expert load, CV", "", 1.0, 0.0),
    Measure("load_entropy", "expert load, entropy", "nats", 1.0, 0.0),
    Measure("chosen_rank_1", "tokens that choose the expert of the largest output norm", "points", 100.0, 0.0),
    Measure("chosen_rank_2", "of the second largest", "points", 100.0, 0.0),
    Measure("chosen_rank_3", "of the third", "points", 100.0, 0.0),
    Measure("chosen_rank_4", "of the fourth", "points", 100.0, 0.0),
    Measure("routing_change", "routing change under noise", "points", 100.0, 0.0),
    Measure("share_rule", "eigenvalues inside the rule's region", "points", 100.0, 0.0),
    Measure("share_residual", "eigenvalues inside Residual's region", "points", 100.0, 0.0),
)
