"""The estimate of a bar is the time that is really left, whatever happened before the first item was done."""

import pytest

from quantdm import progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that only goes when it is told."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def work(bar, clock, seconds, items=1):
    clock[0] += seconds
    bar.update(items)


def test_workers_that_start_and_items_that_were_there_are_no_rate(clock):
    with progress.bar(100, "trials") as bar:
        bar.update(40)  # found in the store
        assert bar.seconds_left is None
        work(bar, clock, 35.0)  # the workers start
        for _ in range(9):
            work(bar, clock, 4.0)
        assert bar.seconds_left == pytest.approx(50 * 4.0, rel=0.2)


def test_the_estimate_follows_the_recent_rate(clock):
    with progress.bar(200, "trials") as bar:
        for _ in range(100):
            work(bar, clock, 1.0)
        assert bar.seconds_left == pytest.approx(100, rel=0.05)
        for _ in range(40):
            work(bar, clock, 3.0)  # a neighbour takes the processor
        assert bar.seconds_left == pytest.approx(60 * 3.0, rel=0.05)
        assert f"{bar.format_dict['rate']:.3f}" == f"{1 / 3:.3f}"


def test_before_two_items_nobody_knows(clock):
    with progress.bar(3, "rows") as bar:
        assert bar.seconds_left is None
        work(bar, clock, 9.0)
        assert bar.seconds_left is None
        work(bar, clock, 2.0)
        assert bar.seconds_left == pytest.approx(2.0)
