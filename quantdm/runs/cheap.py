"""Cheap labels: the teacher-forced error of a whole configuration in place of images, where it ranks as they do.

Every first trial gets one; every EVERY-th gets a full label as well. Where both are known it is measured whether they
rank alike near the target, and better than the size alone does, which is what any figure of a wide space looks like. If
so, a straight line makes full labels of the cheap ones, and all of them train the surrogates; if not, the others are
measured in full as well. Either way trials.json says what was found.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from quantdm.files import digest
from quantdm.runs.engines.call import Call
from quantdm.runs.evaluator import job_of
from quantdm.runs.jobs import Item
from quantdm.runs.labelled import label_draw
from quantdm.runs.run import Run
from quantdm.runs.store import TrialStore
from quantdm.surrogates import SearchSpace
from quantdm.surrogates.ranking import spearman

EVERY = 4  # of so many trials one gets a full label
LEAST_RANK = 0.6  # rank correlation with the full label near the target from which a cheap one is used
NEAR, FEW = 0.75, 12  # bits; trials near the target, below which all of them are judged
LEAST_PAIRS = 12  # trials with both labels from which ranks can be compared
FOLDER = "cheap"


class CheapLabels:
    """The cheap labels of a plan: what is to be measured, and whether it is worth anything."""

    def __init__(self, run: Run, space: SearchSpace) -> None:
        self.run, self.space = run, space
        self.verdict: dict[str, Any] | None = None
        self.only: list[str] = []  # trials that have no other label
        self._store = TrialStore(run.path(FOLDER))
        self._items: dict[str, Item] = {}
        self._of: dict[str, str] = {}  # key of a cheap label -> key of its trial
        self._full: list[str] = []
        self._values: dict[str, float] = {}
        self._bits: dict[str, float] = {}

    def ask(self, keys: Sequence[str], choices: np.ndarray, full: np.ndarray) -> None:
        """Note trials, of which those where `full` is true get full labels as well."""
        draw = label_draw(self.run)
        for key, choice, both in zip(keys, choices, full.tolist(), strict=True):
            bits = float(self.space.avg_bits(choice[None])[0])
            labels = self.space.config(choice).to_labels()
            head = {"config": labels, "avg_bits": bits}
            own = cheap_key(self.run, key)
            call = Call("noise_error", job_of(self.run, draw, labels))
            # one that is not alone does not count: its full label does
            self._items[own] = Item(call, self._store, lambda error, head=head: {**head, **error}, counts=not both)
            self._of[own], self._bits[key] = key, bits
            (self._full if both else self.only).append(key)

    def items(self) -> dict[str, Item]:
        """Return the cheap labels as things to do."""
        return self._items

    def owns(self, key: str) -> bool:
        """Tell whether a key is that of a cheap label."""
        return key in self._of

    def label(self, key: str, record: Mapping[str, Any]) -> None:
        """Keep a cheap label."""
        self._values[self._of[key]] = cheap_of(record)

    def complete(self, y: Mapping[str, float]) -> bool:
        """Tell whether all cheap labels and their full companions are there."""
        return len(self._values) == len(self._of) and all(key in y for key in self._full)

    def judge(self, y: Mapping[str, float], targets: Sequence[float]) -> dict[str, Any]:
        """Measure whether cheap and full labels rank alike; return what is recorded."""
        bits = np.array([self._bits[key] for key in self._full])
        cheap = np.array([self._values[key] for key in self._full])
        full = np.array([y[key] for key in self._full])
        near = np.abs(bits[:, None] - np.array(targets)).min(axis=1) <= NEAR
        rows = near if near.sum() >= FEW else np.ones(len(bits), dtype=bool)
        rank, null = spearman(cheap[rows], full[rows]), spearman(bits[rows], full[rows])
        slope, offset = np.polyfit(cheap, full, 1)
        self.verdict = {
            "fidelity": "noise error",
            "rank_correlation": round(float(rank), 4),
            "average_bits": round(float(null), 4),
            "pairs": int(rows.sum()),
            "kept": bool(len(full) >= LEAST_PAIRS and rank >= LEAST_RANK and rank > null and slope > 0),
            "line": [float(slope), float(offset)],
            "trials": len(self.only),
        }
        return self.verdict

    def translated(self) -> dict[str, float]:
        """Return the labels of trials that have no other, in the unit of full ones."""
        assert self.verdict is not None
        slope, offset = self.verdict["line"]
        return {key: slope * self._values[key] + offset for key in self.only}


def cheap_key(run: Run, key: str) -> str:
    """Return the key of the cheap label of a trial."""
    steps = run.settings.noise_steps
    return digest("noise error", key, run.settings.noise_images, *([] if steps is None else [steps]))


def cheap_of(record: Mapping[str, Any]) -> float:
    """Return -log of a noise error: larger is better, as of `label_of`."""
    return -float(np.log(max(record["noise_error"], 1e-9)))


def told(verdict: Mapping[str, Any]) -> str:
    """Return in one line what was found of cheap labels."""
    return (
        f"{verdict['fidelity']}: rank correlation with fid_fp {verdict['rank_correlation']:.2f} on {verdict['pairs']} "
        f"trials (average bits {verdict['average_bits']:.2f}); "
        + (f"stands for the full label of {verdict['trials']} trials" if verdict["kept"] else "dropped")
    )
