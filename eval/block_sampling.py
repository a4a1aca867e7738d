"""Do trials of the best assignments of whole blocks find better recipes than trials near the frontier of layers?

    PYTHONPATH=. python eval/block_sampling.py         # into eval/results/block_sampling.json

AutoBuild (arXiv 2403.13293) spends the last trials on combinations of the best assignments of every block. Planted
labels (`tests.planted.MeetingTruth`, label noise 0.1) of the graph of digits-dit: the first trials need no labels, two
rounds of proposals follow, as in a search; of the last a share comes from whole blocks. The figure is the best true
value at the target among what single layers and whole blocks choose after it, for all surrogates, as a verification
would find it; larger is better. Differences are paired by seed.
"""

import datetime
from pathlib import Path

import numpy as np

from quantdm.allocation import select
from quantdm.allocation.knapsack import hull_steps
from quantdm.allocation.units import Unit, assemble, build_units
from quantdm.files import write_json
from quantdm.machine import versions
from quantdm.runs.choose import CAUTION
from quantdm.runs.proposals import SURROGATES, propose, weights_near
from quantdm.runs.trials import PROPOSERS, first_trials
from quantdm.surrogates import GraphSurrogate, SearchSpace, attribute, score_blocks
from tests.planted import MeetingTruth, planted_space

OUT = Path(__file__).parent / "results" / "block_sampling.json"
KINDS, SEEDS, TARGET, SHARES = ("none", "coherent", "worst", "amplified"), 4, 3.0, (0.0, 0.5, 1.0)
FIRST, ROUND, TOP, SPREAD, DRAWS, NOISE = 100, 30, 16, 0.25, 16, 0.1


def sample_blocks(space: SearchSpace, graph: GraphSurrogate, count: int, *, seed: int) -> np.ndarray:
    """Draw choices [T, L] near the target: every block takes one of its TOP assignments at the price of the size."""
    zero, blocks = score_blocks(graph)
    units = build_units(space, zero[0], blocks=[block.bounded(CAUTION) for block in blocks])
    total, found = int(space.num_weights.sum()), []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        goal = (TARGET + SPREAD * rng.uniform(-1, 1)) * total
        rate = price_at(units, goal)
        tops = [np.argsort(rate * unit.bits - unit.values)[: TOP if len(unit.layers) > 1 else 2] for unit in units]
        drawn = np.stack([assemble(space, units, [rng.choice(top) for top in tops]) for _ in range(DRAWS)])
        found.append(drawn[np.argmin(np.abs(space.total_bits(drawn) - goal))])
    return np.unique(np.stack(found), axis=0)


def price_at(units: list[Unit], budget: float) -> float:
    """Return the price per bit at which the units spend a budget."""
    start, steps = hull_steps([unit.values for unit in units], [unit.bits for unit in units])
    spent = sum(int(unit.bits[item]) for unit, item in zip(units, start, strict=True))
    for step in steps:
        spent += step.extra
        if spent > budget:
            return step.rate
    return 0.0


def search(space: SearchSpace, truth: MeetingTruth, seed: int, share: float) -> float:
    """Return the best true value at the target that a search finds."""
    rng = np.random.default_rng(seed)
    tried = first_trials(space, FIRST, targets=(TARGET,), seed=seed)
    y = truth.y(tried) + NOISE * rng.normal(size=len(tried))
    for number in range(2):
        weights = weights_near(space, tried, TARGET)
        fitted = [SURROGATES[name](space, random_state=seed).fit(tried, y, weights) for name in PROPOSERS]
        of_blocks = round(share * ROUND) if number else 0
        new = np.zeros((0, tried.shape[1]), dtype=np.int64)
        if of_blocks:
            graph = GraphSurrogate(space, random_state=seed).fit(tried, y, weights)
            new = sample_blocks(space, graph, of_blocks, seed=seed)
        if of_blocks < ROUND:
            more = propose(space, fitted, ROUND - of_blocks, targets=(TARGET,), tried=tried, seed=seed + 7 * number)
            new = np.concatenate([new, more])
        tried = np.concatenate([tried, new])
        y = np.concatenate([y, truth.y(new) + NOISE * rng.normal(size=len(new))])
    return best_found(space, truth, tried, y, seed)


def best_found(space: SearchSpace, truth: MeetingTruth, tried: np.ndarray, y: np.ndarray, seed: int) -> float:
    """Return the best true value of what the surrogates choose."""
    weights, found = weights_near(space, tried, TARGET), []
    for kind in SURROGATES.values():
        surrogate = kind(space, random_state=seed).fit(tried, y, weights)
        found.append(select(space, attribute(surrogate).values, target_bits=TARGET))
        if isinstance(surrogate, GraphSurrogate):
            zero, blocks = score_blocks(surrogate)
            bounded = [block.bounded(CAUTION) for block in blocks]
            found.append(select(space, zero[0], blocks=bounded, target_bits=TARGET))
    return float(max(truth.y(choice)[0] for choice in found))


def main() -> None:
    space, rows = planted_space(model="digits-dit"), {}
    for kind in KINDS:
        truths = [MeetingTruth(space, kind, seed=seed) for seed in range(SEEDS)]  # type: ignore[arg-type]
        found = np.array([[search(space, t, seed, s) for s in SHARES] for seed, t in enumerate(truths)])
        gains = found - found[:, :1]
        rows[kind] = {
            "value": {f"{s:g}": [round(float(v), 4) for v in found[:, i]] for i, s in enumerate(SHARES)},
            "gain": {
                f"{s:g}": [round(float(f(gains[:, i])), 4) for f in (np.mean, np.std)] for i, s in enumerate(SHARES)
            },
            "optimum": [round(t.optimum(TARGET), 4) for t in truths],
        }
        print(kind, rows[kind], flush=True)
        settings = {"first": FIRST, "round": ROUND, "rounds": 2, "top": TOP, "seeds": SEEDS, "target_bits": TARGET}
        write_json(
            OUT, {"version": 1, "rows": rows, **settings, "versions": versions(), "date": f"{datetime.date.today()}"}
        )


if __name__ == "__main__":
    main()
