"""Measuring stops where the images of equal noises have told candidates apart, and not before."""

import math

import numpy as np
import pytest
import torch

from quantdm import QuantDMError
from quantdm.metrics.intervals import bootstrap_interval, paired_interval
from quantdm.metrics.samples import Draw
from quantdm.runs.run import Run
from quantdm.runs.verify import fid_difference, race, verify

IMAGES = 200
DRAWS = [Draw(7 + i, IMAGES, 2) for i in range(3)]
TRUTH = {"best": 1.0, "twin": 1.001, "worse": 1.5, "baseline: a": 3.0, "baseline: b": 4.0, "alone": 9.0}
CONFIGS: dict = {name: {"layer": f"uniform-channel-{bits}"} for bits, name in enumerate(TRUTH, 2)}
GROUPS = (("best", "twin", "worse"), ("baseline: a", "baseline: b"))


class Planted:
    """An engine whose figures are planted: a truth, and noise of images that is mostly shared by all configurations."""

    def __init__(self):
        self.measured = []

    def map(self, method, arguments, *, at_most=None, until=None):
        for index, job in enumerate(arguments):
            if method == "prepare":
                continue
            name = next(n for n, labels in CONFIGS.items() if labels == job.labels)
            self.measured.append((name, job.draw))
            noise = np.random.default_rng(job.draw.base_seed).normal(0, 2.0, IMAGES)
            own = np.random.default_rng([job.draw.base_seed, [*TRUTH].index(name)]).normal(0, 0.3, IMAGES)
            each = noise + own
            yield index, {"fid_fp": TRUTH[name] + each.mean(), "influence": (each - each.mean()).tolist()}


@pytest.fixture
def planted(finished, tmp_path):
    return Run(tmp_path, Run.open(finished[0]).settings), Planted()


def test_what_is_clearly_worse_stops_and_what_is_not_runs_every_draw(planted):
    run, engine = planted
    found = race(run, engine, CONFIGS, DRAWS, "race", groups=GROUPS)
    assert {name: len(rows) for name, rows in found.items()} == {
        "best": 3, "twin": 3, "worse": 1, "baseline: a": 3, "baseline: b": 1, "alone": 3,
    }  # fmt: skip
    assert all(set(row) == {"fid_fp"} for rows in found.values() for row in rows)
    assert len(engine.measured) == len(set(engine.measured)) == 14
    assert race(run, engine, CONFIGS, DRAWS, "race", groups=GROUPS) == found
    assert len(engine.measured) == 14  # nothing is measured twice


def test_a_group_that_only_its_winner_is_asked_of_stops_once_there_is_one(planted):
    run, engine = planted
    settled = ([*GROUPS[1]], ["alone"], ["best", "twin"])
    found = race(run, engine, CONFIGS, DRAWS, "race", groups=[["worse"]], settled=settled)
    assert {name: len(rows) for name, rows in found.items()} == {
        "best": 3, "twin": 3,  # nobody knows which of them
        "worse": 3,  # the last of a group whose figures are wanted
        "baseline: a": 1, "baseline: b": 1, "alone": 1,
    }  # fmt: skip
    assert len(engine.measured) == 12


def test_without_groups_everything_is_measured_and_what_a_race_measured_counts(planted):
    run, engine = planted
    race(run, engine, CONFIGS, DRAWS, "race", groups=GROUPS)
    found = verify(run, engine, CONFIGS, DRAWS, "verify")
    assert {len(rows) for rows in found.values()} == {3}
    assert len(engine.measured) == 18


def test_the_best_is_hardly_ever_left_out():
    """Of 400 races of equals at 99 % a fair one leaves out few."""
    rng, left_out = np.random.default_rng(0), 0
    for _ in range(400):
        a, b = (rng.normal(0, 1, (2, IMAGES)) for _ in range(2))
        rows = [[{"fid_fp": x.mean(), "influence": (x - x.mean()).tolist()} for x in side] for side in (a, b)]
        left_out += fid_difference(*rows).clear
    assert left_out <= 12


def test_records_without_influences_tell_nothing():
    assert fid_difference([{"fid_fp": 1.0}], [{"fid_fp": 9.0, "influence": [0.0, 1.0]}]) is None


def test_the_interval_is_that_of_a_mean_and_of_the_paired_bootstrap():
    x = torch.randn(400, generator=torch.Generator().manual_seed(1)).double() + 0.2
    found = paired_interval([x.mean().item()], [(x - x.mean()).tolist()])
    half = 1.9659 * x.std().item() / math.sqrt(400)  # t quantile, 399 degrees of freedom
    assert (found.low, found.high) == pytest.approx((x.mean().item() - half, x.mean().item() + half), abs=1e-4)
    resampled = bootstrap_interval(lambda index: x[index[0]].mean().item(), [400])
    assert found.low == pytest.approx(resampled.low, abs=0.02)
    with pytest.raises(QuantDMError, match="as many draws"):
        paired_interval([1.0, 2.0], [[0.1, 0.2]])
