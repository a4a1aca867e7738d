"""Rounds and their scheduler: proposals depend neither on workers nor on timing, and nobody waits for stragglers."""

import random
import threading
import time

import pytest

from quantdm.metrics.samples import Draw
from quantdm.runs.claims import Claims
from quantdm.runs.engines.call import Call
from quantdm.runs.engines.local import LEAST_PATIENCE, Engine
from quantdm.runs.jobs import BUSY, IDLE, LOOK, Item, Work, work_through
from quantdm.runs.rounds import ENOUGH, Rounds, next_round
from quantdm.runs.run import Run
from quantdm.runs.store import TrialStore
from tests.test_claims import Bar


class Memory:
    """A store and its claims, in memory."""

    def __init__(self, taken=()):
        self.kept, self.taken = {}, set(taken)

    def get(self, key):
        return self.kept.get(key)

    def put(self, key, record):
        self.kept[key] = record

    def keys(self):
        return set(self.kept)

    def take(self, key):
        return key not in self.taken

    def release(self, key):
        self.taken.discard(key)


class Search:
    """A search whose labels are planted and whose proposals are a function of the labels that they follow from."""

    def __init__(self, store, first, total):
        self.store, self.total, self.rounds = store, total, Rounds([f"0-{i}" for i in range(first)])
        self.asked, self.labels = {}, {}

    def items(self, keys):
        return {key: Item(Call("measure", key), self.store) for key in keys}

    def follow(self, key, record):
        if key in self.asked:
            fresh = [f"{record['seen']}-{i}" for i in range(self.asked[key].count)]
            self.rounds.extend(fresh)
            return {**self.items(fresh), **self.proposed()}
        self.labels[key] = record["y"]
        self.rounds.label(key)
        return self.proposed()

    def proposed(self):
        due = self.rounds.due(self.total)
        if due is None:
            return {}
        self.rounds.ask(due)
        seen = sum(self.labels[key] for key in self.rounds.keys[: due.known])
        self.asked[f"p{due.start}"] = due
        return {f"p{due.start}": Item(Call("propose", seen), self.store, counts=False)}


def walk(workers, seed, first=200, total=900):
    """Walk through a search with workers that take random times; return its trials, and when workers found nothing."""
    chance, now = random.Random(seed), [0.0]
    search = Search(Memory(), first, total)
    work = Work(search.store, Bar(), search.follow, clock=lambda: now[0])
    work.add(search.items(search.rounds.keys))
    running, idle = [], 0
    while not work.done:
        while len(running) < workers and (key := work.next()) is not None:
            running.append((now[0] + chance.uniform(1, 2) * (30 if chance.random() < 0.02 else 1), key))
        idle += workers - len(running)
        running.sort()
        now[0], key = running.pop(0)
        call = work._items[key].call
        work.finish(key, {"seen": call.argument} if call.method == "propose" else {"y": len(key) + int(key[-1])})
    return search.rounds.keys, idle, now[0]


def test_what_is_proposed_depends_neither_on_workers_nor_on_timing():
    alone, idle, _ = walk(1, 0)
    assert idle == 0
    assert len(alone) == len(set(alone)) == 900
    assert all(walk(workers, seed)[0] == alone for workers in (2, 7, 24) for seed in range(3))


def test_many_workers_find_work_although_some_jobs_take_thirty_times_as_long():
    _, _, one = walk(1, 5, first=2600, total=4000)
    _, _, many = walk(64, 5, first=2600, total=4000)
    assert one / many / 64 > 0.85


