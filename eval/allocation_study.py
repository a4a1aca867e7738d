"""Does the learned allocation pay? One set of trials per reference pipeline, recipes of three sizes, every baseline.

    python eval/allocation_study.py digits-dit --run-dir runs/study-dit

The trials cover random mixes and the frontiers of all three sizes. Surrogates are fitted once; at every size their
candidates are verified on images of their own, the best by measurement becomes the recipe, and recipe and baselines
are measured on three draws of noises that neither the trials nor the verification saw. Run it again to go on.
Result: eval/results/allocation_PIPELINE.json and recipes/PIPELINE-BITSbit-{a16,a6}.yaml.
"""

import argparse
import datetime
import platform
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantdm.denoisers.inventory import list_layers
from quantdm.files import read_json, write_json
from quantdm.machine import versions
from quantdm.metrics.samples import Draw
from quantdm.metrics.statistics import mean_and_sd
from quantdm.pipelines.loading import load_pipeline
from quantdm.pipelines.parts import get_denoiser
from quantdm.recipe import Provenance, Recipe
from quantdm.runs import final
from quantdm.runs.choose import candidate_choices
from quantdm.runs.correct import activation_spec_of
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Job
from quantdm.runs.explain import SURROGATES, explain, fit_surrogates
from quantdm.runs.run import Run
from quantdm.runs.settings import make_settings, unquantized_bytes
from quantdm.runs.stages import build_bank, describe, measure_space
from quantdm.runs.trials import label_of, load_trials, run_trials
from quantdm.runs.verify import verify
from quantdm.surrogates import SearchSpace, score_blocks
from quantdm.surrogates.ranking import spearman

ROOT = Path(__file__).resolve().parents[1]
SIZES = (2.5, 3.0, 3.5)
TRIALS, CEILING_TRIALS, ACTIVATION_BITS = 400, 100, 6
NO_SEARCH = "baseline: "
BASELINES = ("sensitivity", "lambda mode", "best sampled")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=["digits-dit", "digits-sd"])
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=None)
    arguments = parser.parse_args()
    pipe = load_pipeline(arguments.model)
    denoiser = get_denoiser(pipe)
    settings = make_settings(pipe, target_bits=3.0, target_bytes=None, trials=TRIALS, seed=0)
    run = Run.create(arguments.run_dir, settings)
    describe(run, denoiser)
    bank = build_bank(run, pipe)
    with Engine(run, workers=arguments.workers) as engine:
        space = measure_space(run, engine, denoiser, bank)
        run_trials(run, engine, space, targets=SIZES, proposers=tuple(SURROGATES))
        choices, y = load_trials(run, space)
        fitted = fit_surrogates(run, space, choices, y)
        attributions = explain(run, fitted)
        fits = held_out(run)
        rest = unquantized_bytes(list_layers(denoiser), denoiser)
        result: dict[str, Any] = {
            "version": 1,
            "model": arguments.model,
            "trials": len(y),
            "surrogates": fits,
            "sizes": {},
        }
        spec = activation_spec_of(denoiser, ACTIVATION_BITS)
        block_scores = score_blocks(fitted["graph"])
        for size in SIZES:
            candidates = candidate_choices(run, space, attributions, block_scores, target_bits=size)
            rows = measure_size(run, engine, space, candidates, size, spec, rest)
            result["sizes"][f"{size:g}"] = rows
            result |= circumstances(run, engine)
            write_json(ROOT / "eval" / "results" / f"allocation_{arguments.model}.json", result)
        result["surrogates"] |= {"ceiling": ceiling(run, engine, space, choices, y)}
        write_json(ROOT / "eval" / "results" / f"allocation_{arguments.model}.json", result)


def circumstances(run: Run, engine: Engine) -> dict[str, Any]:
    """Return what the figures depend on besides the model: noise of sampling, machine, versions, date, protocol."""
    return {
        "sampling_noise": final.sampling_noise(engine, final.final_draws(run, images=1000)),
        "machine": f"{platform.machine()}, {run.settings.dtype}",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "protocol": "1000 images x 20 steps per draw, draws 101-103; labels 300 images x 8 steps, draw 0",
    }


def held_out(run: Run) -> dict[str, Any]:
    """Return the held-out rank quality of every surrogate with its fold spread, beside what needs no learning."""
    record = read_json(run.path("surrogate.json"), version=1)
    found = {
        name: {"spearman": _spread(folds), "ndcg_at_10": _spread(record["held_out_ndcg"][name])}
        for name, folds in record["held_out_spearman"].items()
    }
    return found | {"without learning (Spearman)": record["without_learning"]}


