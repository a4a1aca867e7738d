"""Which surrogate finds the truth where errors of a block are independent, coherent, shadowed or amplified?

    PYTHONPATH=. python eval/planted_kinds.py [digits-dit] [pixart-xl-2] [RUN_DIR ...]

Planted labels (`tests.planted.MeetingTruth`, label noise 0.1) of random configurations of a traced denoiser, or of the
measured space of a run; judged by the noiseless truth on configurations near 3 bits, and by the true value of what is
chosen at 3.0 bits (by single layers, the graph surrogate also by whole blocks, mean - kappa · sd). Three seeds each,
and the same labels shuffled. Writes eval/results/planted_kinds.json, of PixArt's graph (28 blocks, 287 layers)
planted_pixart.json; what is not asked for stays as it is.
"""

import argparse
import datetime
import time
from pathlib import Path

import numpy as np

from quantdm.allocation import select
from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.surrogates import (
    AdditiveSurrogate,
    GraphSurrogate,
    RidgeSurrogate,
    SearchSpace,
    TreeSurrogate,
    attribute,
    score_blocks,
)
from quantdm.surrogates.ranking import spearman
from tests.planted import MeetingTruth, planted_space

RESULTS = Path(__file__).parent / "results"
FILES = {"pixart-xl-2": "planted_pixart.json"}  # planted_kinds.json elsewhere
KINDS = ("none", "coherent", "worst", "amplified")
MODELS = {"graph": GraphSurrogate, "additive": AdditiveSurrogate, "tree": TreeSurrogate, "ridge": RidgeSurrogate}
KAPPAS = (0.0, 0.5, 1.0, 2.0, 4.0)
SEEDS, HELD_OUT, TARGET = 3, 300, 3.0
TRIALS = {"pixart-xl-2": 500}  # 200 elsewhere


def judge(space: SearchSpace, kind: str, seed: int, count: int) -> dict[str, dict[str, float]]:
    """Fit every surrogate to one planted truth; compare ranks and choices with it."""
    truth = MeetingTruth(space, kind, seed=seed)  # type: ignore[arg-type]
    choices, y = truth.trials(count, seed=seed)
    near = truth.near(HELD_OUT)
    best = truth.optimum(TARGET) if len(space.options) ** max(map(len, truth.blocks)) <= 20_000 else None
    found: dict[str, dict[str, float]] = {"optimum": {} if best is None else {"chosen": best}}

    def value(choice: np.ndarray) -> float:
        return float(truth.y(choice)[0])

    found["sensitivity"] = {"chosen": value(select(space, -space.noise_error, target_bits=TARGET))}
    for name, make in MODELS.items():
        cpu = time.process_time()
        surrogate = make(space).fit(choices, y)
        row = {
            "fit_cpu_s": time.process_time() - cpu,
            "near": spearman(surrogate.predict(near), truth.y(near)),
            "held_out": float(np.mean(surrogate.cv_scores_)),
            "chosen": value(select(space, attribute(surrogate).values, target_bits=TARGET)),
        }
        if isinstance(surrogate, GraphSurrogate):
            row |= {"power": float(np.median(surrogate.net.messages(surrogate.thetas[0]).power))}
            zero, blocks = score_blocks(surrogate)
            for kappa in KAPPAS:
                bounded = [block.bounded(kappa) for block in blocks]
                row[f"whole blocks {kappa:g}"] = value(select(space, zero[0], blocks=bounded, target_bits=TARGET))
            if kind == "none":
                shuffled = np.random.default_rng(seed).permutation(y)
                row["shuffled"] = float(np.mean(make(space).fit(choices, shuffled).cv_scores_))
        found[name] = row
    return found


def summarise(rows: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, list[float]]]:
    """Return mean and standard deviation over seeds of every figure."""
    return {
        name: {
            key: [round(float(f([row[name][key] for row in rows])), 4) for f in (np.mean, np.std)]
            for key in rows[0][name]
        }
        for name in rows[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spaces", nargs="*", help="names of traced denoisers, or run directories")
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    arguments = parser.parse_args()
    for name in arguments.spaces or ["digits-dit", "pixart-xl-2"]:
        path = RESULTS / FILES.get(name, "planted_kinds.json")
        record = read_json(path, version=1) if path.exists() else {"version": 1, "spaces": {}}
        record |= {"seeds": SEEDS, "held_out": HELD_OUT, "target_bits": TARGET, "versions": versions()}
        measured = (Path(name) / "space.json").is_file()
        space = SearchSpace.load(Path(name) / "space.json") if measured else planted_space(model=name)
        label = f"{Path(name).name}, measured errors" if measured else name
        count = TRIALS.get(name, 200)
        kinds = record["spaces"].setdefault(label, {"trials": count, "layers": len(space.layers), "kinds": {}})["kinds"]
        for kind in arguments.kinds:
            kinds[kind] = summarise([judge(space, kind, seed, count) for seed in range(SEEDS)])
            record["spaces"][label]["date"] = datetime.date.today().isoformat()
            print(label, kind, *(f"\n  {key} {row}" for key, row in kinds[kind].items()), flush=True)
            write_json(path, record)


if __name__ == "__main__":
    main()
