"""How far does a search scale? Ten thousand trials on 1 to 512 workers, with the real store, claims and scheduler.

    PYTHONPATH=. python eval/simulate_scale.py RUN_DIR      # writes eval/results/scale.json

Measured here: what store and claims cost per trial when ten thousand are there, how long listing them takes, and
how long the surrogates take that propose a round; all in processor time of this process, which other programs of the
machine lengthen little (a local disk that is not waited for has hardly any other). Simulated: time. One driver hands
out jobs by `runs.jobs.Work` and `runs.rounds.Rounds`, the code of a real search, on a clock of events; it keeps results
one after the other, at the measured cost. Durations are drawn from the trials of a real run; one job in a hundred takes
ten times as long (stragglers); once an hour a worker loses what it is doing and is away for two minutes (preemption).
Efficiency is the work of all trials, each counted once as it was first drawn, over workers times makespan. `one_by_one`
is the plan before rounds overlapped: batches of 70, each of which waits for the one before.
"""

import argparse
import datetime
import heapq
import json
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from quantdm.allocation.sampling import sample_configs
from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.runs.claims import CLAIMS, Claims
from quantdm.runs.engines.call import Call
from quantdm.runs.evaluator import job_of
from quantdm.runs.jobs import LOOK, Item, Work
from quantdm.runs.labelled import label_draw
from quantdm.runs.proposals import Proposal, answer, to_text
from quantdm.runs.rounds import BATCH, Round, Rounds, next_round
from quantdm.runs.run import MANIFEST, Run
from quantdm.runs.stages import load_space
from quantdm.runs.store import TrialStore
from quantdm.runs.trials import FRONTIER_SHARE, PROPOSERS, RANDOM_SHARE, load_trials

OUT = Path(__file__).resolve().parent / "results" / "scale.json"
TRIALS, WORKERS = 10_000, (1, 2, 8, 32, 64, 128, 256, 512)
SEEDS = 3
TICK = -1  # an event of nobody: who is idle looks whether anything is overdue
STRAGGLERS, SLOWER, PREEMPTED_EVERY, AWAY = 0.01, 10.0, 3600.0, 120.0
LABELLED = (104, 400)  # labels from which the time of a proposal is measured; it is fitted to no more than 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    given = parser.parse_args()
    records = [read_json(path) for path in sorted((given.run_dir / "trials").glob("*.json"))]
    store = {**measure_store(records[0]), "load_all_seconds": measure_loading(given.run_dir, records[0])}
    fits = measure_proposals(given.run_dir)
    seconds = [record["seconds"] for record in records]
    cost = store["put_and_claim_ms"] / 1e3

    def refit(labels: int) -> float:
        return float(np.interp(labels, [*fits], [*fits.values()]))

    plans: dict[str, Callable[[int, int], Round]] = {"rounds": next_round, "one_by_one": one_by_one}
    efficiency = {
        name: {
            str(n): spread([Simulation(n, seconds, cost, refit, plan, seed).run() for seed in range(SEEDS)])
            for n in WORKERS
        }
        for name, plan in plans.items()
    }
    result = {
        "version": 2,
        "store": store,
        "most_trials_per_second_of_one_driver": round(1 / cost),
        "proposal_seconds": fits,
        "trial_seconds": {"mean": sum(seconds) / len(seconds), "max": max(seconds), "trials": len(seconds)},
        "efficiency": efficiency,
        "machine": platform.machine(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(OUT, result)
    print(json.dumps(result, indent=1))


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(values)), 4), "sd": round(float(np.std(values, ddof=1)), 4)}


def one_by_one(start: int, total: int) -> Round:
    return Round(start, start, min(BATCH, total - start))


def measure_store(record: dict) -> dict[str, float]:
    """Return milliseconds per trial and seconds per listing of the real store with TRIALS trials."""
    kept = {key: value for key, value in record.items() if key not in ("version", "key")}
    with tempfile.TemporaryDirectory() as folder:
        store = TrialStore(folder)
        for index in range(TRIALS - 500):
            store.path(f"{index:016x}").write_text(store_text(kept, f"{index:016x}"))
        with Claims(Path(folder) / CLAIMS) as claims:
            start = time.process_time()
            for index in range(TRIALS - 500, TRIALS):
                key = f"{index:016x}"
                assert claims.take(key)
                assert store.get(key) is None
                store.put(key, kept)
                claims.release(key)
            put = (time.process_time() - start) / 500
        start = time.process_time()
        assert len(store) == TRIALS
        names = time.process_time() - start
        start = time.process_time()
        assert sum(1 for _ in store) == TRIALS
        read = time.process_time() - start
    return {"trials": TRIALS, "put_and_claim_ms": 1e3 * put, "count_seconds": names, "read_all_seconds": read}


def measure_loading(run_dir: Path, record: dict) -> float:
    """Return seconds in which a run with TRIALS trials has their choices and labels, each checked to be its own."""
    with tempfile.TemporaryDirectory() as folder:
        for name in (MANIFEST, "space.json"):
            shutil.copy(run_dir / name, folder)
        run = Run.open(folder)
        space, draw, store = load_space(run), label_draw(run), TrialStore(run.path("trials"))
        store.folder.mkdir()
        kept = {key: value for key, value in record.items() if key not in ("version", "key", "config")}
        for choice in np.random.default_rng(0).integers(0, len(space.options), (TRIALS, len(space.layers))):
            labels = space.config(choice).to_labels()
            key = job_of(run, draw, labels).key
            store.path(key).write_text(store_text({**kept, "config": labels}, key))
        start = time.process_time()
        assert len(load_trials(run, space)[1]) == TRIALS
        return time.process_time() - start


