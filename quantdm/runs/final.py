"""The final measurement of a run: the result rows on noises that the search never saw, and the summary."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

from torch import Tensor

from quantdm.allocation.candidates import BASELINE, LEAST_WEIGHT_ERROR
from quantdm.correction import load_correction
from quantdm.errors import counted
from quantdm.files import digest, load_tensors, read_json, save_tensors, tensors_digest
from quantdm.hub.export import configuration_digest
from quantdm.hub.size import ExportSize
from quantdm.metrics import frechet_distance
from quantdm.metrics.samples import Draw
from quantdm.metrics.statistics import mean_and_sd, totals
from quantdm.progress import bar
from quantdm.recipe import ActivationSpec, Recipe
from quantdm.runs.engines.local import Engine
from quantdm.runs.evaluator import Job
from quantdm.runs.jobs import measure_jobs
from quantdm.runs.labels import label_bits, labels_of, tables_of
from quantdm.runs.other_weights import OtherWeights
from quantdm.runs.run import Run
from quantdm.runs.split import parts_of
from quantdm.runs.store import TrialStore
from quantdm.runs.verify import fid_difference, plain
from quantdm.schemes import COMPARED, ORIGINAL_BITS, QuantConfig, Scheme
from quantdm.surrogates import SearchSpace

GRID_IMAGES = 40
ALWAYS = 2  # draws that every row runs: fewer have no spread
OTHERWISE = ("seconds",)  # what a row says in its own way; all else that was measured has a mean and a deviation
GRID_ROWS = ("fp", "uniform-next-width", "recipe", "recipe+a6+correction")


def final_draws(run: Run, *, images: int, count: int = 3) -> list[Draw]:
    """Return draws whose noises differ from all of the search's."""
    return [Draw(run.settings.seed * 1000 + 101 + i, images, run.settings.protocol.steps) for i in range(count)]


def final_jobs(
    run: Run,
    space: SearchSpace,
    recipe: Recipe,
    activations: ActivationSpec,
    correction: str | None,
    tuned: str | None = None,
) -> dict[str, tuple[Job, str]]:
    """Return row name -> (job without its draw, note) of the result table.

    "uniform-next-width" is one scheme everywhere, the best by verification of those that are no smaller than the target
    (the note names it); "least-weight-error" and "sensitivity-same-size"
    are mixes of the target's size.

    Raises:
        QuantDMError: the recipe does not fit the denoiser, or quantizes further parts of the pipeline.
    """
    selection = read_json(run.path("selection.json"), version=1)
    configs, uniform = selection["configs"], _best_uniform(selection)
    chosen, tables = labels_of(run, recipe, space.layers), tables_of(run, recipe, space.layers)
    note = selection["chosen"] if chosen == configs[selection["chosen"]] else "changed by hand"
    uniform_4, kmeans_4 = COMPARED
    draw = Draw(0, 0, 0)  # replaced by every final draw
    spec = activations.model_dump(mode="json")
    note += "" if tuned is None else ", tuned"
    corrected = Job(draw, chosen, spec, correction, tuned), "6-bit activations, corrected sampler"
    untuned = {} if tuned is None else {"recipe-untuned": (Job(draw, chosen), "before tuning")}
    jobs = {
        "fp": (Job(draw), f"{ORIGINAL_BITS}-bit weights"),
        "uniform-w4": (Job(draw, space_config(space, uniform_4)), f"{uniform_4} everywhere"),
        "kmeans-w4": (Job(draw, space_config(space, kmeans_4)), f"{kmeans_4} everywhere"),
        "uniform-next-width": (Job(draw, configs[uniform]), uniform.removeprefix(BASELINE)),
        "least-weight-error": (Job(draw, configs[LEAST_WEIGHT_ERROR]), "knapsack on weight errors"),
        "sensitivity-same-size": (Job(draw, configs["sensitivity"]), "knapsack on one-layer noise errors"),
        **untuned,
        "recipe": (Job(draw, chosen, tuned=tuned), note),
        "recipe+a6": (Job(draw, chosen, spec, tuned=tuned), "6-bit activations"),
        **({} if correction is None else {"recipe+a6+correction": corrected}),
    }
    usual, own = with_tables(jobs, run.settings.embeddings), with_tables(jobs, tables)
    found = {name: (own if name.startswith("recipe") else usual)[name] for name in jobs}
    parts = parts_of(run, recipe)  # in every quantized row: what differs are the denoisers
    return {n: (job if job.labels is None else replace(job, parts=parts), note) for n, (job, note) in found.items()}


