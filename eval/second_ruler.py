"""A second ruler: do ImageNet features order the rows of the README's tables as digit features do?

    python eval/second_ruler.py digits-dit --run-dir runs/study-dit -o runs/ruler     # after eval/allocation_study.py
    python eval/second_ruler.py digits-sd --run-dir runs/study-sd -o runs/ruler       # run it again to go on
    python eval/second_ruler.py digits-dit -o runs/ruler          # without a study: what is shipped, and random mixes
    python eval/second_ruler.py digits-dit -o runs/ruler --tune   # also tuned anew, where the study tuned

Needs the extra `features`. Every row of the tables, the configuration that was measured there (without the run of a
study: the shipped recipes, which are not tuned, and the uniform schemes), on the first noises of the same draw:
Frechet and kernel distances to full precision by digit features and by EfficientNet-Lite0, PSNR, the
cosine of paired features, and one figure that needs no reference: whether the digit classifier sees what was asked
for. Writes eval/results/second_ruler_PIPELINE.json: rows, intervals between recipe and best uniform scheme, and the
rank agreement of the rulers over all rows and trials and over those that are better than RUINED by digit features.
"""

import argparse
import datetime
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from allocation_study import ACTIVATION_BITS, SIZES, size_name
from rulers import Rulers, agreements, difference

from quantdm import load_recipe
from quantdm.activations import usual_activations
from quantdm.allocation import select
from quantdm.allocation.sampling import sample_configs
from quantdm.files import read_json, write_json
from quantdm.machine import cores, versions
from quantdm.metrics.samples import Draw
from quantdm.pipelines.known import known_pipelines
from quantdm.pipelines.subject import look_at
from quantdm.quantizers import count_bits
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Evaluator, Job
from quantdm.runs.final import run_key, space_config
from quantdm.runs.run import MIN_TRIALS, Run
from quantdm.runs.search import start_run
from quantdm.runs.stages import build_bank, describe, load_space
from quantdm.runs.trials import own_trials
from quantdm.runs.tune import tune_run
from quantdm.schemes import ORIGINAL, Scheme
from quantdm.surrogates import SearchSpace
from quantdm.tuning import TuneSettings

ROOT = Path(__file__).resolve().parents[1]
IMAGES, DRAW, STEPS = 500, 101, 20
TRIALS, TRIAL_IMAGES, TRIAL_STEPS = 24, 300, 8  # spread evenly over the ranks of all trials
TUNE_IMAGES = 128  # trajectories, as in the study
PROTOCOL = (
    f"{IMAGES} images, {STEPS} steps, the first of draw {DRAW}; trials: {TRIAL_IMAGES} images, {TRIAL_STEPS} steps. "
    f"One draw: {IMAGES} images are fewer than the 1,280 features of EfficientNet-Lite0, so its Frechet distance is "
    "biased, for all rows of one table alike; KID is not"
)
RULERS = ("digits", "efficientnet-lite0")
KEYS = ("fd:digits", "fd:efficientnet-lite0", "kid:efficientnet-lite0", "psnr", "cosine", "agreement")
RUINED = 0.1
LINKS = ("run.json", "bank", "space.json", "graph.json", "layers.json", "trials", "trials.json")
ORDER = (
    "recipe", "uniform", "one-layer sensitivity", "least weight error", "recipe untuned", "recipe A6",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=known_pipelines())
    parser.add_argument("--run-dir", type=Path, help="of the study; nothing is written there")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--tune", action="store_true", help="without a study: tune what was tuned there anew")
    arguments = parser.parse_args()
    out, study = arguments.out / arguments.model, arguments.run_dir
    run = own_run(arguments.model, out / "own-run") if study is None else linked(study, out / "run")
    result = read_json(ROOT / "eval" / "results" / f"calibrated_{arguments.model}.json", version=1)
    engine = Engine(run, run.open_subject())
    evaluator = engine.local
    rulers = Rulers(evaluator, RULERS, out / "rows")
    named = jobs_of(run, evaluator, result, study) if study else shipped(run, evaluator, result)
    named |= tuned_anew(run, engine, result) if arguments.tune and not study else {}
    draw = Draw(DRAW, IMAGES, STEPS)
    distinct = {run_key(run, job): job for job in named.values()}
    rows = rulers.measure(distinct, [draw], "rows of the table")
    found = {name: rows[run_key(run, job)] for name, job in named.items()}
    mixes = random_jobs(sizes_only(run, evaluator)) if study is None else trial_jobs(run)
    trials = rulers.measure(mixes, [Draw(DRAW, TRIAL_IMAGES, TRIAL_STEPS)], "trials")
    record = {
        "version": 1,
        "model": arguments.model,
        "protocol": PROTOCOL,
        "reference": rulers.measure({"fp": Job(draw)}, [draw], "full precision")["fp"][0]["figures"],
        "sizes": {size: sized(found, size) for size in result["sizes"]},
        "agreement of the table's rows": agreement(rows),
        f"agreement of the table's rows below {RUINED}": agreement(rows, RUINED),
        "agreement of trials": agreement(trials),
        "trials are": "random mixes of all sizes" if study is None else "those of a search",
        "trials": {name: each[0]["figures"] for name, each in trials.items()},
        "versions": versions(),
        "machine": f"{platform.machine()}, {cores()} cores, {run.settings.dtype}",
        "date": datetime.date.today().isoformat(),
    }
    write_json(ROOT / "eval" / "results" / f"second_ruler_{arguments.model}.json", record)
    for kind in ("agreement of the table's rows", "agreement of trials"):
        print(kind, {name: each["spearman"] for name, each in record[kind].items()})


