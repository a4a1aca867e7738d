"""Do the surrogates find planted effects on the traced graph of PixArt (28 blocks, 287 layers)?

PYTHONPATH=. python eval/planted_pixart.py [additive] [tree] [graph]
Writes eval/results/planted_pixart.json (surrogates that are not asked for stay as they are).
"""

import argparse
import datetime
import time
from pathlib import Path

import numpy as np

from quantdm.allocation import select
from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.surrogates import AdditiveSurrogate, GraphSurrogate, TreeSurrogate, attribute
from quantdm.surrogates.ranking import spearman
from tests.planted import PlantedTruth, planted_space

OUT = Path(__file__).parent / "results" / "planted_pixart.json"
KINDS = {"additive": AdditiveSurrogate, "tree": TreeSurrogate, "graph": GraphSurrogate}
TRIALS, HELD_OUT, TARGET = 300, 200, 3.0


def judge(name: str) -> dict:
    """Fit to 300 planted trials; compare with the noiseless truth, the planted effects and the true optimum."""
    space = planted_space(model="pixart-xl-2")
    truth = PlantedTruth(space)
    held_out = truth.trials(HELD_OUT, seed=9)[0]
    y, near = truth.y(held_out), slice(HELD_OUT // 2, None)
    cpu = time.process_time()
    found = KINDS[name](space).fit(*truth.trials(TRIALS))
    fitted = time.process_time() - cpu
    explained = attribute(found)
    planted = -(truth.terms - truth.terms.mean(axis=1, keepdims=True))
    types = np.array([layer.op_type for layer in space.layers])
    by_type = np.stack([planted[types == op_type].mean(axis=0) for op_type in explained.by_op_type])
    table = np.array([list(row.values()) for row in explained.by_op_type.values()])
    best = truth.optimum(TARGET)
    chosen = float(truth.y(select(space, explained.values, target_bits=TARGET))[0])
    return {
        "fit_cpu_s": round(fitted, 1),
        "spearman_with_noiseless_truth": round(found.score(held_out, y), 4),
        "spearman_near_the_budget": round(found.score(held_out[near], y[near]), 4),
        "effects_per_type_and_option_spearman": round(spearman(table.ravel(), by_type.ravel()), 4),
        "effects_per_option_spearman": round(spearman(explained.values.mean(axis=0), planted.mean(axis=0)), 4),
        "true_y_of_selection": round(chosen, 5),
        "true_y_of_optimum": round(best, 5),
        "regret_share_of_optimum": round((best - chosen) / abs(best), 4),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(KINDS)}")
    record = read_json(OUT, version=1) if OUT.exists() else {"version": 1, "surrogates": {}}
    record |= {"trials": TRIALS, "held_out": HELD_OUT, "target_bits": TARGET, "versions": versions()}
    for name in parser.parse_args().names or KINDS:
        record["surrogates"][name] = judge(name)
        print(name, record["surrogates"][name], flush=True)
        write_json(OUT, record)


if __name__ == "__main__":
    main()
