"""Measure named configurations on draws of their own."""

from collections.abc import Sequence
from typing import Any

from quantdm.metrics.samples import Draw
from quantdm.progress import bar
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import job_of
from quantdm.runs.jobs import measure_jobs
from quantdm.runs.run import Run
from quantdm.runs.store import TrialStore

# -------------------------------------------------------------------------------------------- selection, verification


def verify(
    run: Run, engine: Engine, configs: dict[str, dict[str, str | None]], draws: Sequence[Draw], description: str
) -> dict[str, list[dict[str, Any]]]:
    """Measure named configurations on draws, each once (trials of their own store); return their figures per draw."""
    store = TrialStore(run.path("verified"))
    jobs = {(name, draw): job_of(run, draw, labels) for name, labels in configs.items() for draw in draws}
    distinct = {job.key: job for job in jobs.values()}  # two candidates may be the same configuration
    with bar(len(distinct), description) as progress:
        found = measure_jobs(engine, store, distinct, progress=progress)
    return {name: [found[jobs[name, draw].key] for draw in draws] for name in configs}