def linked(source: Path, folder: Path) -> Run:
    """Return a run that reads what a study left, and leaves its own samples elsewhere."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in LINKS:
        if not (folder / name).exists():
            os.symlink((source / name).resolve(), folder / name)
    return Run.open(folder)


def own_run(model: str, folder: Path) -> Run:
    """Return a run with nothing but its bank."""
    run, subject = start_run(look_at(model), folder, target_bits=3.0, trials=MIN_TRIALS)
    describe(run, subject)
    build_bank(run, subject)
    return run


def sizes_only(run: Run, evaluator: Evaluator) -> SearchSpace:
    """Return the space of a run without sensitivities: weight errors stand in their place."""
    subject, options = evaluator.subject, run.settings.schemes
    bits = [[count_bits(layer.shape, option, layer.split) for option in options] for layer in subject.layers]
    errors = np.array(
        [[0.0 if o == ORIGINAL else evaluator.bank.weight_error(la.name, o) for o in options] for la in subject.layers]
    )
    return SearchSpace(subject.layers, subject.graph, options, np.array(bits, dtype=np.int64), errors, errors)


def shipped(run: Run, evaluator: Evaluator, result: dict[str, Any]) -> dict[str, Job]:
    """Return "SIZE ROW" -> the shipped recipe as it is, the mix of least weight error and the uniform scheme."""
    space, draw, found = sizes_only(run, evaluator), Draw(0, 0, 0), {}
    for size in SIZES:
        notes = {row["name"]: row["note"] for row in result["sizes"][f"{size:g}"]}
        recipe = load_recipe(ROOT / "recipes" / f"{result['model']}-{size_name(size)}bit-a16.yaml")
        mix = select(space, -space.weight_error, target_bits=size)
        found |= {
            f"{size:g} recipe untuned": Job(draw, {name: recipe.layers[name] for name in space.layer_names}),
            f"{size:g} least weight error": Job(draw, space.config(mix).to_labels()),
            f"{size:g} uniform": Job(draw, space_config(space, Scheme.parse(notes["uniform"]))),
        }
    return found


def tuned_anew(run: Run, engine: Engine, result: dict[str, Any]) -> dict[str, Job]:
    """Return "SIZE recipe" -> the shipped recipe, tuned anew where the study tuned it and it helps here too."""
    found = {}
    for size in SIZES:
        notes = {row["name"]: row["note"] for row in result["sizes"][f"{size:g}"]}
        recipe = load_recipe(ROOT / "recipes" / f"{result['model']}-{size_name(size)}bit-a16.yaml")
        folder, weights = run.path(f"tuned-{size:g}"), None
        if notes["recipe"].endswith("tuned"):
            folder.mkdir(exist_ok=True)
            weights = tune_run(run, engine, recipe, TuneSettings(), images=TUNE_IMAGES, folder=folder)
        labels = {layer.name: recipe.layers[layer.name] for layer in engine.subject.layers}
        found[f"{size:g} recipe"] = Job(Draw(0, 0, 0), labels, tuned=None if weights is None else str(weights))
    return found


def random_jobs(space: SearchSpace) -> dict[str, Job]:
    """Return random mixes of all sizes."""
    choices = sample_configs(space, TRIALS, seed=DRAW)
    return {f"mix {i}": Job(Draw(0, 0, 0), space.config(c).to_labels()) for i, c in enumerate(choices)}


def jobs_of(run: Run, evaluator: Evaluator, result: dict[str, Any], study: Path) -> dict[str, Job]:
    """Return "SIZE ROW" -> what was measured, the most telling rows first; checked against the study's own records."""
    space, draw = load_space(run), Draw(0, 0, 0)
    spec = usual_activations(evaluator.subject.denoiser, ACTIVATION_BITS).model_dump(mode="json")
    found: dict[str, Job] = {}
    for size in SIZES:
        notes = {row["name"]: row["note"] for row in result["sizes"][f"{size:g}"]}
        recipe = load_recipe(ROOT / "recipes" / f"{result['model']}-{size_name(size)}bit-a16.yaml")
        labels = {name: recipe.layers[name] for name in space.layer_names}
        tuned = str(study / f"tuned-{size:g}" / "tuned.safetensors") if "tuned" in notes["recipe"] else None
        mixes = {
            "least weight error": select(space, -space.weight_error, target_bits=size),
            "one-layer sensitivity": select(space, -space.noise_error, target_bits=size),
        }
        rows = {
            f"{size:g} recipe": Job(draw, labels, tuned=tuned),
            f"{size:g} recipe untuned": Job(draw, labels),
            f"{size:g} recipe A6": Job(draw, labels, spec, tuned=tuned),
            f"{size:g} uniform": Job(draw, space_config(space, Scheme.parse(notes["uniform"]))),
            **{f"{size:g} {name}": Job(draw, space.config(choice).to_labels()) for name, choice in mixes.items()},
        }
        found |= {name: replace(job, embeddings=recipe.embeddings) for name, job in rows.items()}
    check(run, found, study)
    return dict(sorted(found.items(), key=lambda item: ORDER.index(item[0].partition(" ")[2])))