def store_text(record: dict, key: str) -> str:
    return json.dumps({"version": 1, "key": key, **record}, indent=1)


def measure_proposals(run_dir: Path) -> dict[int, float]:
    """Return seconds of a proposal by the number of labels, in the space of a run, with planted labels."""
    space, found = load_space(Run.open(run_dir)), {}
    for labels in LABELLED:
        tried = sample_configs(space, labels, seed=labels)
        error = space.gather(space.noise_error, tried).sum(axis=1)
        y = -np.log(error) + np.random.default_rng(0).normal(0, 0.1, labels)
        asked = Proposal(
            space.digest, tuple(to_text(tried)), tuple(y), max(BATCH, labels // 4), (3.0,), PROPOSERS, 0, 1
        )
        start = time.process_time()
        answer(asked, space)
        found[labels] = round(time.process_time() - start, 2)
    return found


class Memory:
    """A store and its claims, in memory."""

    folder = ""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Any]] = {}

    def get(self, key: str) -> dict[str, Any] | None:
        return self.kept.get(key)

    def put(self, key: str, record: dict[str, Any]) -> None:
        self.kept[key] = record

    def keys(self) -> set[str]:
        return set(self.kept)

    def take(self, key: str) -> bool:
        return True

    def release(self, key: str) -> None: ...


class Simulation:
    """One search of TRIALS trials on workers, event by event."""

    def __init__(
        self,
        workers: int,
        seconds: list[float],
        cost: float,
        refit: Callable[[int], float],
        plan: Callable[[int, int], Round],
        seed: int,
    ) -> None:
        self.workers, self.seconds, self.cost, self.refit = workers, seconds, cost, refit
        self.chance, self.now, self.memory = random.Random(1000 * seed + workers), 0.0, Memory()
        first = round(TRIALS * (RANDOM_SHARE + FRONTIER_SHARE))
        self.rounds, self.asked = Rounds([f"t{i}" for i in range(first)], plan), {}
        silent = SimpleNamespace(update=lambda: None)
        self.work = Work(self.memory, silent, self.follow, clock=lambda: self.now)
        self.lengths: dict[str, float] = {}
        self.fresh = False  # whether there is something new to do

    def follow(self, key: str, record: dict[str, Any]) -> dict[str, Item]:
        if key in self.asked:
            asked = self.asked[key]
            keys = [f"t{asked.start + i}" for i in range(asked.count)]
            self.rounds.extend(keys)
            self.fresh = True
            return {**self.items(keys), **self.proposed()}
        self.rounds.label(key)
        return self.proposed()

    def proposed(self) -> dict[str, Item]:
        due = self.rounds.due(TRIALS)
        if due is None:
            return {}
        self.rounds.ask(due)
        self.fresh = True
        key = f"p{due.start}"
        self.asked[key] = due
        return {key: Item(Call("propose", due), self.memory, counts=False)}

    def items(self, keys: list[str]) -> dict[str, Item]:
        return {key: Item(Call("measure", key), self.memory) for key in keys}

    def length(self, key: str) -> float:
        """Return how long one attempt at a job takes."""
        if key in self.asked:
            return self.refit(self.asked[key].known)
        length = self.chance.choice(self.seconds) * (SLOWER if self.chance.random() < STRAGGLERS else 1.0)
        self.lengths.setdefault(key, length)
        return length

    def run(self) -> float:
        """Return the efficiency."""
        work, chance = self.work, self.chance
        work.add(self.items(self.rounds.keys))
        lost = [chance.expovariate(1 / PREEMPTED_EVERY) for _ in range(self.workers)]
        events: list[tuple[float, int, str | None]] = [(0.0, worker, None) for worker in range(self.workers)]
        events.append((LOOK, TICK, None))
        idle: list[int] = []
        driver = 0.0  # until when it is busy with keeping results
        while not work.done:
            self.now, worker, finished = heapq.heappop(events)
            if worker == TICK:
                heapq.heappush(events, (self.now + LOOK, TICK, None))
                if not idle:
                    continue
                worker = idle.pop()
            elif finished is not None:
                if self.now < driver:
                    heapq.heappush(events, (driver, worker, finished))
                    continue
                driver = self.now + self.cost
                work.finish(finished, {})
                if self.fresh:
                    for other in idle:
                        heapq.heappush(events, (self.now, other, None))
                    idle, self.fresh = [], False
            key = work.next()
            if key is None:
                idle.append(worker)
                continue
            end = self.now + self.length(key)
            if end > lost[worker]:  # nobody is told; the job is begun once more when it is overdue
                back = max(lost[worker], self.now) + AWAY
                lost[worker] = back + chance.expovariate(1 / PREEMPTED_EVERY)
                heapq.heappush(events, (back, worker, None))
            else:
                heapq.heappush(events, (end, worker, key))
        return sum(self.lengths.values()) / (self.workers * self.now)


if __name__ == "__main__":
    main()
