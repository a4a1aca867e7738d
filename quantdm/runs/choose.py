"""The choice: candidates of every explanation, verified by really measuring them."""

from typing import Any

import numpy as np

from quantdm.allocation import select, select_lambda
from quantdm.allocation.candidates import BASELINE, LEAST_WEIGHT_ERROR, baseline_choices, mean_of_standardised
from quantdm.allocation.pruning import dominated, prune
from quantdm.files import YAML_COMMENT, check_replaceable, digest, read_json, write_json, write_text
from quantdm.machine import versions
from quantdm.metrics.samples import Draw
from quantdm.metrics.statistics import mean_and_sd, totals
from quantdm.pipelines.seen import Seen
from quantdm.recipe import Provenance, Recipe, joint_rules, load_recipe
from quantdm.runs.engines.local import Engine
from quantdm.runs.explain import BY_BLOCKS, is_current
from quantdm.runs.labels import calibration_of, label_bits, labels_of, tables_of
from quantdm.runs.run import Run
from quantdm.runs.split import load_split, notes_of, rules_in
from quantdm.runs.stages import RECORD_VERSION
from quantdm.runs.trials import load_trials
from quantdm.runs.verify import race
from quantdm.surrogates import Attribution, BlockScores, GraphSurrogate, SearchSpace, score_blocks

# Standard deviations over folds by which scores of whole blocks are lowered: of 0 to 4 the best on planted truths of
# four kinds (eval/results/planted_kinds.json); the best of thousands of assignments is else the luckiest.
CAUTION = 0.5


def choose(
    run: Run, engine: Engine, space: SearchSpace, attributions: dict[str, Attribution], graph: GraphSurrogate
) -> Recipe:
    """Verify the candidates of every explanation by really measuring them; write selection.json and recipe.yaml.

    A selection that was made from the same explanations is kept, and so is the recipe beside it.
    """
    fitted = read_json(run.path("surrogate.json"), version=RECORD_VERSION)["inputs"]
    explained = {name: a.to_dict() for name, a in attributions.items()}
    path, inputs = (
        run.path("selection.json"),
        digest(fitted, explained, run.settings.model_dump(mode="json", exclude={"location"}), *_shared(run)),
    )
    if not is_current(path, inputs):
        check_replaceable(run.path("recipe.yaml"))  # one that was changed by hand is nobody's to replace
        found = _select(run, engine, space, attributions, graph)
        run.path("recipe.yaml").unlink(missing_ok=True)  # first: a selection never stands beside another's recipe
        write_json(path, {"version": RECORD_VERSION, "inputs": inputs, **found})
    selection = read_json(path, version=RECORD_VERSION)
    if not run.path("recipe.yaml").is_file():
        write_text(run.path("recipe.yaml"), _recipe_of(run, selection).to_yaml(), YAML_COMMENT)
    return _as_it_is(run, load_recipe(run.path("recipe.yaml")), space, selection["configs"][selection["chosen"]])


def _shared(run: Run) -> list[Any]:
    """Return the split of a budget for the whole pipeline, on which a recipe depends too, if there is one."""
    split = load_split(run.folder, run.settings)
    return [] if split is None else [split]


def verification_draws(run: Run) -> list[Draw]:
    """Return the noises on which candidates are compared."""
    settings = run.settings
    base, steps = settings.seed * 1000 + 2, settings.steps_of_verification
    return [Draw(base + i, settings.verify_images, steps) for i in range(settings.verify_draws)]


def _select(
    run: Run, engine: Engine, space: SearchSpace, attributions: dict[str, Attribution], graph: GraphSurrogate
) -> dict[str, Any]:
    """Measure every candidate and return which was best, their figures and their configurations.

    Candidates race: what is clearly worse than the best of its kind after some draws is not measured on the others. Of
    what needs no search the recipe is no candidate: once the best of one scheme everywhere is known, it is enough.
    """
    candidates = candidate_choices(run, space, attributions, score_blocks(graph))
    configs = {name: space.config(choice).to_labels() for name, choice in candidates.items()}
    learned = [name for name in candidates if not name.startswith(BASELINE)]
    uniform = [name for name in candidates if name.startswith(BASELINE) and name != LEAST_WEIGHT_ERROR]
    draws = verification_draws(run)
    what = f"verify: {len(configs)} candidates"
    figures = race(run, engine, configs, draws, what, groups=[learned], settled=[uniform, [LEAST_WEIGHT_ERROR]])
    summary = {
        name: {
            "avg_bits": float(space.avg_bits(candidates[name])[0]),
            **{f"{key}_{kind}": value for kind, row in mean_and_sd(rows).items() for key, value in row.items()},
            **totals(rows),
            "draws": len(rows),
        }
        for name, rows in figures.items()
    }
    best = min((n for n in learned if len(figures[n]) == len(draws)), key=lambda name: summary[name]["fid_fp_mean"])
    return {"chosen": best, "candidates": summary, "configs": configs}


