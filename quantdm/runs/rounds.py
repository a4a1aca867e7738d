"""Rounds: trials in their order, of which the later ones are proposed from labels of the earlier ones.

What is proposed depends on the settings and on labels by their place in the order, never on who measured what when. So
that nobody waits, a round follows from what lies a stretch behind it: while that stretch is measured, the surrogates
are fitted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

BATCH = 70  # learned trials that are proposed at once, at least
GROWTH = 4  # or this part of what is there: one more in a hundred teaches nothing new
ENOUGH = 400  # labels beyond which more teach little: a round is fitted to no more, and does without the latest
SHORT = 16  # below that, only this part of them is not waited for


@dataclass(frozen=True)
class Round:
    """`count` trials behind the first `start`, proposed from the labels of the first `known`."""

    known: int
    start: int
    count: int


def next_round(start: int, total: int) -> Round:
    """Return the round behind `start` trials of `total`; the rounds that are left are of about equal size."""
    left, size = total - start, max(BATCH, start // GROWTH)
    behind = min(start // GROWTH, max(start // SHORT, start - ENOUGH))
    return Round(start - behind, start, left // max(1, round(left / size)))


class Rounds:
    """The keys of trials in their order, and which of them have labels.

    Args:
        keys: of the trials that need no labels.
        plan: says which round follows some trials of how many.
    """

    def __init__(self, keys: Sequence[str], plan: Callable[[int, int], Round] = next_round) -> None:
        self.keys, self._plan = list(keys), plan
        self._labelled: set[str] = set()
        self._prefix = 0
        self._asked: Round | None = None

    def label(self, key: str) -> None:
        """Note that a trial has its label."""
        self._labelled.add(key)
        while self._prefix < len(self.keys) and self.keys[self._prefix] in self._labelled:
            self._prefix += 1

    @property
    def labelled(self) -> int:
        """How many trials have labels."""
        return len(self._labelled)

    def due(self, total: int) -> Round | None:
        """Return the next round if `total` has room for one, its labels are there and no other is on its way."""
        if self._asked is not None or len(self.keys) >= total:
            return None
        found = self._plan(len(self.keys), total)
        return found if self._prefix >= found.known else None

    def ask(self, asked: Round) -> None:
        """Note that a round is on its way."""
        self._asked = asked

    def extend(self, keys: Sequence[str]) -> None:
        """Add the trials of the round that was asked for; one without trials is the last."""
        self.keys += keys
        if keys:
            self._asked = None