def _best_uniform(selection: dict[str, Any]) -> str:
    """Return the best by verification of the candidates with one scheme everywhere."""
    figures, configs = selection["candidates"], selection["configs"]
    uniforms = [name for name in configs if name.startswith(BASELINE) and name != LEAST_WEIGHT_ERROR]
    most = max(figures[name].get("draws", 0) for name in uniforms)  # one that was left out ran fewer, perhaps easy ones
    finished = [name for name in uniforms if figures[name].get("draws", 0) == most]
    return min(finished, key=lambda name: figures[name]["fid_fp_mean"])


def with_tables(
    jobs: dict[str, tuple[Job, str]], embeddings: str | dict[str, str] | None
) -> dict[str, tuple[Job, str]]:
    """Return jobs whose quantized configurations also have their embedding tables under a scheme, or each its own."""
    return {
        name: (job if job.labels is None else replace(job, embeddings=embeddings), note)
        for name, (job, note) in jobs.items()
    }


def space_config(space: SearchSpace, scheme: Scheme) -> dict[str, str | None]:
    """Return the same scheme for every layer, as labels."""
    return QuantConfig.uniform(space.layer_names, scheme).to_labels()


def measure_rows(
    run: Run,
    engine: Engine,
    space: SearchSpace,
    jobs: dict[str, tuple[Job, str]],
    draws: Sequence[Draw],
    size: ExportSize,
    *,
    against: str | None = None,
) -> list[dict[str, Any]]:
    """Measure every row on every draw; return one record per row: means, deviations, counts, size of the files.

    A row whose fid_fp is clearly another than that of the row `against` after ALWAYS draws, by the paired interval over
    images of equal noises, is not measured on the others. None: every row runs all draws.
    """
    store = TrialStore(run.path("final"))
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    running = list(jobs)
    what = f"final: {counted(len(jobs), 'row')} x {counted(len(draws), 'draw')}"
    with bar(len(_distinct(run, jobs, running, draws)), what) as progress:
        for heat in [draws] if against is None else [draws[:ALWAYS], draws[ALWAYS:]]:
            work = _distinct(run, jobs, running, heat)
            found = measure_jobs(engine, store, work, progress=progress, method="measure_final")
            for name in running:
                measured[name] += [found[run_key(run, replace(jobs[name][0], draw=draw))] for draw in heat]
            running = [n for n in running if n == against or not _apart(measured, n, against)]
        progress.total = progress.n  # measurements that were not needed are none that are missing
    return [
        _row(space, name, job, note, [plain(record) for record in measured[name]], size, engine.local.others)
        for name, (job, note) in jobs.items()
    ]


def _distinct(
    run: Run, jobs: dict[str, tuple[Job, str]], names: Sequence[str], draws: Sequence[Draw]
) -> dict[str, Job]:
    """Return the jobs of rows by key: two rows may be the same configuration."""
    work = [replace(jobs[name][0], draw=draw) for name in names for draw in draws]
    return {run_key(run, job): job for job in work}


def _apart(measured: dict[str, list[dict[str, Any]]], name: str, against: str | None) -> bool:
    """Tell whether a row's fid_fp clearly differs from that of the row it is held against."""
    found = None if against is None else fid_difference(measured[name], measured[against])
    return found is not None and found.clear


def _row(
    space: SearchSpace, name: str, job: Job, note: str, measured: Sequence[dict[str, Any]], size: ExportSize,
    others: OtherWeights,
) -> dict[str, Any]:  # fmt: skip
    """Return one result row from its figures on every draw."""
    figures, bits, labels = mean_and_sd(measured), row_bits(space, job), _with_own_tables(job, size)
    return {
        "name": name,
        "note": note,
        "configuration": _configuration(job, size, others.labels(job.parts)),
        "avg_bits": bits / int(space.num_weights.sum()),
        "denoiser_bytes": size.of(labels),
        "left": {} if labels is None else dict(size.left(labels)),
        **{key: mean for key, mean in figures["mean"].items() if key not in OTHERWISE},
        **{f"{key}_sd": sd for key, sd in figures["sd"].items() if key not in OTHERWISE},
        **totals(measured),
        "draws": len(measured),
        "seconds": round(figures["mean"]["seconds"] or 0.0, 3),
    }


