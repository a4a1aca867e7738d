"""The whole way of any pipeline: it walks in, a smaller one with a report walks out."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

from quantdm.activations import usual_activations
from quantdm.correction.schedulers import is_served
from quantdm.corridor.export import export_run
from quantdm.corridor.levels import Level, level_of
from quantdm.corridor.plan import NO_ACCELERATOR, Plan, plan_run
from quantdm.corridor.table import show_table
from quantdm.errors import QuantDMError, check_kind, counted
from quantdm.files import check_replaceable
from quantdm.hub.inspection import left_in
from quantdm.hub.replace import check_export_path
from quantdm.hub.size import ExportSize, denoiser_bytes, weight_bytes
from quantdm.machine import best_device
from quantdm.metrics.door import check_measures
from quantdm.metrics.sampled import first_made
from quantdm.pipelines.loading import DiffusionPipeline, model_name
from quantdm.pipelines.planning import example_call
from quantdm.pipelines.protocol import Protocol, default_protocol
from quantdm.pipelines.subject import Subject
from quantdm.recipe import Recipe
from quantdm.report import write_report
from quantdm.report.insight_files import save_insights
from quantdm.report.page import REPORT_FILE
from quantdm.runs import final
from quantdm.runs.cheap import told
from quantdm.runs.choose import choose
from quantdm.runs.correct import correct_run
from quantdm.runs.engines.choice import check_engine, open_engine
from quantdm.runs.engines.local import Engine
from quantdm.runs.engines.means import look_at_means
from quantdm.runs.explain import explain, fit_surrogates
from quantdm.runs.failure import told_why
from quantdm.runs.run import Run, RunSettings
from quantdm.runs.search import look_for_run, start_run
from quantdm.runs.settings import check_given, make_settings
from quantdm.runs.shares import settle
from quantdm.runs.split import told_split
from quantdm.runs.stages import build_bank, describe, measure_space
from quantdm.runs.summary import write_summary
from quantdm.runs.target import check_one_target
from quantdm.runs.trials import cheap_verdict, load_labels, run_trials
from quantdm.runs.tune import tune_run
from quantdm.runs.why import explain_choice
from quantdm.schemes import TABLE_SCHEME, Scheme
from quantdm.surrogates import SearchSpace

ACTIVATION_BITS = 6
Say = Callable[[str], object]


def run(
    pipe: DiffusionPipeline | str | Path,
    *,
    target_bits: float | None = None, target_bytes: int | None = None, target_pipeline_bytes: int | None = None,
    run_dir: str | Path | None = None, effort: str = "normal", trials: int | None = None,
    options: Sequence[Scheme] | None = None, protocol: Protocol | None = None,
    seed: int = 0, workers: int | None = None, tuned: bool = True,
    example_inputs: Mapping[str, Any] | None = None, embeddings: Scheme | None = TABLE_SCHEME,
    batch_size: int | Literal["auto"] = "auto", device: str | None = None, dtype: str | None = None,
    minutes: float | None = None, gpu_hours: float | None = None, dry_run: bool = False,
    engine: str = "local", ray_address: str | None = None, fidelity: str | None = None,
    learned_from: Sequence[str | Path] = (),
    say: Say = print,
) -> dict[str, Any]:  # fmt: skip
    """Make a pipeline small: search, tune, correct, measure, export and report; return the summary.

    The run directory ends with recipe.yaml, export/, summary.json and report.html; running it again goes on where it
    stopped.

    Args:
        pipe: the full-precision pipeline, or its name (embedded, directory, hub id), as in `search`.
        target_bits: average bits per quantizable weight, codebooks and scales included.
        target_bytes: or the size of the denoiser on disk.
        target_pipeline_bytes: or that of all parts on disk, as in `search`.
        run_dir: where every stage leaves its record (None: runs/NAME-SIZE).
        effort: "quick", "normal" or "thorough": how much is measured and trained.
        trials: configurations whose images are measured (None: as the effort has it).
        options: the schemes that every layer may take (None: as the effort has it).
        protocol, seed, workers, example_inputs, embeddings, batch_size, device, dtype, engine, ray_address, fidelity,
            learned_from: as in `search`.
        minutes: trials end in time for the other stages to fit, as far as can be told before (None: all trials).
        gpu_hours: the same for the sum over all accelerators that work (one of both).
        dry_run: say what every stage would take of time, memory and disk, by estimate, and return that; nothing is
            measured but a few images, nothing is written.
        tuned: whether the recipe is tuned; what does not help on every draw is not kept anyway.
        say: is told what happens.

    Raises:
        QuantDMError: as `search`; an unknown effort; places of the results that hold something else.
    """
    start, level = time.monotonic(), _level(effort, trials, options, protocol, dtype, fidelity)
    check_one_target(target_bits, target_bytes, target_pipeline_bytes)
    _check_means(engine, ray_address, minutes, gpu_hours, device or device_of(pipe))
    folder = run_dir or default_folder(pipe, target_bits, target_bytes, effort, target_pipeline_bytes)
    subject = _look(pipe, folder, example_inputs, device, dtype, learned_from, protocol, say)
    given: dict[str, Any] = {
        "target_bits": target_bits, "target_bytes": target_bytes, "target_pipeline_bytes": target_pipeline_bytes,
        "trials": level.trials, "seed": seed, "dtype": dtype, "options": options or level.options,
        "protocol": protocol, "effort": level.effort, "embeddings": embeddings, "fidelity": fidelity,
    }  # fmt: skip
    settings = make_settings(subject, **given)
    check_measures(subject.pipe, settings.protocol, images=level.final_images)
    how, most = _How(workers=workers, batch_size=batch_size, ray_address=ray_address), None
    if dry_run or minutes or gpu_hours:
        plan = _planned(subject, settings, level, engine, how, say, tuned=tuned)
        most = plan.within(start, minutes, gpu_hours, say)
        if dry_run:
            return plan.said(say, most)
    started, subject = start_run(subject, folder, **given, learned_from=learned_from)
    with told_why(started.folder):
        _begin(started, subject, say)
        with open_engine(started, subject, engine, **how) as opened:
            summary = _Way(started, opened, level, say, most).walk(tuned=tuned)
        return _hand_over(started, subject, summary, say, tuned=tuned, start=start)


class _How(TypedDict):
    """In how many processes, with how many images at once, and where."""

    workers: int | None
    batch_size: int | Literal["auto"]
    ray_address: str | None


def _planned(
    subject: Subject, settings: RunSettings, level: Level, engine: str, how: _How, say: Say, *, tuned: bool
) -> Plan:
    means = look_at_means(subject, settings, engine, **how, say=say)
    return plan_run(subject, settings, level, means, tuned=tuned, batch_size=how["batch_size"])


def _level(
    effort: str, trials: int | None, options: Sequence[Scheme] | None, protocol: Protocol | None, dtype: str | None,
    fidelity: str | None,
) -> Level:  # fmt: skip
    """Return the level of an effort; what can be refused before anything is opened is refused."""
    check_kind(effort, str, "effort", 'give "quick", "normal" or "thorough"; quantdm.search takes an Effort')
    level = level_of(effort, trials=trials)
    check_given(level.trials, options or level.options, protocol, dtype, fidelity)
    return level


def _look(
    pipe: DiffusionPipeline | str | Path,
    folder: str | Path,
    example_inputs: Mapping[str, Any] | None,
    device: str | None,
    dtype: str | None,
    learned_from: Sequence[str | Path],
    protocol: Protocol | None,
    say: Say,
) -> Subject:
    say(f"[1/10] look at {pipe if isinstance(pipe, (str, Path)) else type(pipe).__name__}")
    subject = look_for_run(
        pipe, folder, example_inputs=example_inputs, device=device, dtype=dtype, learned_from=learned_from
    )
    made = first_made(subject.pipe, protocol or default_protocol(subject.name))
    say(f"       try its call: {made}, one step")
    return subject


def _begin(started: Run, subject: Subject, say: Say) -> None:
    """Check, before anything is computed, that results have a place, and say what is made small."""
    check_places(started)
    layers, weights = counted(len(subject.layers), "layer"), sum(layer.num_weights for layer in subject.layers)
    say(f"       {layers}, {weights:,} quantizable weights; run directory {started.folder}")


def _check_means(
    engine: str, ray_address: str | None, minutes: float | None, gpu_hours: float | None, device: str
) -> None:
    check_engine(engine, ray_address)
    if minutes is not None and gpu_hours is not None:
        raise QuantDMError("budget: got minutes and gpu_hours; give one of them")
    if gpu_hours is not None and engine == "local" and device == "cpu":
        raise QuantDMError(NO_ACCELERATOR)


def device_of(pipe: DiffusionPipeline | str | Path) -> str:
    """Return the kind of device of a live pipeline, or that where one is put that is named."""
    return best_device() if isinstance(pipe, (str, Path)) else pipe.device.type


def default_folder(
    pipe: DiffusionPipeline | str | Path, target_bits: float | None, target_bytes: int | None, effort: str,
    target_pipeline_bytes: int | None = None,
) -> Path:  # fmt: skip
    """Return where a run lies if nobody says: runs/NAME-SIZE, with the effort if it is not the normal one."""
    name = str(pipe) if isinstance(pipe, (str, Path)) else model_name(pipe)
    whole = f"{target_pipeline_bytes}bytes-in-all" if target_bytes is None else f"{target_bytes}bytes"
    size = whole if target_bits is None else f"{target_bits:g}bit"
    return Path("runs") / f"{Path(name or 'pipeline').name}-{size}{'' if effort == 'normal' else '-' + effort}"


def check_places(run: Run) -> None:
    """Check, before anything is computed, that the last stages may write what they make."""
    check_export_path(run.path("export"), run.location, apart_from=run.folder)
    check_replaceable(run.path(REPORT_FILE))


@dataclass(frozen=True)
class _Way:
    """The stages between a started run and its result."""

    run: Run
    engine: Engine
    level: Level
    say: Say
    most: Callable[[int], int] | None = None

    def walk(self, *, tuned: bool) -> dict[str, Any]:
        """Search and measure; return the summary."""
        space = self.prepare()
        way = replace(self, run=self.shared(space))
        return way.measure(space, way.search(space), tuned=tuned)

    def prepare(self) -> SearchSpace:
        """Quantize and measure single layers."""
        run, engine, say, subject = self.run, self.engine, self.say, self.engine.subject
        say(f"[2/10] quantize every layer with {counted(len(run.settings.options), 'option')}")
        describe(run, subject)
        bank = build_bank(run, subject, batch_size=engine.batch_size)
        say("[3/10] how sensitive is each layer?")
        return measure_space(run, engine, subject, bank)

    def shared(self, space: SearchSpace) -> Run:
        """Return the run with what other parts leave for the denoisers, if its target is that of the whole pipeline."""
        run = settle(self.run, self.engine, space)
        for line in told_split(run):
            self.say(f"       {line}")
        return run

    def search(self, space: SearchSpace) -> Recipe:
        """Find the recipe, stage by stage."""
        run, engine, say = self.run, self.engine, self.say
        say(f"[4/10] measure {run.settings.trials} sampled configurations (processes: {engine.workers})")
        run_trials(run, engine, space, most=self.most)
        if (cheap := cheap_verdict(run)) is not None:
            say(f"       {told(cheap)}")
        say("[5/10] learn image quality from configurations, and explain it")
        fitted = fit_surrogates(run, space, *load_labels(run, space))
        attributions = explain(run, fitted)
        say("[6/10] choose and verify")
        recipe = choose(run, engine, space, attributions, fitted["graph"])
        explain_choice(run, space, fitted)
        say(f"       recipe: {recipe.avg_bits:.3f} bits per weight ({recipe.provenance.source})")
        return recipe

    def measure(self, space: SearchSpace, recipe: Recipe, *, tuned: bool) -> dict[str, Any]:
        """Tune, add activations and the correction, and measure everything on noises that the search never saw."""
        run, engine, level, say = self.run, self.engine, self.level, self.say
        subject = engine.subject
        say("[7/10] tune tables, scales, biases and norms" if tuned else "[7/10] tune: not asked for")
        weights = tune_run(run, engine, recipe, level.tune, images=level.tune_images) if tuned else None
        if tuned and weights is None:
            say("       it does not help on every draw and is left out")
        spec = usual_activations(subject.denoiser, ACTIVATION_BITS)
        correction = None
        if is_served(subject.pipe.scheduler):
            say("[8/10] 6-bit activations and the sampler's correction")
            correction = str(correct_run(run, engine, recipe, spec, images=level.correction_images, tuned=weights))
        else:
            say(f"[8/10] 6-bit activations; {type(subject.pipe.scheduler).__name__} is not corrected")
        say("[9/10] measure the result on noises that the search never saw")
        draws = final.final_draws(run, images=level.final_images)
        jobs = final.final_jobs(run, space, recipe, spec, correction, None if weights is None else str(weights))
        size = ExportSize(subject.pipe, embeddings=run.settings.embeddings)
        rows = final.measure_rows(run, engine, space, jobs, draws, size, against="recipe")
        final.save_grids(run, engine, jobs, draws[0])
        example = example_call(subject.pipe, run.settings.protocol)
        return write_summary(run, rows, draws, final.sampling_noise(engine, draws), example)


def _hand_over(
    run: Run, subject: Subject, summary: dict[str, Any], say: Say, *, tuned: bool, start: float
) -> dict[str, Any]:
    """Export, report, print the result rows; return the summary."""
    say("[10/10] export and report")
    export = export_run(run, run.path("export"), tuned=tuned, say=say)
    report = write_report(run.folder)
    save_insights(run.folder)
    show_table(summary)
    left = left_in(export)
    if left is not None:
        say(f"         {left}")
    whole, target = "", run.settings.target_pipeline_bytes
    if target is not None:
        whole = f", all parts {weight_bytes(export) / 1e6:.2f} of {target / 1e6:.2f} MB"
    say(f"export:  {export}  (denoiser {denoiser_bytes(export, subject.pipe) / 1e6:.2f} MB{whole} on disk)")
    say(f"report:  {report}")
    say(f"done in {(time.monotonic() - start) / 60:.1f} minutes")
    return summary