def measure_size(
    run: Run, engine: Engine, space: SearchSpace, candidates: dict[str, np.ndarray], size: float, spec: Any, rest: int
) -> list[dict[str, Any]]:
    """Verify the candidates of a size, keep the best as recipe, measure it beside the baselines on the final draws."""
    configs = {name: space.config(choice).to_labels() for name, choice in candidates.items()}
    draws = [Draw(run.settings.seed * 1000 + 2 + i, run.settings.verify_images, 20) for i in range(2)]
    figures = verify(run, engine, configs, draws, f"verify at {size:g} bits")
    verified = {name: mean_and_sd(rows)["mean"]["fid_fp"] or np.inf for name, rows in figures.items()}
    searched = [name for name in configs if not name.startswith(NO_SEARCH)]
    chosen = min(searched, key=lambda name: verified[name])
    learned = min((name for name in searched if name not in BASELINES), key=lambda name: verified[name])
    uniform = min(
        (n for n in configs if n.startswith(NO_SEARCH) and "weight error" not in n), key=lambda name: verified[name]
    )
    jobs = {
        "fp": (Job(Draw(0, 0, 0)), "full precision"),
        "recipe": (Job(Draw(0, 0, 0), configs[chosen]), chosen),
        "best learned": (Job(Draw(0, 0, 0), configs[learned]), learned),
        "recipe A6": (Job(Draw(0, 0, 0), configs[chosen], spec.model_dump(mode="json")), "6-bit activations"),
        "uniform": (Job(Draw(0, 0, 0), configs[uniform]), uniform.removeprefix(NO_SEARCH)),
        "least weight error": (Job(Draw(0, 0, 0), configs[f"{NO_SEARCH}least weight error"]), "knapsack"),
        "one-layer sensitivity": (Job(Draw(0, 0, 0), configs["sensitivity"]), "knapsack"),
        "best of all sampled": (Job(Draw(0, 0, 0), configs["best sampled"]), "by its label"),
        "lambda mode": (Job(Draw(0, 0, 0), configs["lambda mode"]), "independent argmax per block"),
    }
    rows = final.measure_rows(run, engine, space, jobs, final.final_draws(run, images=1000), rest)
    by_name = {row["name"]: row for row in rows}
    for name, activations in (("recipe", None), ("recipe A6", spec)):
        save_recipe(run, configs[chosen], activations, size, chosen, by_name[name])
    return [row | {"verified": verified} if row["name"] == "recipe" else row for row in rows]


def save_recipe(run: Run, labels: Any, activations: Any, size: float, chosen: str, row: dict[str, Any]) -> None:
    """Write recipes/PIPELINE-BITSbit-{a16,a6}.yaml with what was measured."""
    recipe = Recipe(
        model=run.settings.model,
        layers=labels,
        activations=activations,
        avg_bits=round(row["avg_bits"], 6),
        provenance=Provenance(
            source=f"measured: {chosen}, the best by verification; three draws of 1000 images, 20 steps",
            quantdm=versions().get("quantdm"),
            seed=run.settings.seed,
            trials=run.settings.trials,
            target=f"{size:g} bits per weight",
            measured={key: round(row[key], 4) for key in ("fid_fp", "fid_fp_sd", "fid_real", "psnr_fp")},
        ),
    )
    suffix = "a16" if activations is None else f"a{activations.bits}"
    recipe.save(ROOT / "recipes" / f"{run.settings.model}-{size:.1f}bit-{suffix}.yaml")


def ceiling(run: Run, engine: Engine, space: SearchSpace, choices: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Return the rank correlation of two independent measurements of equal configurations: the limit of any model."""
    picked = np.random.default_rng(0).permutation(len(choices))[:CEILING_TRIALS]
    draw = Draw(run.settings.seed * 1000 + 50, run.settings.label_images, run.settings.label_steps)
    configs = {str(index): space.config(choices[index]).to_labels() for index in picked}
    again = verify(run, engine, configs, [draw], "second measurement")
    second = np.array([label_of(rows[0]) for rows in again.values()])
    near = np.abs(space.avg_bits(choices[picked]) - 3.0) <= 0.6
    return {
        "spearman": spearman(second, y[picked]),
        "spearman within 0.6 bits of 3": spearman(second[near], y[picked][near]),
        "trials": len(picked),
    }


def _spread(folds: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(folds)), "sd": float(np.std(folds, ddof=1)), "folds": len(folds)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
