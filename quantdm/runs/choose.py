"""The choice: candidates of every explanation, verified by really measuring them."""

import numpy as np

from quantdm.allocation import select, select_lambda
from quantdm.allocation.candidates import baseline_choices, mean_of_ranks
from quantdm.files import YAML_COMMENT, write_json, write_text
from quantdm.machine import versions
from quantdm.metrics.samples import Draw
from quantdm.metrics.statistics import mean_and_sd
from quantdm.recipe import Provenance, Recipe
from quantdm.runs.engines.local import Engine
from quantdm.runs.run import Run
from quantdm.runs.trials import load_trials
from quantdm.runs.verify import verify
from quantdm.surrogates import Attribution, BlockScores, GraphSurrogate, SearchSpace, score_blocks


def choose(
    run: Run, engine: Engine, space: SearchSpace, attributions: dict[str, Attribution], graph: GraphSurrogate
) -> Recipe:
    """Verify the candidates of every explanation by really measuring them; write selection.json and recipe.yaml."""
    settings = run.settings
    candidates = candidate_choices(run, space, attributions, score_blocks(graph))
    configs = {name: space.config(choice).to_labels() for name, choice in candidates.items()}
    draws = [Draw(settings.seed * 1000 + 2 + i, settings.verify_images, settings.protocol.steps) for i in range(2)]
    figures = verify(run, engine, configs, draws, f"verify: {len(configs)} candidates")
    summary = {
        name: {
            "avg_bits": float(space.avg_bits(candidates[name])[0]),
            **{f"{key}_{kind}": value for kind, row in mean_and_sd(rows).items() for key, value in row.items()},
        }
        for name, rows in figures.items()
    }
    learned = [name for name in candidates if not name.startswith("baseline: ")]
    best = min(learned, key=lambda name: summary[name]["fid_fp_mean"])
    write_json(run.path("selection.json"), {"version": 1, "chosen": best, "candidates": summary, "configs": configs})
    recipe = Recipe(
        model=settings.model,
        layers=configs[best],
        avg_bits=round(summary[best]["avg_bits"], 6),
        provenance=Provenance(
            source=f"measured: {best}, chosen among {len(learned)} candidates by fid_fp",
            quantdm=versions().get("quantdm"),
            seed=settings.seed,
            trials=settings.trials,
            target=f"{settings.target_bits:g} bits per weight",
            measured={key: round(summary[best][key], 6) for key in ("fid_fp_mean", "fid_fp_sd", "psnr_fp_mean")},
        ),
    )
    write_text(run.path("recipe.yaml"), recipe.to_yaml(), YAML_COMMENT)
    return recipe


def candidate_choices(
    run: Run,
    space: SearchSpace,
    attributions: dict[str, Attribution],
    block_scores: tuple[np.ndarray, list[BlockScores]],
    *,
    target_bits: float | None = None,
) -> dict[str, np.ndarray]:
    """Return the configurations worth verifying at a size (default: the run's).

    One per explanation, two that choose whole blocks by `block_scores`, what `score_blocks` says of the graph surrogate
    (exactly within the budget, and by the paper's rule of one price per bit), and the baselines.
    """
    budget = target_bits or run.settings.target_bits
    choices, y = load_trials(run, space)
    found = {name: select(space, a.values, target_bits=budget) for name, a in attributions.items()}
    sensitivity = select(space, -space.noise_error, target_bits=budget)
    found["sensitivity"] = sensitivity
    fits = np.flatnonzero(space.avg_bits(choices) <= budget)
    if len(fits):
        found["best sampled"] = choices[fits[np.argmax(y[fits])]]
    zero, blocks = block_scores
    found["graph, whole blocks"] = select(space, zero.mean(axis=0), blocks=blocks, target_bits=budget)
    found["lambda mode"], _ = select_lambda(space, zero.mean(axis=0), blocks=blocks, target_bits=budget)
    mixed = mean_of_ranks([a.values for a in attributions.values()])
    found["mean of surrogates"] = select(space, mixed, target_bits=budget)
    return found | baseline_choices(space, budget)
