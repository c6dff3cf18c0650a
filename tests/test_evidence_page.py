"""The statistics and the page of benchmarks/evidence.py: closed forms, planted rows, and the committed page."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_1samp

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import evidence_answers as answers_of  # noqa: E402
import evidence_arms as arms  # noqa: E402
import evidence_measures as measures  # noqa: E402
import evidence_page as page  # noqa: E402
import evidence_questions as questions  # noqa: E402
import evidence_rows as rows_of  # noqa: E402
import evidence_statistics as statistics  # noqa: E402
import evidence_tables as tables  # noqa: E402

ROWS = page.PAGE.parent / "rows.csv"


def test_a_t_interval_by_hand() -> None:
    """df 2 has closed forms: the quantile is 4.302653 at 97.5 %, p is 1 - t / sqrt(t^2 + 2)."""
    found = statistics.single((1.0, 2.0, 3.0))
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert found.p == pytest.approx(1 - 12**0.5 / 14**0.5)
    assert found.bootstrap == (1.0, 3.0)  # 1 of 27 samples is all ones: more than 2.5 %
    assert not found.agree  # t holds 0 inside, the bootstrap does not
    same = statistics.single((0.5, 0.5, 0.5))
    assert (same.low, same.high, same.p, same.bootstrap) == (0.5, 0.5, 0.0, (0.5, 0.5))


def test_seeds_that_agree_on_a_grid_are_not_certain() -> None:
    found = statistics.single((1.0, 1.0, 1.0), step=0.5)
    reach = 4.302653 * 0.5 / 6**0.5 / 3**0.5
    assert (found.low, found.high) == pytest.approx((1 - reach, 1 + reach))
    t = 1 / (0.5 / 6**0.5 / 3**0.5)
    assert found.p == pytest.approx(1 - t / (t * t + 2) ** 0.5)


def test_p_is_scipys() -> None:
    values = tuple(np.random.default_rng(0).normal(0.3, 1.0, 5))
    assert statistics.p_value(values) == pytest.approx(ttest_1samp(values, 0.0).pvalue)


def of_p(p: float) -> tuple[float, float, float]:
    """Three differences whose paired t test has this p: mean t, deviation sqrt(3)."""
    t = (2 * (1 - p) ** 2 / (1 - (1 - p) ** 2)) ** 0.5
    return tuple(t + 3**0.5 * step for step in (-1, 0, 1))


def test_holm_on_the_textbooks_example() -> None:
    ps = [0.01, 0.04, 0.03, 0.005]
    found = statistics.family([of_p(p) for p in ps])
    assert [d.p for d in found] == pytest.approx(ps)
    assert [d.adjusted for d in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert [d.shown for d in found] == [True, False, False, True]
    assert [d.level for d in found] == pytest.approx([0.05 / 3, 0.05, 0.025, 0.0125])
    for difference in found:  # the interval is that of the step's own test
        assert statistics.leaves_out_zero(difference.low, difference.high) == (difference.p < difference.level)


def test_what_is_not_there_keeps_its_place_in_holms_count() -> None:
    first, missing = statistics.family([of_p(0.03), None])
    assert missing is None and first.level == 0.025 and not first.shown


@pytest.mark.parametrize(("seeds", "level"), [(5, 0.05), (5, 0.005), (3, 0.05), (3, 0.0125)])
def test_the_smallest_difference_is_shown_four_times_of_five(seeds: int, level: float) -> None:
    effect = statistics.smallest_effect(seeds, level)
    drawn = np.random.default_rng(0).normal(effect, 1.0, (200_000, seeds))
    t = drawn.mean(axis=1) / drawn.std(axis=1, ddof=1) * seeds**0.5
    edge = {(5, 0.05): 2.776445, (5, 0.005): 5.597568, (3, 0.05): 4.302653, (3, 0.0125): 8.860244}[seeds, level]
    assert np.mean(np.abs(t) > edge) == pytest.approx(0.8, abs=0.004)


@pytest.mark.parametrize(
    ("mean", "reach", "shown", "wanted"),
    [
        (1.0, 0.5, True, "gain"),
        (-1.0, 0.5, True, "loss"),
        (0.3, 0.1, True, "small"),
        (0.1, 0.3, False, "none"),
        (0.3, 0.4, False, "undecided"),
        (2.0, 0.5, False, "undecided"),  # its own step would show it, one before it does not
    ],
)
def test_verdicts(mean: float, reach: float, shown: bool, wanted: str) -> None:
    found = statistics.single((mean, mean + 1e-3))._replace(mean=mean, low=mean - reach, high=mean + reach, shown=shown)
    assert statistics.verdict(found, 0.5) == wanted


def planted(skip: tuple[str, ...] = (), noise: float = 0.001) -> list[rows_of.Row]:
    """Rows of all cells: heavy_ball_07 is 2 points better, adam 3 worse, and bears gammas up to 2.5; others alike."""
    draws, rows = np.random.default_rng(1), []
    for cell in arms.cells([*arms.PARTS]):
        arm = cell.arm
        if arm.name in skip:
            continue
        top1 = 0.88 + noise * draws.standard_normal() + 0.01 * cell.seed
        top1 += {"heavy_ball_07": 0.02, "adam": -0.03}.get(arm.name, 0.0)
        if arm.part == "depth":
            top1 += 0.0005 * arm.depth * ("heavy" in arm.name)
        if arm.part == "margin" and arm.gamma > (2.5 if "heavy" in arm.name else 1.5):
            top1 -= 0.3
        measured = {name: 0.1 + 0.01 * draws.random() for name in rows_of.MEASURED} | {"top1": top1}
        made = {"seconds": "1", "machine": "none", "torch": "none", "revision": "none"}
        rows.append(rows_of.make_row(cell, "", measured, made))
    return rows


def by_number(rows: list[rows_of.Row], column: str = "top1") -> dict[int, answers_of.Answer]:
    return {a.question.number: a for a in answers_of.answers(rows) if a.measure.column == column}


def test_planted_differences_are_found_and_nothing_else() -> None:
    found = by_number(planted())
    verdicts = {number: answer.verdict for number, answer in found.items()}
    assert verdicts[1] == verdicts[8] == verdicts[11] == verdicts[12] == "gain"
    assert verdicts[5] == verdicts[10] == "loss"
    assert all(verdicts[number] in ("none", "small") for number in (2, 3, 4, 6, 7, 9))
    assert found[11].found.mean == pytest.approx(100 * 0.0005 * 48, abs=0.4)
    assert found[13].found.values == (1.0, 1.0, 1.0)
    assert found[13].found.level == 0.025 and found[13].verdict == "gain"  # two of its family are before it


def test_a_run_that_is_not_finite_counts_as_chance_and_ends_what_is_borne() -> None:
    rows = planted()
    for row in rows:
        if (row["arm"], row["seed"]) in (("heavy_ball_07", "2"), ("margin_heavy_ball_07_2", "0")):
            row |= dict.fromkeys(rows_of.MEASURED, "") | {"diverged": "training"}
    (control,) = [row for row in rows if (row["arm"], row["seed"]) == ("residual", "2")]
    found = by_number(rows)
    assert found[1].found.values[2] == pytest.approx(100 * (0.1 - float(control["top1"])))
    assert found[13].found.values[0] == 0.0  # both up to 1.5: nothing past a run that did not
    for row in rows:
        if (row["arm"], row["seed"]) == ("margin_heavy_ball_07_1", "0"):
            row |= dict.fromkeys(rows_of.MEASURED, "") | {"diverged": "training"}
    assert by_number(rows)[13].found.values[0] == -1.5  # not even 1
    measure = next(each for each in questions.SECONDARY if each.column == "nll")
    assert set(answers_of.paired(answers_of.table_of(rows), "heavy_ball_07", "residual", measure)) == {0, 1, 3, 4}


def test_missing_cells_are_named_and_have_no_verdict() -> None:
    rows = [row for row in planted(skip=("nesterov",)) if (row["arm"], row["seed"]) != ("adam", "3")]
    text = page.fill(page.PAGE.read_text(), rows, [])
    assert "**Not complete.** Missing: seed 3 of adam; seeds 0, 1, 2 of nesterov." in text
    assert "not answered yet: question 5 (4 of 5 seeds)" in text
    assert len(re.findall(r"\| adam - residual \| .* \| 4 of 5 \| .* \| missing \|", text)) == 2


def test_without_rows_nothing_is_said() -> None:
    text = page.fill(page.PAGE.read_text(), [], [])
    assert text.count(page.NOTHING) == 9 and "png" not in text
    assert not re.search(r"[+-]\d+\.\d", text)


def test_every_number_of_the_questions_is_that_of_the_rows() -> None:
    """Means and intervals anew, by numpy and the table of t, from the rows as a reader would take them."""
    rows = planted(noise=0.004)
    lines = [line.split(" | ") for line in tables.questions(rows).splitlines()[2:]]
    edges = {5: 5.597568, 3: 8.860244}  # at Holm's first step
    for line in lines[:20]:
        arm, control = line[2].split(" - ")
        column, scale = {"clean top-1": ("top1", 100), "top-1 over 75 corruptions": ("corrupted_top1", 100)}[line[3]]
        values = {(row["arm"], row["seed"]): scale * float(row[column]) for row in rows if row[column]}
        differences = np.array([values[arm, str(seed)] - values[control, str(seed)] for seed in range(5)])
        assert line[5] == f"{differences.mean():+.2f} points"
        if line[8] == "99.50 %":
            reach = edges[5] * differences.std(ddof=1) / 5**0.5
            assert line[6] == f"{differences.mean() - reach:+.2f} to {differences.mean() + reach:+.2f}"
    assert sum(line[8] == "99.50 %" for line in lines[:20]) == 2


def test_every_arm_is_in_a_question_or_told_beside_them() -> None:
    """The protocol: other arms are shown with plain 95 % t intervals; here anew by scipy."""
    rows = planted(noise=0.004)
    told = dict(line.split(" | ")[:2] for line in tables.others(rows).splitlines()[2:])
    told = {name.removeprefix("| "): text for name, text in told.items()}
    asked = {question.arm for question in questions.MAIN}
    assert {name.split(" - ")[0] for name in told} | asked == {arm.name for arm in arms.main_arms()} - {"residual"}
    top = {(row["arm"], row["seed"]): 100 * float(row["top1"]) for row in rows}
    for name, text in told.items():
        arm, control = name.split(" - ")
        assert control == ("residual_norm" if arm.endswith("_norm") else "residual")
        seeds = [str(seed) for seed in range(arms.ARMS[arm].seeds)]
        own = ttest_1samp([top[arm, seed] - top[control, seed] for seed in seeds], 0.0).confidence_interval()
        mean, low, high, pairs = map(float, re.findall(r"[+-]?\d+\.?\d*", text))
        assert (low, high, pairs) == pytest.approx((*own, len(seeds)), abs=6e-3)
        assert mean == pytest.approx((low + high) / 2, abs=0.01)


def test_every_depth_is_told_with_its_difference() -> None:
    rows = planted()
    last = tables.depths(rows).splitlines()[-1].removeprefix("| ").split(" | ")
    tops = {row["arm"]: [] for row in rows}
    for row in rows:
        tops[row["arm"]].append(100 * float(row["top1"]))
    control, arm = tops["depth_56_residual_norm"], tops["depth_56_heavy_ball_07_norm"]
    assert last[0] == "56" and last[4] == f"{np.mean(control):.2f} ± {np.std(control, ddof=1):.2f}"
    assert last[5] == f"{np.mean(arm):.2f} ± {np.std(arm, ddof=1):.2f}"
    told = ttest_1samp(np.subtract(arm, control), 0.0).confidence_interval()
    mean, low, high, pairs = map(float, re.findall(r"[+-]?\d+\.?\d*", last[6]))
    assert (low, high, pairs) == pytest.approx((*told, 3), abs=6e-3)
    assert mean == pytest.approx(np.mean(arm) - np.mean(control), abs=6e-3)


def test_rounding_of_rows_is_no_difference() -> None:
    found = statistics.single((-0.004, 0.004, 1e-15))
    assert tables.plain(3, found) == "+0.00000 (-0.00994 to +0.00994), 3 pairs"
    assert tables.plain(2, statistics.single((0.0, 0.0))) == "+0.00 (+0.00 to +0.00), 2 pairs"
    assert tables.plain(1, None) == "not in two pairs"


def test_no_sentence_claims_more_than_its_interval() -> None:
    for seed in range(5):
        draws = np.random.default_rng(seed)
        samples = [tuple(draws.normal(draws.normal(0, 0.5), draws.uniform(0.05, 1), 5)) for _ in questions.MAIN]
        for question, found in zip(questions.MAIN, statistics.family(samples), strict=True):
            told = page.told(answers_of.Answer(question, questions.PRIMARY[0], 5, 5, found))
            low, high = found.low, found.high
            assert ("a gain of +" in told) <= (low > 0 and found.mean >= 0.5)
            assert ("a loss, -" in told) <= (high < 0 and found.mean <= -0.5)
            assert ("less than the 0.5 points" in told) <= (statistics.leaves_out_zero(low, high))
            assert ("neither" in told) <= (low > -0.5 and high < 0.5)
            assert f"({low:+.2f} to {high:+.2f}" in told
            assert ("the bootstrap disagrees" in told) == (not found.agree)


def test_pictures_and_page_are_made_from_rows_alone(tmp_path: Path) -> None:
    rows = [row for row in planted() if row["part"] != "depth"]
    page.write_page(rows, rows[:1], tmp_path)
    pictures = {"forest.png", "mechanism.png", "margin.png"}
    assert {path.name for path in tmp_path.iterdir()} == {"README.md", "differences.csv", *pictures}
    text = (tmp_path / "README.md").read_text()
    assert page.fill(text, rows, rows[:1]) == text and "depth.png" not in text
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (tmp_path / name).stat().st_size > 10_000


def test_runs_made_once_more_are_told_beside_their_rows() -> None:
    rows = planted()
    assert page.repeats(rows, []) == "No run has been repeated yet."
    other = rows[1] | {"top1": "0.8123", "machine": "another"}
    same, differs = page.repeats(rows, [rows[0] | {"seconds": "9"}, other]).splitlines()
    assert "the same to the last digit" in same
    filled = sum(bool(other[name]) for name in rows_of.REPEATED)
    assert "clean top-1 81.23 % where the row has" in differs and f"1 of {filled} differ" in differs
    assert "made with another, torch none, code none, the row with none," in differs


def test_the_committed_page_is_that_of_the_committed_rows() -> None:
    rows, text = rows_of.read_rows(ROWS), page.PAGE.read_text()
    again = rows_of.read_rows(ROWS.with_name("repeats.csv"), rows_of.AGAIN)
    assert page.fill(text, rows, again) == text, "run `python benchmarks/evidence.py --pictures`"
    for name in re.findall(r"\]\((\w+\.png)\)", text):
        assert (page.PAGE.parent / name).exists()
    assert (page.PAGE.parent / "differences.csv").read_text() == tables.differences(rows)
    for other in page.WITH_SUMMARY:
        text = other.read_text()
        assert "<!-- summary -->" in text and page.fill(text, rows, again) == text


def test_every_state_of_the_code_was_tried_once_more() -> None:
    rows = {(row["arm"], row["seed"]): row for row in rows_of.read_rows(ROWS)}
    again = rows_of.read_rows(ROWS.with_name("repeats.csv"), rows_of.AGAIN)
    tried = {rows[row["arm"], row["seed"]]["revision"] for row in again}
    assert tried == {row["revision"] for row in rows.values() if row["part"] not in arms.ON_GPU}


def test_the_summary_counts_every_answer_once() -> None:
    for rows in (planted(), planted(noise=0.004, skip=("adam",)), planted(noise=0.0001)):
        told, found = page.summary(rows), answers_of.answers(rows)
        counts = re.findall(r"(\d+) (?:a gain|a loss|a diff|neither|undecided|still)", told.split(". ")[1])
        assert sum(map(int, counts)) == len(found)
        assert told.count(" against ") == sum(answer.verdict in ("gain", "loss") for answer in found)
    assert " against " in told and "missing" not in told and "No gain" not in told
    none = page.summary([row | {"top1": f"{0.8 + 0.01 * int(row['seed'])}"} for row in planted()])
    assert none.endswith(" No gain was shown.")


def test_what_would_have_been_needed_is_the_first_step_that_was_not_shown() -> None:
    """Of four: two are shown, so a third wants 5 % over the two that are left, whatever its own place is."""
    found = statistics.family([of_p(p) for p in (0.01, 0.9, 0.04, 0.005)])
    assert [d.shown for d in found] == [True, False, False, True]
    for difference in found:
        needed = difference.level if difference.shown else 0.05 / 2
        assert difference.smallest == pytest.approx(statistics.smallest_effect(3, needed) * 3**0.5)


def test_networks_that_learned_nothing_are_told() -> None:
    rows = planted()
    assert "learned nothing" not in page.conclusion(rows)
    for row in rows:
        if row["arm"] == "depth_56_residual_norm" and row["seed"] != "1":
            row["top1"] = "0.11"
    told = page.conclusion(rows)
    assert "; 2 of the 6 runs of question 12 at 56 blocks learned nothing" in told and told.count("nothing") == 1


def test_doubts_are_told_beside_their_intervals() -> None:
    question, measure = questions.MAIN[0], questions.PRIMARY[0]
    late = statistics.family([(1.0, 1.1, 0.9), (-0.5, 5.0, 4.0)])[0]._replace(shown=False)
    assert "but a step before it in Holm's order was not shown" in page.told(
        answers_of.Answer(question, measure, 3, 3, late)
    )
    same = statistics.single((0.0, 0.0, 0.0), step=0.5)
    told = page.told(answers_of.Answer(question, questions.BORNE, 3, 3, same))
    assert "the interval is the rounding's alone" in told
    assert "rounding" not in page.told(answers_of.Answer(question, measure, 3, 3, late))


def test_repeated_runs_in_place_of_their_rows() -> None:
    rows = planted()
    control = next(row for row in rows if (row["arm"], row["seed"]) == ("residual", "0"))
    again = control | {"top1": f"{float(control['top1']) + 0.05:.6g}"}
    lines = page.instead(rows, [again]).splitlines()
    assert [re.match(r"- question (\d+): clean top-1 ", line)[1] for line in lines] == ["1", "4", "5", "6", "9"]
    (before,) = [
        a.found.mean for a in answers_of.answers(rows) if a.question.number == 1 and a.measure.column == "top1"
    ]
    assert (
        f"{before - 1:+.2f} points" in lines[0]
        and f"where the rows say clean top-1 a gain of {before:+.2f}" in lines[0]
    )
    assert page.instead(rows, [control]) == "No question's values change."


def test_every_arm_is_in_the_table_of_differences() -> None:
    rows = planted(noise=0.004)
    found = list(csv.DictReader(tables.differences(rows).splitlines()))
    told = {row["arm"] for row in found} | {row["control"] for row in found}
    assert told == set(arms.ARMS)
    assert {row["measure"] for row in found} == {m.column for m in (*questions.PRIMARY, *questions.SECONDARY)}
    values = {(row["arm"], row["seed"]): row for row in rows}
    for row in found[:: len(found) // 50]:
        measure = next(m for m in (*questions.PRIMARY, *questions.SECONDARY) if m.column == row["measure"])
        pairs = [(values[row["arm"], str(s)], values[row["control"], str(s)]) for s in range(int(row["pairs"]))]
        by_hand = [measure.scale * (float(a[measure.column]) - float(b[measure.column])) for a, b in pairs]
        if np.std(by_hand, ddof=1) > measure.step:
            own = ttest_1samp(by_hand, 0.0).confidence_interval()
            assert (float(row["low"]), float(row["high"])) == pytest.approx(tuple(own), rel=1e-4, abs=1e-6)


def test_numbers_of_pictures_are_those_of_the_protocol() -> None:
    """On the page, in the heads of its tables, and in the grid that each measure has."""
    text, heads = page.PAGE.read_text(), " ".join(title for _, title, _ in tables.ARM_COLUMNS)
    counts = measures.PICTURES
    assert (
        f"{counts['corrupted']} under the\n  corruptions, {counts['attacked']} under PGD, {counts['square']} un" in text
    )
    assert f"of {counts['corrupted']} pictures" in heads and f"PGD 2/255, {counts['attacked']} pictures" in heads
    assert f"Square 2/255, {counts['square']} pictures" in heads
    steps = {measure.column: measure.step for measure in questions.SECONDARY}
    assert steps["pgd_2"] == steps["pgd_8"] == pytest.approx(100 / counts["attacked"])
    assert steps["square_2"] == steps["square_8"] == pytest.approx(100 / counts["square"])


def test_runs_that_bear_the_whole_grid_are_told() -> None:
    """Planted rules bear 1.5 and 2.5; here Residual's last ones are as good as its first."""
    rows = planted()
    assert "the end of the grid" not in page.conclusion(rows)
    for row in rows:
        if row["arm"].startswith("margin_residual_") and row["seed"] != "2":
            row["top1"] = "0.88"
    assert "; 2 of 9 pairs of rule and seed bear gamma 4, the end of the grid: their limit was" in page.conclusion(rows)


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout


