"""Which configurations to measure next: near the learned frontier, where the surrogates hope or disagree."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from quantdm.allocation.pruning import prune
from quantdm.allocation.sampling import sample_configs, sample_frontier
from quantdm.errors import QuantDMError
from quantdm.files import digest
from quantdm.runs.rounds import ENOUGH
from quantdm.surrogates import AdditiveSurrogate, GraphSurrogate, SearchSpace, TreeSurrogate, attribute
from quantdm.surrogates.attribution import Explainable

POOL = 4  # candidates per proposal
SPREAD, NOISE = 0.25, 0.4  # of the frontier samples, in bits and in log value
# Trials near the target count up to five times as much as those far from it: there the recipe lies.
AT_TARGET, WIDTH = 4.0, 0.5  # extra weight, and standard deviation in bits
RULE = (POOL, SPREAD, NOISE, AT_TARGET, WIDTH, ENOUGH)  # what an answer depends on beside its question

SURROGATES: dict[str, Any] = {"additive": AdditiveSurrogate, "tree": TreeSurrogate, "graph": GraphSurrogate}


@dataclass(frozen=True)
class Proposal:
    """A question for a worker: which `count` configurations next, from what was tried and labelled.

    `tried` are the choices as text (`to_text`), `y` the labels of the first of them; the others have none yet.
    """

    space: str  # digest
    tried: tuple[str, ...]
    y: tuple[float, ...]
    count: int
    targets: tuple[float, ...]
    proposers: tuple[str, ...]
    seed: int  # of the surrogates
    place: int  # seed of the samples

    @property
    def key(self) -> str:
        """Everything that determines the answer."""
        return digest("propose", RULE, [SURROGATES[name].version for name in self.proposers], asdict(self))


def to_text(choices: NDArray[np.int64]) -> list[str]:
    """Return choices [T, L] as one text each: two digits per layer."""
    return [row.tobytes().hex() for row in choices.astype(np.uint8)]


def from_text(rows: Sequence[str], layers: int) -> NDArray[np.int64]:
    """Return the choices [T, L] that `to_text` wrote."""
    return np.frombuffer(bytes.fromhex("".join(rows)), dtype=np.uint8).astype(np.int64).reshape(-1, layers)


def weights_near(space: SearchSpace, choices: NDArray[np.int64], *targets: float) -> NDArray[np.float64]:
    """Return how much every trial [T, L] counts in a fit for targets: more, the nearer its size is to one of them."""
    apart = bits_apart(space, choices, targets) / WIDTH
    return 1 + AT_TARGET * np.exp(-(apart**2) / 2)


def bits_apart(space: SearchSpace, choices: NDArray[np.int64], targets: Sequence[float]) -> NDArray[np.float64]:
    """Return how many bits the size of every choice [T, L] is from the nearest target."""
    return np.abs(space.avg_bits(choices)[:, None] - np.array(targets)).min(axis=1)


def answer(proposal: Proposal, space: SearchSpace) -> dict[str, Any]:
    """Fit the surrogates to what is labelled and return {"choices": what they propose}.

    Raises:
        QuantDMError: the space is not the one that the question is about.
    """
    if space.digest != proposal.space:
        raise QuantDMError("proposal: the search space on disk is another than the one that is searched; start again")
    tried, y = from_text(proposal.tried, len(space.layers)), np.array(proposal.y, dtype=np.float64)
    # More labels would teach little and take minutes to fit: those near the targets are enough to propose.
    apart = bits_apart(space, tried[: len(y)], proposal.targets)
    near = np.sort(np.argsort(apart, kind="stable")[:ENOUGH])
    weights = weights_near(space, tried[near], *proposal.targets)
    kinds = [SURROGATES[name] for name in proposal.proposers]
    fitted = [kind(space, random_state=proposal.seed).fit(tried[near], y[near], weights) for kind in kinds]
    found = propose(space, fitted, proposal.count, targets=proposal.targets, tried=tried, seed=proposal.place)
    return {"choices": to_text(found)}


class Proposer(Explainable, Protocol):
    """A fitted surrogate: it predicts and explains."""

    def predict(self, choices: ArrayLike) -> NDArray[np.float64]:
        """Return y for choices [T, L]; larger is better."""
        ...


def propose(
    space: SearchSpace,
    surrogates: Sequence[Proposer],
    count: int,
    *,
    targets: Sequence[float],
    tried: NDArray[np.int64],
    seed: int,
) -> NDArray[np.int64]:
    """Return `count` choices [T, L] that are not among `tried`, an equal share near each target size.

    Every surrogate contributes samples near its own frontier. Of all candidates of a size those are taken whose mean
    rank plus the standard deviation of their ranks over the surrogates is highest: an upper confidence bound that does
    not care for the surrogates' units.
    """
    seen = {row.tobytes() for row in tried}
    found: list[NDArray[np.int64]] = []
    values = [attribute(surrogate).values for surrogate in surrogates]  # once: the graph's enumerates whole blocks
    for index, target in enumerate(targets):
        share = count // len(targets) + (index < count % len(targets))
        each = -(-POOL * share // len(surrogates))
        pools = [sample_configs(space, share, seed=seed + 100 * index, target_bits=target)]  # for what is missing
        pools += [
            sample_frontier(
                space,
                table,
                each,
                target_bits=target,
                spread=SPREAD,
                noise=NOISE,
                seed=seed + 100 * index + place,
                allow_fewer=True,
            )
            for place, table in enumerate(values)
        ]
        pool = prune(space, np.concatenate(pools))
        ranks = np.stack([rankdata(surrogate.predict(pool)) for surrogate in surrogates])
        hope = ranks.mean(axis=0) + ranks.std(axis=0)
        for row in pool[np.argsort(-hope, kind="stable")]:
            if share and row.tobytes() not in seen:
                seen.add(row.tobytes())
                found.append(row)
                share -= 1
    return np.stack(found) if found else tried[:0]
