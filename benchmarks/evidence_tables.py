"""The tables of the page benchmarks/results/evidence/README.md, every number from the rows."""

import math
import statistics

from evidence_answers import answers, shown_apart, unasked, value
from evidence_arms import ARMS, DEPTHS, ON_GPU
from evidence_questions import DEPTH, MAIN, PRIMARY, SECONDARY, SMALL, Question
from evidence_rows import Row
from evidence_statistics import Difference

ARM_COLUMNS = (
    ("top1", "clean top-1, %", 100.0), ("corrupted_top1", "75 corruptions, %", 100.0), ("nll", "NLL", 1.0),
    ("ece", "ECE, %", 100.0), ("pgd_2", "PGD 2/255, %", 100.0), ("pgd_8", "PGD 8/255, %", 100.0),
    ("square_2", "Square 2/255, %", 100.0), ("square_8", "Square 8/255, %", 100.0),
)  # fmt: skip
NOTHING = "Nothing has been run yet: there is no row, so there is no result."


def questions(rows: list[Row]) -> str:
    """A row a question and measure."""
    head = ("", "question", "arm - control", "measure", "seeds", "mean", "interval", "bootstrap", "level", "p, Holm",
            "smallest that could be shown", "verdict")  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for answer in answers(rows):
        q, found, unit = answer.question, answer.found, answer.measure.unit
        cells_ = [str(q.number), q.asked, f"{q.arm} - {q.control}", answer.measure.told]
        cells_ += [f"{answer.seeds} of {answer.wanted}"]
        if found is None:
            cells_ += [""] * 6 + ["missing"]
        else:
            both = f"{found.bootstrap[0]:+.2f} to {found.bootstrap[1]:+.2f}" + ("" if found.agree else ", disagrees")
            cells_ += [f"{found.mean:+.2f} {unit}", interval(found), both, f"{100 * (1 - found.level):.2f} %"]
            cells_ += [f"{found.adjusted:.3g}", f"{found.smallest:.2f} {unit}", answer.verdict]
        lines.append(f"| {' | '.join(cells_)} |")
    return "\n".join(lines)


def arms(rows: list[Row]) -> str:
    """Mean and sample standard deviation over seeds of the main arms, and of those on a GPU."""
    if not rows:
        return NOTHING
    head = ["arm", "seeds", "not finite", *(title for _, title, _ in ARM_COLUMNS)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for arm in ARMS.values():
        own = [row for row in rows if row["arm"] == arm.name]
        if arm.part in ("main", *ON_GPU) and own:
            numbers = [spread([scale * value(row, column) for row in own]) for column, _, scale in ARM_COLUMNS]
            lost = sum(bool(row["diverged"]) for row in own)
            lines.append(f"| {' | '.join([arm.name, f'{len(own)} of {arm.seeds}', str(lost), *numbers])} |")
    return "\n".join(lines)


def others(rows: list[Row]) -> str:
    """A row an arm that no question is about: primary measures, mean difference and plain 95 % interval."""
    if not rows:
        return NOTHING
    found = {(q.arm, m.column): told for q, m, *told in shown_apart(rows, unasked(), PRIMARY)}
    lines = ["| arm - control | " + " | ".join(f"{m.told}, {m.unit}" for m in PRIMARY) + " |", "|---|---|---|"]
    for question in unasked():
        row = [plain(*found[question.arm, measure.column]) for measure in PRIMARY]
        lines.append(f"| {question.arm} - {question.control} | {' | '.join(row)} |")
    return "\n".join(lines)


def depths(rows: list[Row]) -> str:
    """Clean top-1 a number of blocks, and plain 95 % intervals of what momentum makes of it."""
    if not rows:
        return NOTHING
    pairs = [(question.control, question.arm) for question in DEPTH]
    head = [name for control, arm in pairs for name in (f"{control}, %", f"{arm}, %", "difference, points")]
    lines = [f"| blocks | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for blocks in DEPTHS:
        cells_ = []
        for names in pairs:
            control, arm = (f"depth_{blocks}_{name}" for name in names)
            cells_ += [
                spread([100 * value(row, "top1") for row in rows if row["arm"] == one]) for one in (control, arm)
            ]
            ((_, _, *told),) = shown_apart(rows, (Question(0, "", arm, control),), PRIMARY[:1])
            cells_.append(plain(*told))
        lines.append(f"| {blocks} | {' | '.join(cells_)} |")
    return "\n".join(lines)


def secondary(rows: list[Row]) -> str:
    """Mean difference and plain 95 % interval; a column a question."""
    if not rows:
        return NOTHING
    asked = (*MAIN, *SMALL)
    found = {(q.number, m.column): told for q, m, *told in shown_apart(rows, asked, SECONDARY)}
    lines = [f"| measure | {' | '.join(str(q.number) for q in asked)} |", "|---" * (len(asked) + 1) + "|"]
    for measure in SECONDARY:
        row = [f"{measure.told}{', ' * bool(measure.unit)}{measure.unit}"]
        row += [plain(*found[question.number, measure.column]) for question in asked]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Without what was not measured."""
    known = [one for one in values if one == one]
    if not known:
        return ""
    return f"{statistics.mean(known):.2f}" + (f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else "")


def plain(pairs: int, found: Difference | None) -> str:
    """Mean and interval, to three digits of the interval's half: the rounding of rows is no difference."""
    if found is None:
        return "not in two pairs"
    reach = (found.high - found.low) / 2
    places = max(0, 2 - math.floor(math.log10(reach))) if reach else 2
    mean, low, high = (f"{round(one, places) + 0.0:+.{places}f}" for one in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high}), {pairs} pairs"


def interval(found: Difference) -> str:
    return f"{found.low:+.2f} to {found.high:+.2f}"
