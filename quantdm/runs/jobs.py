"""Measure jobs that are kept in a store: each once, by whichever process of those that share the store is free."""

import contextlib
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from quantdm.runs.claims import CLAIMS, Claims
from quantdm.runs.engines.call import Call
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Job
from quantdm.runs.store import TrialStore

LOOK = 0.5  # seconds between two looks at what other processes have finished
# A job that takes so many times what is usual, and so many seconds, is begun once more, in case its worker hangs or
# its machine is slow: the second while there are others to begin, the first when there are none.
IDLE, BUSY, LEAST = 1.5, 3.0, 5.0
UNKNOWN = 3600.0  # seconds where nobody knows what is usual
RECENT = 64  # durations of which the usual one is taken
Record = dict[str, Any]


class Store(Protocol):
    """Where finished records are kept."""

    def get(self, key: str) -> Record | None:
        """Return what was put, or None."""
        ...

    def put(self, key: str, record: Record) -> None:
        """Keep a finished record."""
        ...

    def keys(self) -> set[str]:
        """Return the keys of all that is kept."""
        ...


class Taker(Protocol):
    """Decides which process works on what."""

    def take(self, key: str) -> bool:
        """Claim a key; False if another living process has it."""
        ...

    def release(self, key: str) -> None:
        """Give a claim back."""
        ...


@dataclass(frozen=True)
class Item:
    """Something to be done: the call that does it and the store that keeps its record.

    `counts` says whether it is one of those that the progress bar counts; what does not count comes first, since others
    follow from it.
    """

    call: Call
    store: Store
    record_of: Callable[[Record], Record] = lambda result: result
    counts: bool = True


Follow = Callable[[str, Record], Mapping[str, Item]]


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
    items = {
        key: Item(Call(method, job), store, lambda result, key=key: record_of(key, result)) for key, job in jobs.items()
    }
    found = work_through(engine, items, progress=progress, claims=claims or Claims(Path(store.folder) / CLAIMS))
    return {key: found[key] for key in jobs}


def work_through(
    engine: Engine, items: Mapping[str, Item], *, progress: Any, claims: Claims, follow: Follow | None = None
) -> dict[str, Record]:
    """Return the record of every item by its key, and of every item that `follow` adds when a record is there.

    Raises:
        QuantDMError: what a call raised.
    """
    work = Work(claims, progress, follow or (lambda *_: {}))
    work.add(items)
    work.look()
    if work.done:
        return work.found
    # Full-precision samples: once, before several workers want them.
    draws = dict.fromkeys(item.call.argument.draw for item in work.missing() if isinstance(item.call.argument, Job))
    for _ in engine.map("prepare", list(draws)):
        pass
    method = next((item.call.method for item in items.values() if item.counts), "measure")
    with claims:
        while not work.done:
            handed: list[str] = []
            at_most = len(work.missing()) if follow is None else None
            free = work.free(method, handed)
            with contextlib.closing(engine.map(method, free, at_most=at_most, until=work.is_over)) as results:
                for index, result in results:
                    work.finish(handed[index], result)
                    if work.done:  # what is measured twice, here or elsewhere, is not waited for
                        break
            if not work.done and not work.look():
                time.sleep(LOOK)  # others are at what is left
        for folder in {Path(item.store.folder) for item in items.values() if isinstance(item.store, TrialStore)}:
            claims.sweep(folder, ".*.tmp")
    return work.found