def check(run: Run, jobs: dict[str, Job], study: Path) -> None:
    """Check that the study measured these very configurations, on three draws.

    Of tuned weights, which lie in the study's own folder, and of rounded activations only the labels are checked: their
    keys are those of the version that measured them.
    """
    for name, job in jobs.items():
        job = replace(job, tuned=None, activations=None)
        missing = [
            seed
            for seed in (101, 102, 103)
            if not (study / "final" / f"{run_key(run, replace(job, draw=Draw(seed, 1000, STEPS)))}.json").is_file()
        ]
        if missing:
            raise SystemExit(f"error: {name}: {study} has no measurement of this configuration on draws {missing}")


def trial_jobs(run: Run) -> dict[str, Job]:
    """Return trials spread evenly over their ranks by the label of the search."""
    trials = sorted(own_trials(run, load_space(run)), key=lambda t: t["fid_fp"])
    places = np.linspace(0, len(trials) - 1, TRIALS).round().astype(int)
    tables = run.settings.embeddings
    return {f"trial {place}": Job(Draw(0, 0, 0), dict(trials[place]["config"]), embeddings=tables) for place in places}


def sized(found: dict[str, list[dict[str, Any]]], size: str) -> dict[str, Any]:
    """Return the rows of one size, and how far the recipe is from the best uniform scheme by both distances."""
    rows = {name.partition(" ")[2]: each for name, each in found.items() if name.partition(" ")[0] == size}
    recipe = rows.get("recipe", rows["recipe untuned"])
    return {
        "rows": {name: each[0]["figures"] for name, each in rows.items()},
        "recipe - uniform": {
            f"fd:{ruler}": vars(difference(recipe, rows["uniform"], f"fd:{ruler}")) for ruler in RULERS
        },
    }


def agreement(rows: dict[str, list[dict[str, Any]]], below: float = np.inf) -> dict[str, Any] | None:
    """Return the rank agreement of every pair of rulers over rows, of those below a distance by digit features."""
    chosen = {name: each[0]["figures"] for name, each in rows.items() if each[0]["figures"]["fd:digits"] < below}
    return agreements(chosen, KEYS) if len(chosen) > 2 else None


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
