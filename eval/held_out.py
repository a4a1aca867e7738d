"""Which surrogate ranks real, held-out trials of a finished run best, all sizes and near 3 bits?

    python eval/held_out.py RUN_DIR ...

Trials near the target weigh more, as in a run. Nested five folds (nothing is chosen with the fold that is judged),
three splits. Near the budget: held-out predictions of trials within 0.3 bits of 3.0, all folds together. Writes
eval/results/held_out.json (runs of other models stay).
"""

import argparse
import datetime
import platform
import time
from pathlib import Path

import numpy as np

from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.runs.explain import weights_near
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.trials import load_trials
from quantdm.surrogates import AdditiveSurrogate, GraphSurrogate, RidgeSurrogate, SearchSpace, TreeSurrogate
from quantdm.surrogates.ranking import judge_folds, spearman
from quantdm.surrogates.trials import split_folds

OUT = Path(__file__).parent / "results" / "held_out.json"
KINDS = (GraphSurrogate, AdditiveSurrogate, TreeSurrogate, RidgeSurrogate)
SPLITS, TARGET, WITHIN = 3, 3.0, 0.3


def judge(space: SearchSpace, choices: np.ndarray, y: np.ndarray) -> dict[str, dict[str, list[float]]]:
    """Return mean and standard deviation over splits of every figure of every surrogate and of what needs no trial."""
    near = np.abs(space.avg_bits(choices) - TARGET) < WITHIN
    weights = weights_near(space, choices, TARGET)  # as a run for this target fits
    rows: dict[str, list[dict[str, float]]] = {}
    known = {
        "sum of noise errors": -space.gather(space.noise_error, choices).sum(axis=1),
        "sum of weight errors": -space.gather(space.weight_error, choices).sum(axis=1),
        "average bits": space.avg_bits(choices),
    }
    for split in range(SPLITS):
        for kind in KINDS:
            cpu = time.process_time()
            found = kind(space, random_state=split).fit(choices, y, weights)
            assert found.held_out_ is not None
            row = {"spearman": np.mean(found.cv_scores_), "ndcg10": np.mean(found.cv_ndcg_)}
            row |= {"near": spearman(found.held_out_[near], y[near]), "fit_cpu_s": time.process_time() - cpu}
            rows.setdefault(found.name, []).append({key: float(value) for key, value in row.items()})
            if isinstance(found, GraphSurrogate):
                power = float(np.median(found.net.messages(found.thetas[0]).power))
                rows[found.name][-1]["median_power"] = power
        for name, score in known.items():
            folds = judge_folds(score, y, split_folds(len(y), 5, split))
            row = {"spearman": np.mean(folds[0]), "ndcg10": np.mean(folds[1]), "near": spearman(score[near], y[near])}
            rows.setdefault(name, []).append({key: float(value) for key, value in row.items()})
    return {
        name: {key: [round(float(f([row[key] for row in found])), 4) for f in (np.mean, np.std)] for key in found[0]}
        for name, found in rows.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    record = read_json(OUT, version=1) if OUT.exists() else {"version": 1, "runs": {}}
    record |= {"splits": SPLITS, "target_bits": TARGET, "within_bits": WITHIN, "versions": versions()}
    for folder in parser.parse_args().runs:
        run = Run.open(folder)
        space = load_space(run)
        choices, y = load_trials(run, space)
        record["runs"][run.settings.model] = {
            "trials": len(y),
            "near": int((np.abs(space.avg_bits(choices) - TARGET) < WITHIN).sum()),
            "options": list(space.labels),
            "held_out": judge(space, choices, y),
            "machine": platform.machine(),
            "date": datetime.date.today().isoformat(),
        }
        for name, row in record["runs"][run.settings.model]["held_out"].items():
            print(run.settings.model, name, row, flush=True)
        write_json(OUT, record)


if __name__ == "__main__":
    main()
