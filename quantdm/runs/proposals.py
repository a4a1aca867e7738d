"""Which configurations to measure next: near the learned frontier, where the surrogates hope or disagree."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from quantdm.allocation.pruning import prune
from quantdm.allocation.sampling import sample_configs, sample_frontier
from quantdm.surrogates import SearchSpace, attribute
from quantdm.surrogates.attribution import Explainable

POOL = 4  # candidates per proposal
SPREAD, NOISE = 0.25, 0.4  # of the frontier samples, in bits and in log value


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
