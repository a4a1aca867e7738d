"""The plan of a run's trials as things to do: those that need no labels, and rounds of learned ones behind them."""

from collections.abc import Callable
from typing import Any

import numpy as np

from quantdm.runs.cheap import EVERY, CheapLabels
from quantdm.runs.engines.call import Call
from quantdm.runs.evaluator import job_of
from quantdm.runs.jobs import Item
from quantdm.runs.labelled import allowed, label_draw, label_of, trial_keys
from quantdm.runs.proposals import Proposal, from_text, to_text
from quantdm.runs.rounds import Round, Rounds
from quantdm.runs.run import MIN_TRIALS, Run
from quantdm.runs.store import TrialStore
from quantdm.surrogates import SearchSpace


class TrialPlan:
    """The trials of a run as things to do: those that need no labels, and rounds of learned ones behind them."""

    def __init__(
        self,
        run: Run,
        space: SearchSpace,
        targets: tuple[float, ...],
        proposers: tuple[str, ...],
        progress: Any,
        wanted: int,
        most: Callable[[int], int] | None,
        earlier: dict[str, Any] | None = None,
    ) -> None:
        self.run, self.space, self.targets, self.proposers = run, space, targets, proposers
        self.rounds, self._progress, self._most = Rounds(()), progress, most
        self.total = self._wanted = wanted  # trials that time allows, that are wanted
        self._choices = self._rest = np.zeros((0, len(space.layers)), dtype=np.int64)  # asked for; not yet
        self._y: dict[str, float] = {}
        self._proposal: str | None = None
        self._cheap, self._earlier = None, earlier
        self._trials, self._proposals = TrialStore(run.path("trials")), TrialStore(run.path("proposals"))
        self._there = self._trials.keys()  # what takes no time
        self._free, self._measured = 0, 0  # trials of the plan that took no time, and that took it
        self._waits = False  # time allowed no more

    def keep(self, choices: np.ndarray, y: np.ndarray) -> None:
        """Take over trials that have labels."""
        keys = self._extend(choices)
        self._y |= dict(zip(keys, y.tolist(), strict=True))
        for key in keys:
            self.rounds.label(key)

    def first(self, choices: np.ndarray) -> dict[str, Item]:
        """Return those of the choices [T, L] that time allows as things to do; they need no labels.

        In automatic fidelity all get cheap labels, and few of them full ones.
        """
        if len(choices) and self.run.settings.fidelity == "auto":
            self._cheap = CheapLabels(self.run, self.space)
        self._rest = choices
        now = self._allow()
        keys = self._extend(now)
        if self._cheap is None:
            return self._full(keys, now)
        few = np.arange(len(now)) % EVERY == 0
        self._cheap.ask(keys, now, few)
        return {
            **self._full([k for k, full in zip(keys, few, strict=True) if full], now[few]),
            **self._cheap.items(),
        }

    def _allow(self) -> np.ndarray:
        """Ask how many trials time allows; return which of them need no labels and were not begun yet."""
        if self._most is not None:
            free = self._free + sum(key in self._there for key in trial_keys(self.run, self.space, self._rest))
            self.total = self._progress.total = allowed(self._most, self._wanted, free, self._measured)
        judged = self._cheap is not None and self._cheap.verdict is not None
        room = 0 if judged else max(self.total - len(self.rounds.keys), 0)
        now, self._rest = self._rest[:room], self._rest[room:]
        return now

    def _full(self, keys: list[str], choices: np.ndarray) -> dict[str, Item]:
        draw, found = label_draw(self.run), {}
        for key, choice, bits in zip(keys, choices, self.space.avg_bits(choices).tolist(), strict=True):
            labels = self.space.config(choice).to_labels()
            head = {"config": labels, "avg_bits": bits}
            call = Call("measure", job_of(self.run, draw, labels))
            found[key] = Item(call, self._trials, lambda figures, head=head: {**head, **figures})
        return found

    def follow(self, key: str, record: dict[str, Any]) -> dict[str, Item]:
        """Return what is to be done once a record is there."""
        if key == self._proposal:
            choices = from_text(record["choices"], len(self.space.layers))
            return {**self._full(self._extend(choices), choices), **self.proposed()}
        if self._cheap is not None and self._cheap.owns(key):
            self._cheap.label(key, record)
        else:
            self._y[key] = label_of(record)
            self.rounds.label(key)
            self._measured += key not in self._there
        return {**self._decided(), **self.proposed()}

    def _decided(self) -> dict[str, Item]:
        """Judge the cheap labels once all are there; return what is to be measured in full after all."""
        cheap = self._cheap
        if cheap is None or cheap.verdict is not None or not cheap.complete(self._y):
            return {}
        verdict = cheap.judge(self._y, self.targets)
        if verdict["kept"]:
            start = len(self.rounds.keys)
            left = self._wanted - start - len(self._rest)
            lacking = MIN_TRIALS - (start - len(cheap.only))  # full labels to learn from
            self._wanted = start + min(left, max(left // EVERY, lacking))
            self.total = self._progress.total = self._wanted
            self._free += len(cheap.only)
            self._y |= cheap.translated()
            for key in cheap.only:
                self.rounds.label(key)
            return {}
        rows = [self.rounds.keys.index(key) for key in cheap.only]
        self._progress.total += len(rows)
        return self._full(cheap.only, self._choices[rows])

    def proposed(self) -> dict[str, Item]:
        """Return the question for the next round if it is time to ask it, and time for its trials."""
        if self.rounds.due(self._wanted) is None or (self._waits and self.rounds.labelled < len(self.rounds.keys)):
            return {}
        now = self._allow()
        due = self.rounds.due(self.total)
        self._waits = due is None and not len(now)  # ask again when all labels are there: it may be faster than it was
        if len(now):
            return self._full(self._extend(now), now)
        return {} if due is None else self._question(due)

    def _question(self, due: Round) -> dict[str, Item]:
        self.rounds.ask(due)
        keys, seed = self.rounds.keys[: due.known], self.run.settings.seed
        asked = Proposal(
            space=self.space.digest,
            tried=tuple(to_text(self._choices)),
            y=tuple(self._y[key] for key in keys),
            count=due.count,
            targets=self.targets,
            proposers=self.proposers,
            seed=seed,
            place=seed + 1 + 1000 * due.start,
        )
        self._proposal = asked.key
        return {asked.key: Item(Call("propose", asked), self._proposals, counts=False)}

    def measured(self) -> tuple[np.ndarray, np.ndarray]:
        """Return choices [T, L] and labels [T] of all trials with full labels, in their order."""
        rows = [row for row, key in enumerate(self.rounds.keys) if key not in self._replaced]
        return self._choices[rows], np.array([self._y[self.rounds.keys[row]] for row in rows], dtype=np.float64)

    @property
    def _replaced(self) -> set[str]:
        kept = self._cheap is not None and self._cheap.verdict is not None and self._cheap.verdict["kept"]
        return set(self._cheap.only) if kept and self._cheap is not None else set()

    @property
    def is_cut_short(self) -> bool:
        """Whether time allowed fewer trials than were wanted."""
        return self.total < self._wanted or len(self._rest) > 0

    def record(self) -> dict[str, Any]:
        """Return what trials.json says of them: the keys of full labels, and what was found of the cheap ones."""
        keys = [key for key in self.rounds.keys if key not in self._replaced]
        verdict = self._earlier if self._cheap is None else self._cheap.verdict
        return {"keys": keys, **({} if verdict is None else {"cheap": verdict})}

    def _extend(self, choices: np.ndarray) -> list[str]:
        keys = trial_keys(self.run, self.space, choices)
        self.rounds.extend(keys)
        self._free += sum(key in self._there for key in keys)
        self._choices = np.concatenate([self._choices, choices])
        return keys
