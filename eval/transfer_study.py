"""Do trials of one denoiser help to learn another? Zero-shot and few trials, leave one denoiser out.

    PYTHONPATH=. python eval/transfer_study.py [FAR_RUN FAR_RUN ...] [--near TARGET_RUN DONOR_RUN]...

Every denoiser in turn is the target, the others are donors of all their trials. On the target each of ten seeds draws a
test set that nobody uses (half of the trials within 0.3 bits of 3.0, and 150 others) and a pool of 60 trials, half of
them near; every method gets the same first 0, 10, 20, 40 or 60. Rank correlation with the labels of the test set, all
and near 3 bits, and NDCG@10; intervals of means over seeds. Writes eval/results/transfer.json.
"""

import argparse
import datetime
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import kendalltau, rankdata
from scipy.stats import t as student

from eval.transfer_model import RHOS, fit_few, prior_of
from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.trials import load_trials
from quantdm.surrogates import AdditiveSurrogate, SearchSpace
from quantdm.surrogates.ranking import ndcg, relevance, spearman
from quantdm.surrogates.transfer import RHO, Donor, learn

OUT = Path(__file__).parent / "results" / "transfer.json"
SEEDS, COUNTS, POOL, TEST_FAR, TARGET, WITHIN = 10, (0, 10, 20, 40, 60), 60, 150, 3.0, 0.3
Trials = tuple[np.ndarray, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--near", nargs=2, action="append", type=Path, default=[], metavar=("TARGET", "DONOR"))
    arguments = parser.parse_args()
    read = {path: read_run(path) for path in {*arguments.runs, *(p for pair in arguments.near for p in pair)}}
    learned = {path: learn(space, *trials) for path, (_, space, trials) in read.items()}
    record: dict[str, Any] = read_json(OUT, version=1) if OUT.exists() else {"version": 1, "directions": {}}
    record |= {"seeds": SEEDS, "counts": list(COUNTS), "target_bits": TARGET, "rho_without_trials": RHO}
    record |= {"machine": platform.machine(), "versions": versions(), "date": datetime.date.today().isoformat()}
    pairs = [("far", path, [other for other in arguments.runs if other != path]) for path in arguments.runs]
    pairs += [("near", target, [donor]) for target, donor in arguments.near]
    for kind, target, donors in pairs:
        model, space, trials = read[target]
        name = f"{kind}: {', '.join(read[donor][0] for donor in donors)} -> {model}"
        known = {digest for donor in donors for digest in labels_in(read[donor])} if kind == "near" else set()
        found = study(space, trials, [learned[donor] for donor in donors], unseen=unseen(space, trials, known))
        record["directions"][name] = found
        for key, rows in found["figures"].items():
            print(name, key, {row: value["near"] for row, value in rows.items()}, flush=True)
        write_json(OUT, record)
    record["rule"] = judge({name: found for name, found in record["directions"].items() if name.startswith("far")})
    print(record["rule"])
    write_json(OUT, record)


def read_run(path: Path) -> tuple[str, SearchSpace, Trials]:
    run = Run.open(path)
    space = load_space(run)
    return run.settings.model, space, load_trials(run, space)


def labels_in(run: tuple[str, SearchSpace, Trials]) -> set[tuple[str, ...]]:
    """Return the configurations of a run, as labels in the order of its layers."""
    _, space, (choices, _) = run
    return {tuple(space.labels[option] for option in row) for row in choices}


def unseen(space: SearchSpace, trials: Trials, known: set[tuple[str, ...]]) -> np.ndarray:
    """Return which trials are configurations that no donor measured: a near target may share some [T]."""
    return np.array([tuple(space.labels[option] for option in row) not in known for row in trials[0]])


@dataclass(frozen=True, eq=False)
class Split:
    """A target's trials, which of them judge (`test`), and which may be learned from, in this order (`pool`)."""

    space: SearchSpace
    choices: np.ndarray
    y: np.ndarray
    test: np.ndarray
    pool: np.ndarray

    def figures(self, score: np.ndarray) -> dict[str, float]:
        """Return how scores [test] rank."""
        y, rows = self.y[self.test], self.choices[self.test]
        near, gains = np.abs(self.space.avg_bits(rows) - TARGET) < WITHIN, relevance(y, np.delete(self.y, self.test))
        return {"all": spearman(score, y), "near": spearman(score[near], y[near]), "ndcg10": ndcg(gains, score)}

    def noise(self, index: np.ndarray) -> np.ndarray:
        """Return the negative sum of one-layer noise errors of trials."""
        return -self.space.gather(self.space.noise_error, self.choices[index]).sum(axis=1)

    def scratch(self, index: np.ndarray, seed: int) -> dict[str, float]:
        """Return how the additive surrogate ranks that learns these trials alone."""
        found = AdditiveSurrogate(self.space, random_state=seed).fit(self.choices[index], self.y[index])
        return self.figures(found.predict(self.choices[self.test]))


def split(space: SearchSpace, trials: Trials, unseen: np.ndarray, seed: int) -> Split:
    """Draw test set and pool of a seed."""
    choices, y = trials
    rng, near = np.random.default_rng(seed), np.abs(space.avg_bits(choices) - TARGET) < WITHIN
    close, others = (rng.permutation(np.flatnonzero(mask & unseen)) for mask in (near, ~near))
    far_test = min(TEST_FAR, len(others) // 2)
    test = np.concatenate([close[: len(close) // 2], others[:far_test]])
    left = close[len(close) // 2 :], others[far_test:]
    pool = np.concatenate([part[: POOL // 2] for part in left])
    more = rng.permutation(np.setdiff1d(np.arange(len(y)), np.concatenate([pool, test])))
    return Split(space, choices, y, test, np.concatenate([rng.permutation(pool), more])[:POOL])


def study(space: SearchSpace, trials: Trials, donors: list[Donor], *, unseen: np.ndarray) -> dict[str, Any]:
    """Return every figure of every method and count on one target: mean, sd and 95 % interval over seeds."""
    curves = {rho: prior_of(space, donors, rho) for rho in {*RHOS, RHO}}
    splits = [split(space, trials, unseen, seed) for seed in range(SEEDS)]
    seeds = [one_seed(part, curves, seed) for seed, part in enumerate(splits)]
    figures: dict[str, Any] = {
        count: {
            row: {key: spread([s[count][row][key] for s in seeds]) for key in rows[row]}
            for row in rows
            if "rho" not in row
        }
        for count, rows in seeds[0].items()
    }
    gaps = {
        key: {
            "T1 with 20 - scratch with 60": spread([s["20"]["T1"][key] - s["60"]["scratch"][key] for s in seeds]),
            "T1 with 20 - scratch with 20": spread([s["20"]["T1"][key] - s["20"]["scratch"][key] for s in seeds]),
            "T1 with 0 - noise errors": spread([s["0"]["T1"][key] - s["0"]["noise errors"][key] for s in seeds]),
        }
        for key in ("all", "near")
    }
    sweep = {
        str(rho): {key: spread([s["0"][f"T1, rho {rho}"][key] for s in seeds]) for key in ("all", "near")}
        for rho in sorted(curves)
    }
    return {
        "trials": len(trials[1]),
        "test": len(splits[0].test),
        "figures": figures,
        "gaps": gaps,
        "T1 with 0, by rho": sweep,
    }


def one_seed(part: Split, curves: dict[float, Any], seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Return count -> method -> figures on one split."""
    space, test, zero = part.space, part.test, curves[RHO]
    rows, noise = part.choices[test], part.noise(test)

    def told(index: np.ndarray) -> np.ndarray:
        return -zero.log_fid(zero.start(0.0), part.choices[index])

    start = {
        "average bits": space.avg_bits(rows),
        "weight errors": -space.gather(space.weight_error, rows).sum(axis=1),
        "noise errors": noise,
        "T1": told(test),
        "stack": rankdata(told(test)) + rankdata(noise),
    }
    start |= {f"T1, rho {rho}": -curve.log_fid(curve.start(0.0), rows) for rho, curve in curves.items()}
    found = {"0": {name: part.figures(score) for name, score in start.items()}}
    for count in COUNTS[1:]:
        seen = part.pool[:count]
        curve, theta = fit_few([curves[rho] for rho in RHOS], part.choices[seen], part.y[seen], seed=seed)
        mine = -curve.log_fid(theta, rows)
        tau = np.array([kendalltau(score, part.y[seen])[0] for score in (part.noise(seen), told(seen))])
        share = np.exp(tau / 0.1) / np.exp(tau / 0.1).sum()
        stacked = share @ np.stack([rankdata(noise), rankdata(told(test))]) + rankdata(mine)
        found[str(count)] = {
            "scratch": part.scratch(seen, seed),
            "T1": part.figures(mine),
            "stack": part.figures(stacked),
        }
    rest = np.setdiff1d(np.arange(len(part.y)), test)
    return {**found, f"the other {len(rest)}": {"scratch": part.scratch(rest, seed)}}


def spread(values: list[float]) -> dict[str, float]:
    """Return mean, standard deviation and 95 % t interval of one figure over seeds."""
    mean, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(student.ppf(0.975, len(values) - 1)) * sd / np.sqrt(len(values))
    return {
        "mean": round(mean, 4),
        "sd": round(sd, 4),
        "low": round(float(mean - half), 4),
        "high": round(float(mean + half), 4),
    }


def judge(far: dict[str, Any]) -> dict[str, Any]:
    """Say whether the rule holds: in every far direction one of the two gaps, near the budget and over all sizes.

    What was learned elsewhere proposes configurations near the budget, so that is where it has to help to be kept.
    """
    rule: dict[str, Any] = {
        key: {
            name: bool(
                found["gaps"][key]["T1 with 20 - scratch with 60"]["mean"] >= 0
                or found["gaps"][key]["T1 with 0 - noise errors"]["low"] > 0
            )
            for name, found in far.items()
        }
        for key in ("all", "near")
    }
    return {**rule, "kept": bool(far) and all(rule["near"].values())}


if __name__ == "__main__":
    main()