def test_rounds_grow_overlap_and_fill_the_total():
    start, known = 104, []
    while start < 10_000:
        found = next_round(start, 10_000)
        known.append(found.known)
        assert found.start == start
        assert start - max(start // 4, 7) <= found.known <= start - start // 16
        assert found.known >= min(ENOUGH, start - start // 16)
        start += found.count
    assert start == 10_000
    assert len(known) < 25
    assert next_round(104, 160).count == 56


def test_a_job_that_takes_too_long_is_begun_once_more_and_the_first_result_counts():
    now, store = [0.0], Memory(taken={"theirs"})
    work = Work(store, Bar(), lambda *_: {}, clock=lambda: now[0])
    work.add({key: Item(Call("measure", key), store) for key in ("a", "b", "c", "late", "theirs", "d", "e")})
    for key in ("a", "b", "c"):
        assert work.next() == key
        now[0] += 10
        work.finish(key, {"y": 1})
    assert work.next() == "late"
    assert work.next() == "d"  # what another process has claimed is passed over
    now[0] += 10 * IDLE + 1
    assert work.next() == "e"  # while there is something to begin, patience is longer
    assert {work.next(), work.next(), work.next()} == {"late", "d", "theirs"}
    assert work.next() is None
    now[0] += 10 * BUSY + 1
    work.finish("late", {"y": 2})
    work.finish("late", {"y": 3})
    assert store.kept["late"] == {"y": 2}
    store.put("theirs", {"y": 4})
    work.look()
    work.finish("theirs", {"y": 5})
    assert work.found["theirs"] == store.kept["theirs"] == {"y": 4}
    for key in ("d", "e"):
        work.finish(key, {"y": 1})
    assert work.done


def test_what_hangs_in_the_end_is_not_waited_for(finished, dit, tmp_path, monkeypatch):
    from quantdm.pipelines.subject import look_at
    from quantdm.runs import jobs

    monkeypatch.setattr(jobs, "LEAST", 0.5)
    store = TrialStore(tmp_path / "t")
    with Engine(Run.open(finished[0]), look_at(dit), workers=2) as engine:
        items = {f"k{i}": Item(Call("prepare", Draw(70 + i, 2, 1)), store, lambda _: {"y": 1.0}) for i in range(8)}

        def stop_one():
            while len(store.keys()) < 4:
                time.sleep(0.02)
            engine._processes[0].send_signal(19)  # it hangs, perhaps with a job

        stopper = threading.Thread(target=stop_one)
        stopper.start()
        found = work_through(engine, items, progress=Bar(), claims=Claims(tmp_path / "claims"))
        stopper.join()
    assert set(found) == set(items)


def test_what_another_driver_has_finished_is_not_waited_for(finished, dit, tmp_path):
    from quantdm.pipelines.subject import look_at

    store = TrialStore(tmp_path / "t")
    items = {f"k{i}": Item(Call("prepare", Draw(80 + i, 2, 1)), store, lambda _: {"y": 1.0}) for i in range(6)}
    with Engine(Run.open(finished[0]), look_at(dit), workers=2) as engine:

        def hang_while_another_finishes():
            while len(store.keys()) < 2:
                time.sleep(0.02)
            for process in engine._processes:
                process.send_signal(19)
            for key in items:
                store.put(key, {"y": 1.0})

        other = threading.Thread(target=hang_while_another_finishes)
        other.start()
        start = time.monotonic()
        found = work_through(engine, items, progress=Bar(), claims=Claims(tmp_path / "claims"))
        other.join()
    assert set(found) == set(items)
    assert time.monotonic() - start < LEAST_PATIENCE / 4  # workers that hang are noticed later


def test_what_others_have_claimed_is_looked_at_twice_a_second(tmp_path):
    class Counted(Memory):
        asked = 0

        def take(self, key):
            self.asked += 1
            return super().take(key)

    now, store = [0.0], Counted(taken={"a", "b", "c"})
    work = Work(store, Bar(), lambda *_: {}, clock=lambda: now[0])
    work.add({key: Item(Call("measure", key), store) for key in "abc"})
    for _ in range(40):
        assert work.next() is None
        now[0] += LOOK / 10
    assert store.asked <= 3 * 5


@pytest.mark.parametrize("labels", [20, 300])
def test_a_round_waits_for_the_labels_that_it_follows_from_and_for_no_other(labels):
    rounds = Rounds([str(i) for i in range(labels)])
    needed = next_round(labels, 2 * labels).known
    for i in reversed(range(1, labels)):
        rounds.label(str(i))
    assert rounds.due(2 * labels) is None
    rounds = Rounds([str(i) for i in range(labels)])
    for i in range(needed):
        assert rounds.due(2 * labels) is None
        rounds.label(str(i))
    due = rounds.due(2 * labels)
    assert due is not None
    rounds.ask(due)
    assert rounds.due(2 * labels) is None
