"""The tables of the page benchmarks/results/evidence/README.md, every number from the rows."""

import csv
import io
import math
import statistics

from evidence_answers import answers, pair, shown_apart, unasked, value
from evidence_arms import ARMS, DEPTHS, GAMMAS, ON_GPU, RULES
from evidence_questions import DEPTH, MAIN, PRIMARY, SECONDARY, SMALL
from evidence_rows import Row
from evidence_statistics import Difference

ARM_COLUMNS = (
    ("top1", "clean top-1, %", 100.0), ("corrupted_top1", "75 corruptions of 300 pictures, %", 100.0),
    ("nll", "NLL", 1.0), ("ece", "ECE, %", 100.0), ("pgd_2", "PGD 2/255, 150 pictures, %", 100.0),
    ("pgd_8", "PGD 8/255, %", 100.0), ("square_2", "Square 2/255, 60 pictures, %", 100.0),
    ("square_8", "Square 8/255, %", 100.0),
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
    """Clean top-1 a number of blocks."""
    pairs = tuple((question.control, question.arm) for question in DEPTH)
    return beside(rows, "blocks", {str(blocks): f"depth_{blocks}_{{}}" for blocks in DEPTHS}, pairs)


def margins(rows: list[Row]) -> str:
    """Clean top-1 a gamma."""
    return beside(rows, "gamma", {f"{gamma:g}": f"margin_{{}}_{gamma:g}" for gamma in GAMMAS}, (RULES,))


def beside(rows: list[Row], title: str, names: dict[str, str], groups: tuple[tuple[str, ...], ...]) -> str:
    """A row each of `names`, what it is called -> pattern of the arms' names; plain 95 % intervals of the differences.

    groups: the control first, then who is held against it.
    """
    if not rows:
        return NOTHING
    head = [f"{group[0]}, %" + "".join(f" | {arm}, % | difference, points" for arm in group[1:]) for group in groups]
    columns = sum(2 * len(group) - 1 for group in groups)
    lines = [f"| {title} | {' | '.join(head)} |", "|---" * (columns + 1) + "|"]
    for called, pattern in names.items():
        cells_ = [called]
        for group in groups:
            control, *arms_ = (pattern.format(name) for name in group)
            cells_.append(top1(rows, control))
            for arm in arms_:
                ((_, _, *told),) = shown_apart(rows, (pair(arm, control),), PRIMARY[:1])
                cells_ += [top1(rows, arm), plain(*told)]
        lines.append(f"| {' | '.join(cells_)} |")
    return "\n".join(lines)


def top1(rows: list[Row], arm: str) -> str:
    return spread([100 * value(row, "top1") for row in rows if row["arm"] == arm])


def differences(rows: list[Row]) -> str:
    """CSV: every arm against its control in every measure of the page, plain 95 % intervals, of two pairs at least."""
    short = [pair(f"depth_{blocks}_{q.arm}", f"depth_{blocks}_{q.control}") for blocks in DEPTHS for q in DEPTH]
    short += [
        pair(f"margin_{rule}_{gamma:g}", f"margin_{RULES[0]}_{gamma:g}") for rule in RULES[1:] for gamma in GAMMAS
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("arm", "control", "measure", "unit", "pairs", "mean", "low", "high"))
    asked = (*MAIN, *SMALL, *unasked(), *short)
    for question, measure, pairs, found in shown_apart(rows, asked, (*PRIMARY, *SECONDARY)):
        if found is not None:
            numbers = (f"{round(number, 9) + 0.0:.6g}" for number in (found.mean, found.low, found.high))
            writer.writerow((question.arm, question.control, measure.column, measure.unit, pairs, *numbers))
    return text.getvalue()


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
