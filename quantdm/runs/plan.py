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
from quantdm.runs.rounds import Rounds
from quantdm.runs.run import Run
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
        counts: tuple[int, int, int],
        most: Callable[[int], int] | None,
        fidelity: str = "full",
    ) -> None:
        self.run, self.space, self.targets, self.proposers = run, space, targets, proposers
        self.rounds, self._progress, self._most = Rounds(()), progress, most
        self.total, self._wanted, self._free = counts  # trials that time allows, that are wanted, that take no time
        self._choices = np.zeros((0, len(space.layers)), dtype=np.int64)
        self._y: dict[str, float] = {}
        self._proposal: str | None = None
        self._cheap = CheapLabels(run, space) if fidelity == "auto" else None
        self._trials, self._proposals = TrialStore(run.path("trials")), TrialStore(run.path("proposals"))

    def keep(self, choices: np.ndarray, y: np.ndarray) -> None:
        """Take over trials that have labels."""
        keys = self._extend(choices)
        self._y |= dict(zip(keys, y.tolist(), strict=True))
        for key in keys:
            self.rounds.label(key)

    def first(self, choices: np.ndarray) -> dict[str, Item]:
        """Return choices [T, L] that need no labels as things to do; with cheap labels few of them get full ones."""
        keys = self._extend(choices)
        if self._cheap is None:
            return self._full(keys, choices)
        few = np.arange(len(choices)) % EVERY == 0
        self._cheap.ask(keys, choices, few)
        return {
            **self._full([k for k, full in zip(keys, few, strict=True) if full], choices[few]),
            **self._cheap.items(),
        }

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
        return {**self._decided(), **self.proposed()}

    def _decided(self) -> dict[str, Item]:
        """Judge the cheap labels once all are there; return what is to be measured in full after all."""
        cheap = self._cheap
        if cheap is None or cheap.verdict is not None or not cheap.complete(self._y):
            return {}
        verdict = cheap.judge(self._y, self.targets)
        if verdict["kept"]:
            start = len(self.rounds.keys)
            self.total = self._wanted = self._progress.total = start + (self._wanted - start) // EVERY
            self._y |= cheap.translated()
            for key in cheap.only:
                self.rounds.label(key)
            return {}
        rows = [self.rounds.keys.index(key) for key in cheap.only]
        self._progress.total += len(rows)
        return self._full(cheap.only, self._choices[rows])

    def proposed(self) -> dict[str, Item]:
        """Return the question for the next round if it is time to ask it, and time for its trials."""
        if self.rounds.due(self.total) is None:
            return {}
        measured = max(self.rounds.labelled - self._free, 0)
        self.total = self._progress.total = allowed(self._most, self._wanted, self._free, measured)
        due = self.rounds.due(self.total)
        if due is None:
            return {}
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
        return self.total < self._wanted

    def record(self) -> dict[str, Any]:
        """Return what trials.json says of them: the keys of full labels, and what was found of the cheap ones."""
        keys = [key for key in self.rounds.keys if key not in self._replaced]
        cheap = {} if self._cheap is None or self._cheap.verdict is None else {"cheap": self._cheap.verdict}
        return {"keys": keys, **cheap}

    def _extend(self, choices: np.ndarray) -> list[str]:
        keys = trial_keys(self.run, self.space, choices)
        self.rounds.extend(keys)
        self._choices = np.concatenate([self._choices, choices])
        return keys
