"""From rows to answers: the paired differences that the protocol asks for, and what is missing for them."""

import math
from typing import NamedTuple

from evidence_arms import ARMS, DEPTHS, GAMMAS
from evidence_questions import (
    BLIND,
    BORNE,
    CHANCE,
    DEPTH,
    GAIN_OF_DEPTH,
    LOST,
    MAIN,
    MARGIN,
    PRIMARY,
    SMALL,
    Measure,
    Question,
)
from evidence_rows import Row, value_of
from evidence_statistics import Difference, family, single, verdict

Table = dict[tuple[str, int], Row]


class Answer(NamedTuple):
    question: Question
    measure: Measure
    seeds: int  # with both runs there
    wanted: int
    found: Difference | None  # None where a seed is missing

    @property
    def verdict(self) -> str:
        return "missing" if self.found is None else verdict(self.found, self.measure.counts)


def table_of(rows: list[Row]) -> Table:
    return {(row["arm"], int(row["seed"])): row for row in rows}


def value(row: Row, column: str) -> float:
    """NaN where it was not measured; chance where the run became not finite."""
    if row["diverged"] and column in ("top1", "corrupted_top1"):
        return CHANCE
    return value_of(row, column)


def paired(table: Table, arm: str, control: str, measure: Measure) -> dict[int, float]:
    """Seed -> arm minus control, in the measure's unit, of the seeds that have both."""
    found = {}
    for seed in range(min(ARMS[arm].seeds, ARMS[control].seeds)):
        if (arm, seed) in table and (control, seed) in table:
            difference = value(table[arm, seed], measure.column) - value(table[control, seed], measure.column)
            if math.isfinite(difference):
                found[seed] = measure.scale * difference
    return found


def grown(table: Table, question: Question) -> dict[int, float]:
    """Seed -> the gain of the deepest minus that of the shallowest."""
    shallow, deep = (
        paired(table, f"depth_{depth}_{question.arm}", f"depth_{depth}_{question.control}", GAIN_OF_DEPTH)
        for depth in (DEPTHS[0], DEPTHS[-1])
    )
    return {seed: deep[seed] - shallow[seed] for seed in shallow.keys() & deep.keys()}


def borne(table: Table, rule: str, seed: int) -> float | None:
    """The largest gamma that the rule bears, 0 where it bears not even 1; None where a run is missing."""
    rows = {gamma: table.get((f"margin_{rule}_{gamma:g}", seed)) for gamma in GAMMAS if gamma >= 1}
    if None in rows.values():
        return None
    tops = {gamma: value(row, "top1") for gamma, row in rows.items()}
    best = 0.0
    for gamma in sorted(rows):
        if rows[gamma]["diverged"] or round(tops[1.0] - tops[gamma], 9) > LOST:
            break
        best = gamma
    return best


def margins(table: Table, question: Question) -> dict[int, float]:
    found = {}
    for seed in range(3):
        arm, control = borne(table, question.arm, seed), borne(table, question.control, seed)
        if arm is not None and control is not None:
            found[seed] = arm - control
    return found


def answers(rows: list[Row]) -> list[Answer]:
    """Of every question, family by family: clean, corrupted, both at the shapes of S/32, the mechanism."""
    table, found = table_of(rows), []
    for questions in (MAIN, SMALL):
        for measure in PRIMARY:
            asked = [(q, measure, paired(table, q.arm, q.control, measure), ARMS[q.arm].seeds) for q in questions]
            found += _family(asked)
    asked = [(q, GAIN_OF_DEPTH, grown(table, q), 3) for q in DEPTH] + [(q, BORNE, margins(table, q), 3) for q in MARGIN]
    return found + _family(asked)


def _family(asked: list[tuple[Question, Measure, dict[int, float], int]]) -> list[Answer]:
    """Questions with a missing seed keep their place in Holm's count, with p = 1."""
    samples = [tuple(values[seed] for seed in sorted(values)) if len(values) == n else None for *_, values, n in asked]
    found = family(samples, [measure.step for _, measure, *_ in asked])
    return [Answer(q, m, len(v), n, d) for (q, m, v, n), d in zip(asked, found, strict=True)]


def shown_apart(
    rows: list[Row], questions: tuple[Question, ...], measures: tuple[Measure, ...]
) -> list[tuple[Question, Measure, int, Difference | None]]:
    """Without Holm; None with fewer than two pairs."""
    table, found = table_of(rows), []
    for question in questions:
        for measure in measures:
            values = tuple(paired(table, question.arm, question.control, measure).values())
            difference = single(values, step=measure.step) if len(values) > 1 else None
            found.append((question, measure, len(values), difference))
    return found


def unasked() -> tuple[Question, ...]:
    """Every arm of full length that no question is about, against the network without momentum, norm or not."""
    about = {question.arm for question in MAIN} | {"residual"}
    arms = [arm for arm in ARMS.values() if arm.part == "main" and arm.name not in about]
    return tuple(pair(arm.name, "residual_norm" if arm.post_norm else "residual") for arm in arms)


def pair(arm: str, control: str) -> Question:
    """A difference that nobody asked about before."""
    return Question(0, "", arm, control)


def blind(table: Table, question: Question) -> tuple[int, int]:
    """Of the runs of most blocks that the question compares: how many learned nothing, and how many are there."""
    names = [f"depth_{DEPTHS[-1]}_{name}" for name in (question.arm, question.control)]
    rows = [table[name, seed] for name in names for seed in range(ARMS[name].seeds) if (name, seed) in table]
    return sum(value(row, "top1") <= BLIND for row in rows), len(rows)
