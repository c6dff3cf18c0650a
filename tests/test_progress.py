"""The time left follows cost, and who looks at a file or a pipe is told, too."""

import sys

import pytest

from vmoe_momentum import progress
from vmoe_momentum.progress import Meter, Work, track


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


# pieces of (kind, cost, seconds): a plan's clean pictures, corruptions, and attacks that cost a thousand times more
PLANS = {
    "cost is time": [("clean", 60, 6.0), ("fgsm", 240, 24.0), ("pgd", 3660, 366.0), ("square", 5000, 500.0)],
    "pictures are dear to decode": [("clean", 60, 30.0), ("clean", 60, 30.0), ("pgd", 366, 36.6), ("pgd", 366, 36.6)],
    "one kind is faster": [("pgd", 1000, 100.0), ("square", 1000, 20.0), ("square", 1000, 20.0), ("pgd", 500, 50.0)],
}  # fmt: skip


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_time_left_follows_cost(plan: list[tuple[str, float, float]]) -> None:
    """Exact once every kind that is left was measured; before, by cost and not by the number of pieces."""
    clock = Clock()
    work = Work(((kind, cost) for kind, cost, _ in plan), clock)
    assert work.seconds_left() is None and work.share == 0.0
    met = set()
    for place, (kind, cost, seconds) in enumerate(plan):
        for _ in range(4):
            clock.now += seconds / 4
            work.advance(kind, cost / 4)
        met.add(kind)
        rest = plan[place + 1 :]
        if {kind for kind, _, _ in rest} <= met or plan is PLANS["cost is time"]:
            assert work.seconds_left() == pytest.approx(sum(seconds for _, _, seconds in rest), abs=1e-6)
    assert work.share == 1.0 and work.seconds_left() == 0.0


def test_what_is_known_already_takes_no_time() -> None:
    clock = Clock()
    work = Work([("clean", 10), ("pgd", 100)], clock)
    clock.now += 5  # reading what lies on disk
    work.skip("clean", 10)
    assert work.seconds_left() is None and work.share == pytest.approx(10 / 110)
    clock.now += 7
    work.advance("pgd", 50)
    assert work.seconds_left() == pytest.approx(7.0)


def test_what_others_do_shortens_the_rest() -> None:
    """Two that are equally fast: half the time; what lay there before says nothing of how fast they are."""
    clock = Clock()
    work = Work([("clean", 100), ("pgd", 1000)], clock)
    work.skip("clean", 40)
    clock.now += 6
    work.advance("clean", 30)
    assert work.seconds_left() == pytest.approx((30 + 1000) / 5)
    work.help("clean", 30)
    assert work.seconds_left() == pytest.approx(1000 / 5 / 2) and work.left["clean"] == 0
    assert work.share == pytest.approx(100 / 1100) and work.seconds_of({"pgd": 10}) == pytest.approx(2)
    work.help("pgd", 1000)
    assert work.seconds_left() == 0 and work.share == 1


def test_who_is_not_the_first_says_nothing(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    with Meter("robustness", Work([("a", 2)]), shown=False) as meter:
        meter.tell("first")
        meter.advance("a", 1)
        meter.say("a line")
    assert told(capsys) == [] and meter.work.share == 0.5


def told(capsys) -> list[str]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.splitlines()


def test_a_piped_run_is_told_in_lines(monkeypatch, capsys) -> None:
    assert not sys.stderr.isatty()
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    assert list(track(iter("abc"), "placing [train]", 3)) == list("abc")
    lines = told(capsys)
    assert lines[0].startswith("placing [train]: 33 %, 0:00:00 left") and lines[-1].startswith(
        "placing [train]: done in"
    )
    assert list(track(iter("abc"), "reading")) == list("abc")
    assert told(capsys)[1] == "reading: 2 so far"
    monkeypatch.setattr(progress, "EVERY_SECONDS", 10.0)
    list(track("abc", "short"))
    assert told(capsys) == []  # what takes less than that says nothing
    with Meter("robustness", Work([("a", 2)])) as meter:
        for name in ("first", "second"):
            meter.tell(name)
            meter.advance("a", 1)
    assert told(capsys) == ["robustness: 0 %, first", "robustness: done in 0:00:00"]
    with pytest.raises(ValueError), Meter("robustness", Work([("a", 2)])) as meter:
        meter.tell("first")
        raise ValueError
    assert told(capsys) == ["robustness: 0 %, first"]


def test_a_terminal_has_a_bar(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(track("abc", "placing")) == list("abc")
    assert "placing" in capsys.readouterr().err