def _recipe_of(run: Run, selection: dict[str, Any]) -> Recipe:
    """Return the chosen candidate as a recipe with its figures."""
    settings, best, split = run.settings, selection["chosen"], load_split(run.folder, run.settings)
    figures = selection["candidates"][best]
    learned = [name for name in selection["configs"] if not name.startswith(BASELINE)]
    rules = joint_rules(selection["configs"][best], settings.seen.denoisers, embeddings=settings.embeddings)
    others = {} if split is None else split["parts"]
    rules["components"] |= {name: own for name, part in others.items() if (own := rules_in(part)) is not None}
    whole = "" if split is None else f"{split['target_bytes']} bytes, the weights of the whole pipeline, which leave "
    return Recipe(
        model=settings.model,
        **rules,
        calibration=calibration_of(settings, selection["configs"][best]),
        avg_bits=round(figures["avg_bits"], 6),
        provenance=Provenance(
            source=f"measured: {best}, chosen among {len(learned)} candidates by fid_fp",
            quantdm=versions().get("quantdm"),
            seed=settings.seed,
            trials=read_json(run.path("surrogate.json"), version=RECORD_VERSION).get("trials", settings.trials),
            target=f"{whole}{settings.target_bits:g} bits per weight",
            weights=settings.seen.weights,
            notes=dense_note(settings.seen) if split is None else notes_of(split),
            measured={
                key: round(figures[key], 6)
                for key in ("fid_fp_mean", "fid_fp_sd", "psnr_fp_mean")
                if figures[key] is not None  # equal images have no PSNR, a single draw no spread
            },
        ),
    )


def _as_it_is(run: Run, recipe: Recipe, space: SearchSpace, chosen: dict[str, str | None]) -> Recipe:
    """Return a run's recipe; one that was changed by hand loses the figures that were measured of the chosen one."""
    labels = labels_of(run, recipe, space.layers)
    if labels == chosen and tables_of(run, recipe, space.layers) == run.settings.embeddings:
        return recipe
    provenance = recipe.provenance.model_copy(
        update={"source": f"{recipe.provenance.source}; then changed by hand, not measured", "measured": {}}
    )
    bits = label_bits(space, labels) / int(space.num_weights.sum())
    return recipe.model_copy(update={"avg_bits": round(bits, 6), "provenance": provenance})


def dense_note(seen: Seen) -> tuple[str, ...]:
    """Return what a recipe says of the networks that it leaves as they are."""
    names = [name for name, part in seen.parts.items() if part.dtype is not None and name not in seen.denoisers]
    return (f"not quantized: {', '.join(names)}",) if names else ()


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
    (exactly within the budget, with scores bounded by their spread, and by the paper's rule of one price per bit), and
    the baselines.
    """
    budget = target_bits or run.settings.target_bits
    choices, y = load_trials(run, space)
    barred = dominated(space)
    found = {name: select(space, a.values, target_bits=budget, forbidden=barred) for name, a in attributions.items()}
    sensitivity = select(space, -space.noise_error, target_bits=budget)
    found["sensitivity"] = sensitivity
    fits = np.flatnonzero(space.avg_bits(choices) <= budget)
    if len(fits):
        found["best sampled"] = choices[fits[np.argmax(y[fits])]]
    zero, blocks = block_scores
    cautious = [block.bounded(CAUTION) for block in blocks]
    whole = select(space, zero[0], blocks=cautious, target_bits=budget)
    found[BY_BLOCKS[0]] = prune(space, whole)[0]
    priced, _ = select_lambda(space, zero.mean(axis=0), blocks=blocks, target_bits=budget)
    found[BY_BLOCKS[1]] = prune(space, priced)[0]
    mixed = mean_of_standardised([a.values for a in attributions.values()])
    found["mean of surrogates"] = select(space, mixed, target_bits=budget, forbidden=barred)
    return found | baseline_choices(space, budget)
