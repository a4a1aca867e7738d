"""How far does a search scale? Ten thousand trials on 1 to 512 workers, with the real store, claims and plan of trials.

    PYTHONPATH=. python eval/simulate_scale.py RUN_DIR      # writes eval/results/scale.json

Measured here: what the store and the claims cost per trial when ten thousand are there, and how long listing them
takes. Simulated: workers that take trials in order, with durations drawn from the trials of a real run, stragglers (one
in a hundred takes ten times as long), preemption (once an hour a worker loses what it is doing and is away for two
minutes), and the plan of `run_trials`: first the trials that need no labels, then learned batches, each of which waits
for the one before. Efficiency is the work of all trials over workers times makespan.
"""

import argparse
import datetime
import heapq
import json
import platform
import random
import tempfile
import time
from pathlib import Path

from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.runs.claims import CLAIMS, Claims
from quantdm.runs.store import TrialStore
from quantdm.runs.trials import BATCH, FRONTIER_SHARE, RANDOM_SHARE

OUT = Path(__file__).resolve().parent / "results" / "scale.json"
TRIALS, WORKERS = 10_000, (1, 2, 8, 32, 64, 128, 256, 512)
STRAGGLERS, SLOWER, PREEMPTED_EVERY, AWAY = 0.01, 10.0, 3600.0, 120.0
REFIT = 10.0  # seconds between two learned batches: the surrogates that propose are fitted in one process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    given = parser.parse_args()
    records = [read_json(path) for path in sorted((given.run_dir / "trials").glob("*.json"))]
    store = measure_store(records[0])
    seconds = [record["seconds"] for record in records]
    plans = {f"batches of {BATCH}": lambda _: BATCH, "batches of 4 per worker": lambda workers: max(BATCH, 4 * workers)}
    result = {
        "version": 1,
        "store": store,
        "trial_seconds": {"mean": sum(seconds) / len(seconds), "max": max(seconds), "trials": len(seconds)},
        "efficiency": {
            name: {str(n): simulate(n, seconds, batch(n), store["put_and_claim_ms"] / 1e3) for n in WORKERS}
            for name, batch in plans.items()
        },
        "machine": platform.machine(),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(OUT, result)
    print(result)


def measure_store(record: dict) -> dict[str, float]:
    """Return milliseconds per trial and seconds per listing of the real store with TRIALS trials."""
    kept = {key: value for key, value in record.items() if key not in ("version", "key")}
    with tempfile.TemporaryDirectory() as folder:
        store = TrialStore(folder)
        for index in range(TRIALS - 500):
            store.path(f"{index:016x}").write_text(store_text(kept, f"{index:016x}"))
        with Claims(Path(folder) / CLAIMS) as claims:
            start = time.perf_counter()
            for index in range(TRIALS - 500, TRIALS):
                key = f"{index:016x}"
                assert claims.take(key)
                assert store.get(key) is None
                store.put(key, kept)
                claims.release(key)
            put = (time.perf_counter() - start) / 500
        start = time.perf_counter()
        assert len(store) == TRIALS
        names = time.perf_counter() - start
        start = time.perf_counter()
        assert sum(1 for _ in store) == TRIALS
        read = time.perf_counter() - start
    return {"trials": TRIALS, "put_and_claim_ms": 1e3 * put, "count_seconds": names, "read_all_seconds": read}


def store_text(record: dict, key: str) -> str:
    return json.dumps({"version": 1, "key": key, **record}, indent=1)


def simulate(workers: int, seconds: list[float], batch: int, overhead: float) -> float:
    """Return the efficiency of TRIALS trials on workers, the learned ones in batches."""
    chance = random.Random(workers)
    first = round(TRIALS * (RANDOM_SHARE + FRONTIER_SHARE))
    sizes = [first]
    while sum(sizes) < TRIALS:
        sizes.append(min(batch, TRIALS - sum(sizes)))
    now, work = 0.0, 0.0
    preempted = [chance.expovariate(1 / PREEMPTED_EVERY) for _ in range(workers)]
    for number, size in enumerate(sizes):
        start = now + (REFIT if number else 0.0)
        free = [(start, worker) for worker in range(workers)]
        heapq.heapify(free)
        ends = []
        for _ in range(size):
            length = chance.choice(seconds) * (SLOWER if chance.random() < STRAGGLERS else 1.0)
            work += length
            at, worker = heapq.heappop(free)
            end = at + length + overhead
            while end > preempted[worker]:  # what it did is lost; it does it again, here, when it is back
                at = max(at, preempted[worker]) + AWAY
                preempted[worker] = at + chance.expovariate(1 / PREEMPTED_EVERY)
                end = at + length + overhead
            ends.append(end)
            heapq.heappush(free, (end, worker))
        now = max(ends)
    return round(work / (workers * now), 4)


if __name__ == "__main__":
    main()
