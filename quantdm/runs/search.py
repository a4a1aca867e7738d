"""The search: from a pipeline and a size to a recipe, through every stage, resumable at any moment."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from quantdm.errors import check_kind
from quantdm.files import check_output, write_json
from quantdm.machine import checked_device
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.protocol import Protocol
from quantdm.pipelines.subject import Subject, look_at
from quantdm.recipe import Recipe
from quantdm.runs.choose import choose
from quantdm.runs.engines.choice import check_engine, open_engine
from quantdm.runs.engines.local import Engine
from quantdm.runs.explain import explain, fit_surrogates
from quantdm.runs.failure import told_why
from quantdm.runs.learned import check_donors, learn_from
from quantdm.runs.run import MANIFEST, Run, RunSettings
from quantdm.runs.settings import FULL, FULL_TRIALS, Effort, check_dtype, check_given, make_settings
from quantdm.runs.shares import settle
from quantdm.runs.snapshot import keep_snapshot
from quantdm.runs.split import settled
from quantdm.runs.stages import LEARNED_FILE, build_bank, describe, measure_space
from quantdm.runs.target import check_one_target
from quantdm.runs.trials import load_labels, run_trials
from quantdm.runs.why import explain_choice
from quantdm.schemes import DEFAULT_OPTIONS, TABLE_SCHEME, Scheme


def search(
    pipe: DiffusionPipeline | str | Path,
    *,
    target_bits: float | None = None, target_bytes: int | None = None, target_pipeline_bytes: int | None = None,
    trials: int = FULL_TRIALS, run_dir: str | Path,
    seed: int = 0,
    options: Sequence[Scheme] = DEFAULT_OPTIONS,
    protocol: Protocol | None = None,
    effort: Effort = FULL,
    workers: int | None = None,
    example_inputs: Mapping[str, Any] | None = None,
    batch_size: int | Literal["auto"] = "auto", device: str | None = None, dtype: str | None = None,
    embeddings: Scheme | None = TABLE_SCHEME,
    engine: str = "local", ray_address: str | None = None, fidelity: str | None = None,
    learned_from: Sequence[str | Path] = (),
) -> Recipe:  # fmt: skip
    """Find the configuration of a pipeline's denoisers that keeps the images closest at a given size.

    Args:
        pipe: the full-precision pipeline, or its name (embedded, directory, hub id). A live one is measured as it is,
            with its scheduler, parts, dtype and device, and left as it was; one that is named is measured in the dtype
            that is fast here.
        target_bits: average bits per quantizable weight, codebooks and scales included.
        target_bytes: or the size of the denoiser on disk.
        target_pipeline_bytes: or that of all parts on disk, text encoders and VAE in the budget; how they share it is
            measured before the trials.
        trials: configurations whose images are measured.
        run_dir: where every stage leaves its record; the same call goes on where it was interrupted.
        seed: determines the sampled configurations, all noises and the surrogates.
        options: the schemes that every layer may take.
        protocol: what images are asked for (None: the shipped one of the model's name).
        effort: images and steps per measurement.
        workers: processes (None: one per core), or on each accelerator (None: one).
        example_inputs: keyword arguments of one call of the denoiser, where its class and configuration do not tell
            them (see `capture_inputs`).
        batch_size: images at once at most ("auto": found from memory); halved where memory runs out.
        device: where a pipeline that is named is put (None: CUDA if there is any).
        dtype: in which images are generated: bfloat16, float16 or float32 (None: what is fast here, a live pipeline's
            own). A pipeline that is stored in it is opened in it, and calibrated in it.
        embeddings: scheme of embedding tables, which are not searched (None: they stay as they are). A run that goes on
            keeps its own if it is not asked for another than the default.
        engine: what measures: "local" (processes of this machine) or "ray" (a cluster; docs/cluster.md).
        ray_address: of a Ray cluster that runs (None: one of its own, on this machine).
        fidelity: "full": every trial is measured by its images; "auto": most get a cheap label, if it ranks alike
            (None: a run that goes on keeps its own, a new one has "full").
        learned_from: run directories of other models: what their trials say of roles and options chooses where the
            first trials lie (docs/method.md, Surrogates). A run that goes on keeps what it learned.

    Returns:
        The recipe; it lies in `run_dir/recipe.yaml` too.

    Raises:
        QuantDMError: target out of reach (the range is stated), too few trials, no protocol, a run directory that
            belongs to another run or to another pipeline (the difference is named).
    """
    check_engine(engine, ray_address)
    check_one_target(target_bits, target_bytes, target_pipeline_bytes)
    check_given(trials, options, protocol, dtype, fidelity)
    check_kind(effort, Effort, "effort", "give quantdm.Effort(...); quantdm.run takes a word")
    subject = look_for_run(
        pipe, run_dir, example_inputs=example_inputs, device=device, dtype=dtype, learned_from=learned_from
    )
    run, subject = start_run(
        subject, run_dir,
        target_bits=target_bits, target_bytes=target_bytes, target_pipeline_bytes=target_pipeline_bytes,
        trials=trials, seed=seed, options=options,
        protocol=protocol,
        effort=effort, dtype=dtype, embeddings=embeddings, fidelity=fidelity,
        learned_from=learned_from,
    )  # fmt: skip
    how: dict[str, Any] = {"workers": workers, "batch_size": batch_size, "ray_address": ray_address}
    with told_why(run.folder), open_engine(run, subject, engine, **how) as opened:
        return find_recipe(run, opened, subject)


def look_for_run(
    pipe: DiffusionPipeline | str | Path,
    run_dir: str | Path,
    *,
    example_inputs: Mapping[str, Any] | None = None,
    device: str | None = None,
    dtype: str | None = None,
    learned_from: Sequence[str | Path] = (),
) -> Subject:
    """Open and look at what a run is of, on a device that is there; see `search` for the arguments.

    A run that is there decides in which dtype a named pipeline is opened: that in which it started. Whoever goes on
    need not say it again.

    Raises:
        QuantDMError: no such dtype or device, a run directory that is none, or a pipeline that cannot be looked at.
    """
    check_output(run_dir, folder=True)  # before anything is opened
    check_dtype(dtype)
    place = None if device is None else checked_device(device)
    known = _known(run_dir)
    if not _has_learned(run_dir, known):
        check_donors(learned_from)
    if known is not None:
        dtype = known.seen.parts[known.seen.denoisers[0]].dtype
    return look_at(pipe, example_inputs=example_inputs, device=place, dtype=dtype)


def _known(run_dir: str | Path) -> RunSettings | None:
    """Return the settings of the run that is there, if there is one."""
    return Run.open(run_dir).settings if os.path.isfile(Path(run_dir) / MANIFEST) else None


def _has_learned(run_dir: str | Path, known: RunSettings | None) -> bool:
    """Tell whether the run that is there keeps what others taught it: these may be gone."""
    return known is not None and known.learned is not None and os.path.isfile(Path(run_dir) / LEARNED_FILE)


def start_run(
    subject: Subject,
    run_dir: str | Path,
    *,
    target_bits: float | None = None, target_bytes: int | None = None, target_pipeline_bytes: int | None = None,
    trials: int = FULL_TRIALS, seed: int = 0,
    options: Sequence[Scheme] = DEFAULT_OPTIONS,
    protocol: Protocol | None = None,
    effort: Effort = FULL,
    dtype: str | None = None,
    embeddings: Scheme | None = TABLE_SCHEME,
    fidelity: str | None = None,
    learned_from: Sequence[str | Path] = (),
) -> tuple[Run, Subject]:  # fmt: skip
    """Start (or go on with) a run of a subject; one that lies nowhere is kept in the run directory.

    See `search` for the arguments and errors.
    """
    known = _known(run_dir)
    if embeddings == TABLE_SCHEME and known is not None:  # the default: a run keeps its own
        embeddings = known.table_scheme
    told = learn_from(learned_from, options) if learned_from and not _has_learned(run_dir, known) else None
    learned = told["digest"] if told is not None else None if known is None else known.learned
    settings = make_settings(
        subject,
        target_bits=target_bits,
        target_bytes=target_bytes,
        target_pipeline_bytes=target_pipeline_bytes,
        trials=trials,
        seed=seed,
        options=options,
        protocol=protocol,
        effort=effort,
        dtype=dtype,
        embeddings=embeddings,
        learned=learned,
        fidelity=fidelity or (None if known is None else known.fidelity),
    )
    run = Run.create(run_dir, settled(run_dir, settings), keep_dtype=subject.dtype_is_free and dtype is None)
    if told is not None:
        write_json(run.path(LEARNED_FILE), told)
    return run, keep_snapshot(run, subject)


def find_recipe(run: Run, engine: Engine, subject: Subject) -> Recipe:
    """Run every stage of the search that has no record of the same inputs yet."""
    describe(run, subject)
    bank = build_bank(run, subject, batch_size=engine.batch_size)
    space = measure_space(run, engine, subject, bank)
    run = settle(run, engine, space)
    run_trials(run, engine, space)
    fitted = fit_surrogates(run, space, *load_labels(run, space))
    recipe = choose(run, engine, space, explain(run, fitted), fitted["graph"])
    explain_choice(run, space, fitted)
    return recipe