def added(name: str) -> list[str]:
    """Commits that added a file, the first last; none in a copy without its history."""
    if git("rev-parse", "--is-shallow-repository").strip() != "false":
        return []
    return git("log", "--diff-filter=A", "--format=%H", "--", name).split()


def test_the_protocol_was_committed_before_the_first_row() -> None:
    """The first commit that has rows comes after one that has the questions, and rows are of later code."""
    protocol, rows = added("benchmarks/evidence_questions.py"), added(str(ROWS.relative_to(ROOT)))
    if not protocol or not rows:
        pytest.skip("no history here, or no rows in it")
    for later in (rows[-1], *{row["revision"] for row in rows_of.read_rows(ROWS)}):
        before = subprocess.run(["git", "merge-base", "--is-ancestor", protocol[-1], later], cwd=ROOT, check=False)
        assert before.returncode == 0 and later != protocol[-1]


def test_no_question_or_threshold_has_changed_since_the_first_row() -> None:
    """Those of V-MoE-S/32: since the first row of theirs."""
    rows = added(str(ROWS.relative_to(ROOT)))
    if not rows:
        pytest.skip("no history here, or no rows in it")
    first_of_small = git("log", "--reverse", "--format=%H", "-S", "small,small_", "--", str(ROWS))
    names = [
        "MAIN",
        "PRIMARY",
        "DEPTH",
        "MARGIN",
        "GAIN_OF_DEPTH",
        "BORNE",
        "CHANCE",
        "LOST",
        "LEVEL",
        "POWER",
        "DRAWS",
    ]
    for commit, fixed in ((rows[-1], names), (first_of_small.split()[0], [*names, "SMALL"])):
        then: dict[str, object] = {"__name__": "then"}
        exec(git("show", f"{commit}~1:benchmarks/evidence_questions.py"), then)
        assert [(name, then[name]) for name in fixed] == [(name, getattr(questions, name)) for name in fixed]
