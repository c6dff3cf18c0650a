"""The page benchmarks/results/evidence/README.md: every number and sentence of it from the rows; and its summary."""

import re
from collections import Counter
from pathlib import Path

from evidence_answers import Answer, answers, blind, borne, table_of, value
from evidence_arms import ARMS, DEPTHS, GAMMAS, PARTS, cells
from evidence_pictures import draw
from evidence_questions import BLIND, DEPTH, MARGIN, SMALL, Question
from evidence_rows import REPEATED, ROOT, Row
from evidence_statistics import leaves_out_zero, spread_of
from evidence_tables import NOTHING, arms, depths, differences, interval, margins, others, questions, secondary

from vmoe_momentum.files.staging import write_together

PAGE = ROOT / "benchmarks" / "results" / "evidence" / "README.md"
WITH_SUMMARY = (ROOT / "README.md", ROOT / "docs" / "results.md")


def write_page(rows: list[Row], again: list[Row], folder: Path) -> None:
    """Pictures and README.md of the folder; the text between the markers is that of the committed page.

    The summary in other pages follows the committed folder only. again: rows of runs that were made once more.
    """
    draw(rows, folder)
    place = folder / "README.md"
    text = (place if place.exists() else PAGE).read_text()
    made = {"README.md": fill(text, rows, again), "differences.csv": differences(rows)}
    write_together(folder, {name: told.encode() for name, told in made.items()})
    if folder.resolve() == PAGE.parent:
        for page in WITH_SUMMARY:
            write_together(page.parent, {page.name: fill(page.read_text(), rows, again).encode()})


def fill(text: str, rows: list[Row], again: list[Row]) -> str:
    """`text` with what stands between `<!-- NAME -->` and `<!-- /NAME -->` made anew."""
    made = {name: make(rows) for name, make in SECTIONS.items()} | {"repeats": repeats(rows, again)}
    made["instead"] = instead(rows, again)
    for name, told in made.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda match, told=told: f"{match[1]}{told}\n{match[2]}", text, flags=re.DOTALL)
    return text


def status(rows: list[Row]) -> str:
    """How many runs are there, and which are not."""
    if not rows:
        return NOTHING
    done, every = set(table_of(rows)), cells(list(PARTS))
    missing: dict[str, list[int]] = {}
    for cell in every:
        if (cell.arm.name, cell.seed) not in done:
            missing.setdefault(cell.arm.name, []).append(cell.seed)
    lost = sum(bool(row["diverged"]) for row in rows)
    told = f"{len(every) - sum(map(len, missing.values()))} of {len(every)} runs are there; {lost} became not finite."
    made: dict[str, set[str]] = {}
    for row in rows:
        made.setdefault(maker(row), set()).add(row["revision"])
    told += " Made with " + "; ".join(f"{name}, code {', '.join(sorted(made[name]))}" for name in sorted(made)) + "."
    if not missing:
        return told
    return f"{told}\n\n**Not complete.** Missing: {'; '.join(listed(missing))}."


def listed(missing: dict[str, list[int]]) -> list[str]:
    """Which seeds of which arms, those that lack the same together; a part's by its name where all lack them."""
    of: dict[tuple[int, ...], list[str]] = {}
    for part in PARTS:
        lacking = {arm.name: tuple(missing.get(arm.name, ())) for arm in ARMS.values() if arm.part == part}
        if len(set(lacking.values())) == 1:
            of.setdefault(next(iter(lacking.values())), []).append(f"every arm of {part}")
        else:
            for name, seeds in lacking.items():
                of.setdefault(seeds, []).append(name)
    of.pop((), None)
    return [f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))} of {', '.join(of[seeds])}" for seeds in of]


def conclusion(rows: list[Row]) -> str:
    """Five sentences; each verdict by its interval."""
    if not rows:
        return NOTHING
    found = answers(rows)
    topics = (
        ("Momentum as the paper writes it", (1, 15)),
        ("The norm of the authors' code, and momentum behind it", (4, 2, 3, 17, 16)),
        ("Adam and the robust rule", (5, 6, 7)),
        ("Momentum or a larger step, and momentum in dense blocks", (8, 9, 10)),
        ("Depth and the stability margin", (11, 12, 13, 14)),
    )
    lines = []
    for place, (topic, numbers) in enumerate(topics, 1):
        asked = {number: [a for a in found if a.question.number == number] for number in numbers}
        clauses = []
        for number, own in asked.items():
            question, known = own[0].question, [told(answer) for answer in own if answer.found is not None]
            if known:
                clauses.append(f"{versus(question)} (question {number}): {', '.join(known)}")
        left = {f"{a.question.number} ({a.seeds} of {a.wanted} seeds)": None
                for own in asked.values() for a in own if a.found is None}  # fmt: skip
        clauses += [f"not answered yet: question {', '.join(left)}"] if left else []
        clauses += [untold] if (untold := beyond(rows, [own[0].question for own in asked.values()])) else []
        lines.append(f"{place}. {topic}: {'; '.join(clauses)}.")
    return "\n".join(lines)


def beyond(rows: list[Row], asked: list[Question]) -> str:
    """What the short runs cannot tell: clauses where networks learned nothing, and where all of the grid is borne."""
    clauses = []
    for question in asked:
        lost, there = blind(table_of(rows), question) if question in DEPTH else (0, 0)
        if lost:
            clauses.append(
                f"{lost} of the {there} runs of question {question.number} at {DEPTHS[-1]} blocks learned nothing "
                f"(top-1 of {100 * BLIND:g} % at most): its answer is about minus the gain at {DEPTHS[0]} blocks"
            )
    rules = {name: None for question in asked if question in MARGIN for name in (question.arm, question.control)}
    runs = [borne(table_of(rows), rule, seed) for rule in rules for seed in range(3)]
    known = [one for one in runs if one is not None]
    at_end = sum(one == GAMMAS[-1] for one in known)
    if at_end:
        clauses.append(
            f"{at_end} of {len(known)} pairs of rule and seed bear gamma {GAMMAS[-1]:g}, the end of the grid: their "
            "limit was not met"
        )
    return "; ".join(clauses)


