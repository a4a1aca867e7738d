"""Measure jobs that are kept in a store: each once, by whichever process of those that share the store is free."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quantdm.runs.claims import CLAIMS, Claims
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Job
from quantdm.runs.store import TrialStore

LOOK = 0.5  # seconds between two looks at what other processes have finished
Record = dict[str, Any]


def measure_jobs(
    engine: Engine,
    store: TrialStore,
    jobs: Mapping[str, Job],
    *,
    progress: Any,
    record_of: Callable[[str, Record], Record] = lambda key, result: result,
    claims: Claims | None = None,
    method: str = "measure",
) -> dict[str, Record]:
    """Return the record of every job by its key: from the store, measured here, or by another process meanwhile.

    Args:
        engine: measures.
        store: where finished records are kept; processes with the same store share the work.
        jobs: key -> job.
        progress: a progress bar of len(jobs).
        record_of: makes the record that is kept of a key and its figures.
        claims: of this process (None: with the usual lease).
        method: of `Evaluator`, that measures.

    Raises:
        QuantDMError: what a job raised; what others have claimed is theirs.
    """
    work = _Work(store, jobs, claims or Claims(Path(store.folder) / CLAIMS), progress)
    work.look(list(jobs))
    missing = work.missing
    if not missing:
        return work.ordered()
    # Full-precision samples: once, before several workers want them.
    for _ in engine.map("prepare", list(dict.fromkeys(jobs[key].draw for key in missing))):
        pass
    with work.claims:
        while work.missing:
            keys: list[str] = []
            for index, result in engine.map(method, work.free(keys), at_most=len(work.missing)):
                record = record_of(keys[index], result)
                store.put(keys[index], record)
                work.keep(keys[index], record)
                work.claims.release(keys[index])
            if not keys and not work.look(work.missing):
                time.sleep(LOOK)  # others are at what is left
        work.claims.sweep(Path(store.folder), ".*.tmp")
    return work.ordered()


@dataclass
class _Work:
    """What is found and what is missing of some jobs."""

    store: TrialStore
    jobs: Mapping[str, Job]
    claims: Claims
    progress: Any
    found: dict[str, Record] = field(default_factory=dict)

    @property
    def missing(self) -> list[str]:
        return [key for key in self.jobs if key not in self.found]

    def keep(self, key: str, record: Record) -> None:
        self.found[key] = record
        self.progress.update()

    def look(self, keys: list[str]) -> int:
        """Take over what lies in the store, and return how many that are."""
        records = {key: self.store.get(key) for key in keys}
        for key, record in records.items():
            if record is not None:
                self.keep(key, record)
        return sum(record is not None for record in records.values())

    def free(self, keys: list[str]) -> Iterator[Job]:
        """Yield the jobs that this process could claim, one at a time as workers ask; their keys go into `keys`."""
        for key in self.missing:
            if self.claims.take(key):
                if self.look([key]):  # finished by another between the two looks
                    self.claims.release(key)
                else:
                    keys.append(key)
                    yield self.jobs[key]

    def ordered(self) -> dict[str, Record]:
        return {key: self.found[key] for key in self.jobs}
