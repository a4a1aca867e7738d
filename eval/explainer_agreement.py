"""Do the explanations agree, with each other and with the truth? Swap single layers of a recipe and measure.

    python eval/explainer_agreement.py digits-dit --run-dir runs/study-dit     # after eval/allocation_study.py

In the 3.0-bit recipe of the study, sampled layers take another option each, and fid_fp is measured on the labels' own
noises. Result: eval/results/explainers_PIPELINE.json.
"""

import argparse
import datetime
from pathlib import Path

import numpy as np
import torch

from quantdm import load_recipe
from quantdm.files import write_json
from quantdm.machine import versions
from quantdm.pipelines.known import known_pipelines
from quantdm.runs.engines.local import Engine
from quantdm.runs.explain import SURROGATES
from quantdm.runs.run import Run
from quantdm.runs.stages import load_space
from quantdm.runs.trials import label_draw, label_of, load_trials
from quantdm.runs.verify import verify
from quantdm.surrogates import (
    Attribution,
    SearchSpace,
    agreement,
    agreement_with_truth,
    attribute,
    explain_by_shapley,
    explain_by_swaps,
)

ROOT = Path(__file__).resolve().parents[1]
SWAPS, SAMPLES = 60, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=known_pipelines())
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=None)
    arguments = parser.parse_args()
    run = Run.open(arguments.run_dir)
    space = load_space(run)
    choices, y = load_trials(run, space)
    recipe = load_recipe(ROOT / "recipes" / f"{arguments.model}-3.0bit-a16.yaml")
    reference = space.choice_of(recipe.config)
    layer, option = swaps_of(space, reference)
    swapped = np.tile(reference, (SWAPS, 1))
    swapped[np.arange(SWAPS), layer] = option
    configs = {str(index): space.config(row).to_labels() for index, row in enumerate((reference, *swapped))}
    with Engine(run, run.open_subject(), workers=arguments.workers) as engine:
        figures = verify(run, engine, configs, [label_draw(run)], "swap one layer a time")
    measured = np.array([label_of(rows[0]) for rows in figures.values()])
    delta = measured[1:] - measured[0]
    explained = explain_all(run, space, choices, y)
    truth = {
        name: agreement_with_truth(attribution, layer, option, delta, reference=reference)
        for name, attribution in explained.items()
    }
    record = {
        "version": 1,
        "model": arguments.model,
        "swaps": SWAPS,
        "delta_y": {"min": float(delta.min()), "median": float(np.median(delta)), "max": float(delta.max())},
        "with_measured_swaps": truth,
        "with_each_other": agreement(explained),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    write_json(ROOT / "eval" / "results" / f"explainers_{arguments.model}.json", record)
    for name, row in truth.items():
        print(
            f"{name:<22} Spearman with measured swaps {row['values']:.3f}, of layer importance {row['importance']:.3f}"
        )


def swaps_of(space: SearchSpace, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draw SWAPS layers and for each an option that the reference [L] does not have there."""
    rng = np.random.default_rng(0)
    layer = rng.integers(0, len(space.layers), SWAPS)
    return layer, (reference[layer] + rng.integers(1, len(space.options), SWAPS)) % len(space.options)


def explain_all(run: Run, space: SearchSpace, choices: np.ndarray, y: np.ndarray) -> dict[str, Attribution]:
    """Fit every surrogate and explain it in every way."""
    explained = {}
    for name, kind in SURROGATES.items():
        surrogate = kind(space, random_state=run.settings.seed).fit(choices, y)
        explained[f"{name}: own"] = attribute(surrogate)
        explained[f"{name}: swap one"] = explain_by_swaps(surrogate, choices, samples=SAMPLES)
        explained[f"{name}: Shapley"] = explain_by_shapley(surrogate, choices, samples=SAMPLES)
    return explained


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