class Work:
    """What is found, running and waiting of some items; several threads of an engine may ask for the next one.

    Args:
        claims: decide which process works on what.
        progress: is told of every record that counts.
        follow: returns what is to be done once a record is there.
        clock: seconds; durations are differences of its times.
    """

    def __init__(
        self,
        claims: Taker,
        progress: Any,
        follow: Follow,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.found: dict[str, Record] = {}
        self._claims, self._progress, self._follow, self._clock = claims, progress, follow, clock
        self._items: dict[str, Item] = {}
        self._waiting: deque[str] = deque()
        self._begun: dict[str, float] = {}  # running here or elsewhere -> when it was last begun, or first seen
        self._first: dict[str, float] = {}  # begun here -> when for the first time
        self._refused: dict[str, float] = {}  # claimed by others -> when that was last looked at
        self._own: set[str] = set()  # of these, begun here
        self._took: dict[str, deque[float]] = {}  # method -> recent durations
        self._usual: dict[str, float | None] = {}
        self._looked = -LOOK
        self._lock = threading.RLock()

    @property
    def done(self) -> bool:
        """Whether every item has its record, and every item that follows from it."""
        with self._lock:
            return len(self.found) == len(self._items)

    def is_over(self) -> bool:
        """Look whether others have finished what is left; tell whether everything has its record."""
        with self._lock:
            if not self.done and self._clock() - self._looked >= LOOK:
                self.look()
            return self.done

    def missing(self) -> list[Item]:
        """Return the items without records."""
        return [item for key, item in self._items.items() if key not in self.found]

    def add(self, items: Mapping[str, Item]) -> None:
        """Add items behind those that wait; what does not count goes before them."""
        with self._lock:
            for key, item in items.items():
                if key not in self._items:
                    self._items[key] = item
                    self._waiting.append(key) if item.counts else self._waiting.appendleft(key)

    def free(self, method: str, handed: list[str]) -> Iterator[Any]:
        """Yield arguments of `method` as workers ask for them (of others as `Call`); their keys go to `handed`.

        It ends when there is nothing that this process may do. While something is running here that others may follow
        from, or that may have to be begun once more, it yields None: ask again.
        """
        while not self.is_over():
            with self._lock:
                key = self.next()
                if key is None and not self._own:
                    return
                if key is not None:
                    handed.append(key)
            call = None if key is None else self._items[key].call
            yield call.argument if call is not None and call.method == method else call

    def next(self) -> str | None:
        """Return the key of what is to be done next, or None if there is nothing now."""
        with self._lock:
            key = self._overdue(BUSY) or self._take() or self._overdue(IDLE)
            if key is not None:
                self._begun[key] = self._clock()
                self._first.setdefault(key, self._begun[key])
                self._own.add(key)
            return key

    def finish(self, key: str, result: Record) -> None:
        """Keep a result that was measured here; the first one of a key counts."""
        with self._lock:
            if key in self.found:
                return
            item = self._items[key]
            record = item.store.get(key)
            if record is None:
                item.store.put(key, item.record_of(result))
                record = item.store.get(key)  # of what two put at once, on unlike machines, the first counts for both
                assert record is not None
                took = self._took.setdefault(item.call.method, deque(maxlen=RECENT))
                took.append(self._clock() - self._first[key])
                self._usual[item.call.method] = statistics.median(took) if len(took) > 2 else None
            self._keep(key, record)

    def look(self) -> int:
        """Take over what lies in the stores, and return how much that is."""
        with self._lock:
            self._looked, before = self._clock(), len(self.found)
            while True:
                stores = {id(self._items[key].store): self._items[key].store for key in self._open()}
                there = {place: store.keys() for place, store in stores.items()}
                taken = len(self.found)
                for key in self._open():
                    item = self._items[key]
                    if key in there.get(id(item.store), ()) and (record := item.store.get(key)) is not None:
                        self._keep(key, record)
                if len(self.found) == taken:  # what followed was looked for as well
                    return taken - before

    def _open(self) -> list[str]:
        return [key for key in self._items if key not in self.found]

    def _keep(self, key: str, record: Record) -> None:
        self.found[key] = record
        self._begun.pop(key, None)
        if key in self._own:
            self._own.discard(key)
            self._claims.release(key)
        if self._items[key].counts:
            self._progress.update()
        self.add(self._follow(key, record))

    def _take(self) -> str | None:
        """Return what nobody has begun, or whose holder is gone."""
        for _ in range(len(self._waiting)):
            key = self._waiting.popleft()
            if key in self.found:
                continue
            if self._clock() - self._refused.get(key, -LOOK) < LOOK:
                self._waiting.append(key)
                continue
            if not self._claims.take(key):
                self._refused[key] = self._clock()
                self._begun.setdefault(key, self._clock())
                self._waiting.append(key)
                continue
            record = self._items[key].store.get(key)
            if record is None:
                return key
            self._keep(key, record)  # finished by another between the two looks
            self._claims.release(key)
        return None

    def _overdue(self, times: float) -> str | None:
        """Return what takes `times` as long as usual."""
        now = self._clock()
        late = [key for key, begun in self._begun.items() if now - begun > self._limit(key, times)]
        return min(late, key=self._begun.__getitem__) if late else None

    def _limit(self, key: str, times: float) -> float:
        usual = self._usual.get(self._items[key].call.method)
        return UNKNOWN if usual is None else max(LEAST, times * usual)