def summary(rows: list[Row]) -> str:
    """How the questions came out, and what was shown."""
    if not rows:
        return NOTHING
    found = answers(rows)
    words = {
        "gain": "a gain", "loss": "a loss", "small": "a difference whose mean is too small to count",
        "none": "neither a gain nor a loss that counts", "undecided": "undecided", "missing": "still missing",
    }  # fmt: skip
    counts = Counter(answer.verdict for answer in found)
    verdicts = ", ".join(f"{counts[verdict]} {word}" for verdict, word in words.items() if counts[verdict])
    text = f"{len(table_of(rows))} of {len(cells(list(PARTS)))} runs are there. "
    text += f"Of {len(found)} answers asked for: {verdicts}."
    shown = [answer for answer in found if answer.verdict in ("gain", "loss")]
    told_ = "; ".join(f"{versus(a.question)}: {told(a)}" for a in shown)
    text += f" {told_}." if shown else ""
    return text if counts["gain"] or counts["missing"] else f"{text} No gain was shown."


def versus(question: Question) -> str:
    arm, control = question.arm.removeprefix("small_"), question.control.removeprefix("small_")
    return f"{arm} against {control}" + " at the shapes of V-MoE-S/32" * (question in SMALL)


def told(answer: Answer) -> str:
    """One clause, of an answer that was found. No more than the interval says."""
    measure = answer.measure
    assert answer.found is not None
    mean = f"{answer.found.mean:+.2f} {measure.unit}"
    counts = f"{measure.counts:g} {measure.unit.removesuffix('s') if measure.counts == 1 else measure.unit}"
    words = {
        "gain": f"a gain of {mean}",
        "loss": f"a loss, {mean}",
        "small": f"a difference, its mean of {mean} less than the {counts} that count",
        "none": f"neither a gain nor a loss of {counts}, {mean}",
        "undecided": f"undecided, {mean}",
    }[answer.verdict]
    doubt = "" if answer.found.agree else "; the bootstrap disagrees about 0"
    if answer.verdict == "undecided" and leaves_out_zero(answer.found.low, answer.found.high):
        doubt += "; its own interval leaves out 0, but a step before it in Holm's order was not shown"
    if spread_of(answer.found.values, 0) < spread_of(answer.found.values, measure.step):
        doubt += "; the interval is the rounding's alone"
    return f"{measure.told} {words} ({interval(answer.found)}{doubt})"


def repeats(rows: list[Row], again: list[Row]) -> str:
    """A line for each run that was made once more."""
    first = {(row["arm"], row["seed"]): row for row in rows}
    lines = []
    for row in again:
        old = first.get((row["arm"], row["seed"]))
        if old is None:
            continue
        there = [name for name in REPEATED if old[name] or row[name]]
        other = [name for name in there if old[name] != row[name]]
        told = "the same to the last digit"
        if other:
            before, after = 100 * value(old, "top1"), 100 * value(row, "top1")
            told = f"clean top-1 {after:.2f} % where the row has {before:.2f} %, {len(other)} of {len(there)} differ"
        lines.append(
            f"- {row['arm']}, seed {row['seed']}: {told}; made with {maker(row)}, code {row['revision']}, the row with "
            f"{maker(old)}, code {old['revision']}"
        )
    return "\n".join(lines) or "No run has been repeated yet."


def instead(rows: list[Row], again: list[Row]) -> str:
    """What the questions say with the repeated runs in place of their rows, where that changes one of their values."""
    first = {(row["arm"], row["seed"]): row for row in rows}
    second = {key: row for row in again if (key := (row["arm"], row["seed"])) in first}
    pairs = zip(answers(rows), answers(list((first | second).values())), strict=True)
    lines = [
        f"- question {one.question.number}: {told(other)}, where the rows say {told(one)}"
        for one, other in pairs
        if one.found is not None and other.found is not None and one.found.values != other.found.values
    ]
    return "\n".join(lines) or "No question's values change."


def maker(row: Row) -> str:
    return f"{row['machine']}, torch {row['torch']}"


CAPTIONS = (
    ("forest", "main", """Paired differences over seeds, a dot a seed. Bars are the intervals at each question's own
step in Holm's order: blue a gain, red a loss, grey anything else; the band is what does not count. A question has a
bar once all its seeds are there."""),
    ("mechanism", "main", """Mean over seeds, a dot a seed: share of eigenvalues inside the rule's region, expert load,
how many choose the expert with the largest output, routing change under noise."""),
    ("depth", "depth", "Clean top-1 over the number of blocks; a dot a seed, the line is their mean."),
    ("margin", "margin", """Left: clean top-1 over gamma; crosses became not finite. Right: the share of eigenvalues of
the networks trained with gamma 1 that lies inside each rule's region at that gamma: what the theory says before."""),
)  # fmt: skip


def pictures(rows: list[Row]) -> str:
    if not rows:
        return NOTHING
    parts = {row["part"] for row in rows}
    return "\n\n".join(f"![{name}]({name}.png)\n\n{text}" for name, part, text in CAPTIONS if part in parts)


SECTIONS = {
    "status": status, "conclusion": conclusion, "summary": summary, "pictures": pictures,
    "questions": questions, "arms": arms, "others": others, "depths": depths, "margins": margins,
    "secondary": secondary,
}  # fmt: skip