def _with_own_tables(job: Job, size: ExportSize) -> dict[str, str | None] | None:
    """Return the labels of a job, those of its embedding tables too where they are not what the size takes for all."""
    if job.labels is None or not isinstance(job.embeddings, dict):
        return job.labels
    others = dict.fromkeys(name for name in size.with_tables(job.labels) if name not in job.labels)
    return {**others, **job.embeddings, **job.labels}


def _configuration(job: Job, size: ExportSize, others: Mapping[str, str]) -> str | None:
    """Return what a row measured as one hash, by which an export finds its figures; `others`: layers of other parts."""
    labels = _with_own_tables(job, size)
    if labels is None:
        return None
    tuning = None if job.tuned is None else tensors_digest(job.tuned)
    return configuration_digest({**size.with_tables(labels), **others}, job.activations, job.correction, tuning)


def run_key(run: Run, job: Job) -> str:
    """Return the key of a final measurement; a correction and a tuning count by content, wherever the run lies.

    A correction that found nothing to do counts as none; metrics count that the protocol asks for.
    """
    used = {"tuned": job.tuned, "correction": None if _is_idle(job.correction) else job.correction}
    files = {kind: _content(path) for kind, path in used.items() if path is not None}
    own = [files] if files else []
    own += [run.settings.protocol.metrics] if run.settings.protocol.metrics else []
    return digest(replace(job, correction=None, tuned=None).key, *own) if own else job.key


def _content(path: str) -> str:
    """Return the hash of what a file of tensors holds; one that has not changed is not read again."""
    stat = Path(path).stat()
    return _digest_of(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)
def _digest_of(path: str, changed: int, size: int) -> str:
    return tensors_digest(path)


def _is_idle(correction: str | None) -> bool:
    return correction is not None and load_correction(Path(correction)).variant == "none"


def row_bits(space: SearchSpace, job: Job) -> int:
    """Return the exact bits of a job's quantizable weights (16 each when nothing is quantized)."""
    if job.labels is None:
        return int(space.num_weights.sum()) * ORIGINAL_BITS
    return label_bits(space, job.labels)


def sampling_noise(engine: Engine, draws: Sequence[Draw]) -> dict[str, float | None]:
    """Return the Frechet distance between full-precision draws of different noises: sampling noise.

    Its mean and standard deviation over pairs of draws; None where one pair, or none, tells nothing of them.
    """
    features = [engine.local.reference(draw).features for draw in draws]
    distances = [{"d": frechet_distance(a, b)} for a, b in combinations(features, 2)]
    figures = mean_and_sd(distances) if distances else {"mean": {}, "sd": {}}
    return {kind: figures[kind].get("d") for kind in ("mean", "sd")}


def save_grids(run: Run, engine: Engine, jobs: dict[str, tuple[Job, str]], draw: Draw) -> None:
    """Write samples.safetensors: the first images of a final draw, equal seeds in every row.

    Grids of the same jobs that are there are kept.
    """
    few, path = replace(draw, images=min(GRID_IMAGES, draw.images)), run.path("samples.safetensors")
    names = [name if name in jobs else "recipe+a6" for name in GRID_ROWS]  # not every sampler can be corrected
    shown = {name: jobs[name][0] for name in names}
    work = {name: replace(job, draw=few) for name, job in shown.items()}
    keys = {name: run_key(run, job) for name, job in work.items()}
    inputs = digest(keys)
    if path.is_file() and load_tensors(path)[1].get("inputs") == inputs:
        return
    images: dict[str, Tensor] = {}  # of every configuration once, and of full precision those that are there
    for name, job in work.items():
        if keys[name] not in images:
            found = engine.local.reference(draw) if job == Job(few) else engine.local.samples(job)
            images[keys[name]] = found.images[: few.images * found.frames]
    save_tensors(path, {name: images[key].clone() for name, key in keys.items()}, {"inputs": inputs})
