"""Measure named configurations on draws of their own, and no longer than it takes to tell them apart."""

from collections.abc import Sequence
from typing import Any

from quantdm.metrics.intervals import Interval, paired_interval
from quantdm.metrics.samples import Draw
from quantdm.progress import bar
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Job, job_of
from quantdm.runs.jobs import measure_jobs
from quantdm.runs.run import Run
from quantdm.runs.store import TrialStore

INFLUENCE = "influence"  # of every image on fid_fp; kept with a measurement, no figure of its own
LEVEL = 0.99  # probability with which a difference has to be one before a candidate is left out
Figures = list[dict[str, Any]]


def verify(
    run: Run, engine: Engine, configs: dict[str, dict[str, str | None]], draws: Sequence[Draw], description: str
) -> dict[str, Figures]:
    """Measure named configurations on draws, each once (trials of their own store); return their figures per draw."""
    return race(run, engine, configs, draws, description, groups=())


def race(
    run: Run,
    engine: Engine,
    configs: dict[str, dict[str, str | None]],
    draws: Sequence[Draw],
    description: str,
    *,
    groups: Sequence[Sequence[str]],
    settled: Sequence[Sequence[str]] = (),
) -> dict[str, Figures]:
    """Measure configurations draw after draw; return their figures on the draws that each of them ran.

    After every draw those are left out whose fid_fp is clearly above that of the best of their group, by the paired
    interval over the images of equal noises (racing: Maron & Moore 1994). Groups that are `settled` by their winner
    need no more draws once there is one, those of `groups` run every draw with whoever is left; so does what is in
    none.

    Raises:
        QuantDMError: what a measurement raises.
    """
    store = TrialStore(run.path("verified"))
    records: dict[str, Figures] = {name: [] for name in configs}
    racing = list(configs)
    with bar(len(_distinct(run, configs.items(), draws)), description) as progress:
        # Without groups nobody is left out, and the draws need not wait for each other.
        heats = [[draw] for draw in draws] if groups or settled else [list(draws)]
        for heat in heats:
            jobs = _distinct(run, ((name, configs[name]) for name in racing), heat)
            found = measure_jobs(engine, store, jobs, progress=progress, method="measure_paired")
            for name in racing:
                records[name] += [found[job_of(run, draw, configs[name]).key] for draw in heat]
            over: set[str] = set()
            for group in (*groups, *settled):
                left = {name: records[name] for name in group if name in racing}
                beaten = _beaten(left)
                over.update(left if group in settled and len(left) - len(beaten) == 1 else beaten)
            racing = [name for name in racing if name not in over]
        progress.total = progress.n  # measurements that were not needed are none that are missing
    return {name: [plain(record) for record in rows] for name, rows in records.items()}


def _distinct(run: Run, configs: Any, draws: Sequence[Draw]) -> dict[str, Job]:
    """Return the jobs by key: two candidates may be the same configuration."""
    jobs = [job_of(run, draw, labels) for _, labels in configs for draw in draws]
    return {job.key: job for job in jobs}


def _beaten(records: dict[str, Figures]) -> list[str]:
    """Return which of a group, measured on the same draws, are clearly worse than the best of it."""
    if len(records) < 2:
        return []
    best = min(records, key=lambda name: sum(row["fid_fp"] for row in records[name]))
    return [name for name in records if is_worse(records[name], records[best])]


def is_worse(rows: Figures, others: Figures) -> bool:
    """Tell whether the first fid_fp is clearly above the second; records without influences tell nothing."""
    found = fid_difference(rows, others)
    return found is not None and found.low > 0


def fid_difference(rows: Figures, others: Figures) -> Interval | None:
    """Return the interval of a difference of fid_fp on equal noises; None: the records do not tell influences."""
    if not all(INFLUENCE in row for row in (*rows, *others)):
        return None
    pairs = list(zip(rows, others, strict=True))
    return paired_interval(
        [a["fid_fp"] - b["fid_fp"] for a, b in pairs],
        [[x - y for x, y in zip(a[INFLUENCE], b[INFLUENCE], strict=True)] for a, b in pairs],
        level=LEVEL,
    )


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return a measurement's figures alone."""
    return {key: value for key, value in record.items() if key != INFLUENCE}
