"""The search: from a pipeline and a size to a recipe, through every stage, resumable at any moment."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantdm.denoisers.layers import LayerRecord, list_layers
from quantdm.denoisers.pipeline import REFERENCE, DiffusionPipeline, get_denoiser, known_pipelines, load_pipeline
from quantdm.denoisers.protocol import Protocol, known_protocols, load_protocol
from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.quantizers import count_bits
from quantdm.recipe import Provenance, Recipe
from quantdm.schemes import DEFAULT_OPTIONS, ORIGINAL_BITS, Scheme
from quantdm.search import stages
from quantdm.search.engine import Engine
from quantdm.search.evaluation import Draw, mean_and_sd
from quantdm.search.run import Run, RunSettings, fast_dtype, fingerprint, versions
from quantdm.surrogates import (
    Attribution,
    BlockScores,
    GraphSurrogate,
    SearchSpace,
    score_blocks,
    select,
    select_lambda,
)

MIN_TRIALS = 30


@dataclass(frozen=True)
class Effort:
    """How much is measured in a search.

    `label_images` at `label_steps` per trial, `verify_images` per draw for each of the best candidates, `noise_images`
    for the one-layer noise errors.
    """

    label_images: int = 300
    label_steps: int = 8
    verify_images: int = 500
    noise_images: int = 16


FULL, QUICK = Effort(), Effort(80, 5, 100, 4)


def search(
    pipe: DiffusionPipeline,
    *,
    target_bits: float | None = None,
    target_bytes: int | None = None,
    trials: int = 160,
    run_dir: str | Path,
    seed: int = 0,
    options: Sequence[Scheme] = DEFAULT_OPTIONS,
    protocol: Protocol | None = None,
    effort: Effort = FULL,
    workers: int | None = None,
) -> Recipe:
    """Find the configuration of a pipeline's denoiser that keeps the images closest at a given size.

    Args:
        pipe: the full-precision pipeline; its denoiser is left as it was.
        target_bits: average bits per quantizable weight, codebooks and scales included.
        target_bytes: or the size of the denoiser on disk.
        trials: configurations whose images are measured.
        run_dir: where every stage leaves its record; the same call goes on where it was interrupted.
        seed: determines the sampled configurations, all noises and the surrogates.
        options: the schemes that every layer may take.
        protocol: what images are asked for (None: the shipped one of the model's name).
        effort: images and steps per measurement.
        workers: processes (None: one per core where the pipeline can be loaded again from its source).

    Returns:
        The recipe; it lies in `run_dir/recipe.yaml` too.

    Raises:
        QuantDMError: target out of reach (the range is stated), too few trials, no protocol, a run directory that
            belongs to another run.
    """
    settings = make_settings(
        pipe,
        target_bits=target_bits,
        target_bytes=target_bytes,
        trials=trials,
        seed=seed,
        options=options,
        protocol=protocol,
        effort=effort,
    )
    run = Run.create(run_dir, settings)
    with open_engine(run, pipe, workers=workers) as engine:
        return find_recipe(run, engine, pipe)


def make_settings(
    pipe: DiffusionPipeline,
    *,
    target_bits: float | None,
    target_bytes: int | None,
    trials: int,
    seed: int,
    options: Sequence[Scheme] = DEFAULT_OPTIONS,
    protocol: Protocol | None = None,
    effort: Effort = FULL,
) -> RunSettings:
    """Return the checked settings of a search; see `search` for the arguments and errors."""
    least = max(MIN_TRIALS, 2 * len(options))
    if trials < least:
        raise QuantDMError(f"trials: got {trials}, expected at least {least}: the surrogates learn nothing from fewer")
    denoiser = get_denoiser(pipe)
    name = model_name(pipe)
    return RunSettings(
        model=name,
        fingerprint=fingerprint(denoiser),
        options=tuple(scheme.label for scheme in options),
        target_bits=checked_target(
            list_layers(denoiser), options, denoiser, target_bits=target_bits, target_bytes=target_bytes
        ),
        trials=trials,
        seed=seed,
        protocol=protocol or default_protocol(name),
        dtype=fast_dtype(),
        **asdict(effort),
    )


def find_recipe(run: Run, engine: Engine, pipe: DiffusionPipeline) -> Recipe:
    """Run every stage of the search that has no record yet."""
    denoiser = get_denoiser(pipe)
    stages.describe(run, denoiser)
    bank = stages.build_bank(run, pipe)
    space = stages.measure_space(run, engine, denoiser, bank)
    stages.run_trials(run, engine, space)
    fitted = stages.fit_surrogates(run, space, *stages.load_trials(run, space))
    return choose(run, engine, space, stages.explain(run, fitted), fitted["graph"])


def choose(
    run: Run, engine: Engine, space: SearchSpace, attributions: dict[str, Attribution], graph: GraphSurrogate
) -> Recipe:
    """Verify the candidates of every explanation by really measuring them; write selection.json and recipe.yaml."""
    settings = run.settings
    candidates = candidate_choices(run, space, attributions, score_blocks(graph))
    configs = {name: space.config(choice).to_labels() for name, choice in candidates.items()}
    draws = [Draw(settings.seed * 1000 + 2 + i, settings.verify_images, settings.protocol.steps) for i in range(2)]
    figures = stages.verify(run, engine, configs, draws, f"verify: {len(configs)} candidates")
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
    recipe.save(run.path("recipe.yaml"))
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
    choices, y = stages.load_trials(run, space)
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


def baseline_choices(space: SearchSpace, target_bits: float) -> dict[str, np.ndarray]:
    """Return what needs no search: the smallest uniform bit-width of every method at no fewer bits than the budget,
    and the mix with the least weight error."""
    found = {"baseline: least weight error": select(space, -space.weight_error, target_bits=target_bits)}
    kinds = {(s.method, s.granularity, s.group_size) for s in space.options}
    for kind in sorted(kinds, key=str):
        of_kind = [i for i, s in enumerate(space.options) if (s.method, s.granularity, s.group_size) == kind]
        for index in sorted(of_kind, key=lambda i: space.options[i].bits):
            choice = np.full(len(space.layers), index)
            if space.avg_bits(choice)[0] >= target_bits:
                found[f"baseline: {space.options[index].label}"] = choice
                break
    return found


def mean_of_ranks(tables: Sequence[np.ndarray]) -> np.ndarray:
    """Average value tables [L, O] after scaling each to unit spread within its layers."""
    centred = [table - table.mean(axis=1, keepdims=True) for table in tables]
    return np.mean([table / max(float(table.std()), 1e-12) for table in centred], axis=0)


# ------------------------------------------------------------------------------------------------- model and target


def model_name(pipe: DiffusionPipeline) -> str:
    """Return the name or path a pipeline was loaded from ("" for one that was built in memory)."""
    source = str(getattr(pipe, "name_or_path", "") or "")
    for name in known_pipelines():
        if source and Path(source) == REFERENCE / name:
            return name
    return source


def open_engine(run: Run, pipe: DiffusionPipeline, *, workers: int | None = None) -> Engine:
    """Return an engine that works on the pipeline's source where it can be loaded again, else on the live pipeline."""
    source = run.settings.model
    same = bool(source) and fingerprint(get_denoiser(load_pipeline(source))) == run.settings.fingerprint
    on_cpu = get_denoiser(pipe).device == torch.device("cpu")
    return Engine(run, pipe=None if same and on_cpu else pipe, workers=workers)


def default_protocol(model: str) -> Protocol:
    """Return the shipped protocol of a model.

    Raises:
        QuantDMError: there is none; says how to write one.
    """
    if model in known_protocols():
        return load_protocol(model)
    raise QuantDMError(
        f"no protocol for model {model or '(built in memory)'!r}; pass protocol=load_protocol('my.yaml') with the "
        f"prompts or class labels to measure on (examples: {', '.join(known_protocols())} in calib_data)"
    )


def reachable_bits(layers: Sequence[LayerRecord], options: Sequence[Scheme]) -> tuple[float, float]:
    """Return the smallest and the largest average bits that the options allow."""
    table = np.array([[count_bits(layer.shape, scheme, layer.split) for scheme in options] for layer in layers])
    weights = sum(layer.num_weights for layer in layers)
    return table.min(axis=1).sum() / weights, table.max(axis=1).sum() / weights


def unquantized_bytes(layers: Sequence[LayerRecord], denoiser: torch.nn.Module) -> int:
    """Return the bytes of a denoiser's biases, norms and embeddings at their original 16 bits."""
    total = sum(p.numel() for p in denoiser.parameters()) + sum(b.numel() for b in denoiser.buffers())
    return (total - sum(layer.num_weights for layer in layers)) * ORIGINAL_BITS // 8


def checked_target(
    layers: Sequence[LayerRecord],
    options: Sequence[Scheme],
    denoiser: torch.nn.Module,
    *,
    target_bits: float | None,
    target_bytes: int | None,
) -> float:
    """Return the target as average bits per weight.

    Raises:
        QuantDMError: none or both given, or out of reach; the reachable range is stated in the unit that was given.
    """
    if (target_bits is None) == (target_bytes is None):
        raise QuantDMError("target: give exactly one of target_bits (per weight) and target_bytes (denoiser on disk)")
    low, high = reachable_bits(layers, options)
    weights, rest = sum(layer.num_weights for layer in layers), unquantized_bytes(layers, denoiser)
    if target_bits is None:
        assert target_bytes is not None
        bits = (target_bytes - rest) * 8 / weights
        if not low <= bits <= high:
            raise QuantDMError(
                f"target: got {target_bytes} bytes, but these options reach {int(low * weights / 8) + rest + 1} to "
                f"{int(high * weights / 8) + rest} bytes, of which {rest} are not quantized"
            )
        return bits
    if not low <= target_bits <= high:
        raise QuantDMError(
            f"target: got {target_bits} bits per weight, but these options reach {low:.4f} to {high:.4f}"
        )
    return float(target_bits)


def summary_of(run: Run) -> dict[str, Any]:
    """Return what every summary says about a run."""
    scores = read_json(run.path("surrogate.json"), version=1)
    return {
        "model": run.settings.model,
        "seed": run.settings.seed,
        "trials": scores["trials"],
        "surrogate": {name: float(np.mean(folds)) for name, folds in scores["held_out_spearman"].items()},
        "surrogate_sd": {name: float(np.std(folds)) for name, folds in scores["held_out_spearman"].items()},
        "without_learning": scores["without_learning"],
        "versions": versions(),
    }
