"""What one worker does: measure a configuration on a draw, measure the sensitivity of one layer."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from quantdm.activations import set_activation_bits_
from quantdm.bank.pointed import pointed
from quantdm.bank.weight_bank import WeightBank
from quantdm.correction import apply_correction, load_correction
from quantdm.denoisers.calls import Call, replay
from quantdm.denoisers.ensemble import join_weights
from quantdm.errors import counted, told
from quantdm.files import digest
from quantdm.metrics import load_extractor, relative_error
from quantdm.metrics.chosen import chosen_figures
from quantdm.metrics.influence import frechet_influence
from quantdm.metrics.samples import Draw, Samples, compare, compare_real, draw_samples
from quantdm.pipelines.generate import count_calls, generate
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.subject import Subject
from quantdm.pipelines.tried import check_called
from quantdm.recipe import ORIGINAL, ActivationSpec, check_layers, split_name
from quantdm.runs.other_weights import OtherWeights, Tables
from quantdm.runs.propagated import Pass, propagated
from quantdm.runs.proposals import Proposal, answer
from quantdm.runs.run import Run
from quantdm.runs.tuned import TunedWeights
from quantdm.schemes import QuantConfig, Scheme
from quantdm.surrogates import SearchSpace

NOISE_CALLS = 4  # timesteps of the one-layer noise error: from the middle, the extreme ones rank worse


@dataclass(frozen=True)
class Job:
    """One measurement: a configuration (None: full precision), activations and correction, on one draw.

    `embeddings` is the scheme of the embedding tables (None: they stay as they are), or table -> scheme, where not all
    have the same. `parts` are the schemes of parts of the pipeline that are no denoisers (None: they stay as they are).
    """

    draw: Draw
    labels: dict[str, str | None] | None = None
    activations: dict[str, Any] | None = None
    correction: str | None = None
    tuned: str | None = None
    embeddings: str | dict[str, str] | None = None
    parts: dict[str, str] | None = None

    @property
    def key(self) -> str:
        """Everything that determines the figures, except the run's own settings."""
        late = ("tuned", "embeddings", "parts")  # which older records do not have
        # Field by field: `asdict` copies every label, which takes three times as long as reading the whole record.
        own = {field.name: getattr(self, field.name) for field in fields(self)} | {"draw": asdict(self.draw)}
        return digest({key: value for key, value in own.items() if key not in late or value is not None})

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Job":
        """Build a job from the record that `dataclasses.asdict` makes of it."""
        return cls(**{**record, "draw": Draw(**record["draw"])})

    @property
    def description(self) -> str:
        """What is measured, in words, for errors."""
        if self.labels is None:
            weights = "full precision"
        else:
            labels = sorted({str(label or ORIGINAL) for label in self.labels.values()})
            mix = f"{labels[0]} everywhere" if len(labels) == 1 else f"a mix of {', '.join(labels)}"
            weights = f"{mix} over {counted(len(self.labels), 'layer')} (configuration {digest(self.labels)})"
        spec = None if self.activations is None else ActivationSpec.model_validate(self.activations)
        activations = "" if spec is None else f", {spec.description}"
        tuned = "" if self.tuned is None else ", tuned"
        if self.embeddings is not None:
            tables = self.embeddings if isinstance(self.embeddings, str) else "each by a rule of its own"
            tuned += f", embedding tables {tables}"
        tuned += "".join(f", {part} {label}" for part, label in (self.parts or {}).items())
        return weights + tuned + activations + ("" if self.correction is None else ", corrected sampler")


@dataclass(frozen=True)
class Probe:
    """One layer and the labels of the schemes whose sensitivity is asked for."""

    layer: str
    options: tuple[str, ...]


def job_of(run: Run, draw: Draw, labels: dict[str, str | None]) -> Job:
    """Return the measurement of a configuration of a run; its embedding tables are as the run was asked for."""
    return Job(draw, labels, embeddings=run.settings.embeddings)


class Evaluator:
    """A pipeline with its bank: turns jobs into figures, in this process."""

    def __init__(self, run: Run, subject: Subject, *, batch_size: int | Literal["auto"] = "auto") -> None:
        self.run = run
        self.batch_size: int | Literal["auto"] = batch_size
        self.subject = subject
        self.protocol = run.settings.protocol
        self.extractor = load_extractor(self.protocol.features)
        self._calls: dict[str, list[Call]] | None = None
        self._references: dict[Draw, Samples] = {}
        self.bank = WeightBank.open(run.path("bank"), subject.layers, run.settings.bank_schemes)

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        """The pipeline in the dtype in which images are generated."""
        return self.subject.in_dtype(self.run.settings.torch_dtype)

    @cached_property
    def tables(self) -> Tables:
        """The embedding tables of the pipeline."""
        return Tables(self.subject)

    @cached_property
    def others(self) -> OtherWeights:
        """The weights of the parts that are no denoisers."""
        return OtherWeights(self.subject.pipe)

    # ------------------------------------------------------------------------------------------------------ images

    def measure(self, job: Job) -> dict[str, Any]:
        """Return the figures of one job; full-precision samples of a draw are made once and kept on disk."""
        return self._measured(job)[0]

    def measure_paired(self, job: Job) -> dict[str, Any]:
        """Return the figures of one job, and what every image adds to fid_fp: "influence", one number per image."""
        figures, samples, reference = self._measured(job)
        return {**figures, "influence": _influence(samples, reference)}

    def measure_final(self, job: Job) -> dict[str, Any]:
        """Return what `measure_paired` does, and the metrics that the protocol asks for by name."""
        figures, samples, reference = self._measured(job)
        chosen = chosen_figures(samples, reference, self.protocol)
        return {**figures, **chosen, "influence": _influence(samples, reference)}

    def _measured(self, job: Job) -> tuple[dict[str, Any], Samples, Samples]:
        reference = self.reference(job.draw)
        samples = reference if job == Job(job.draw) else self.samples(job)
        figures = {**compare(samples, reference), **compare_real(samples, self.protocol)}
        return {**figures, "seconds": round(samples.seconds, 3)}, samples, reference

    def reference(self, draw: Draw) -> Samples:
        """Return the full-precision samples of a draw."""
        if draw not in self._references:
            path = self.run.path("reference") / f"{digest(asdict(draw))}.safetensors"
            if path.is_file():
                self._references[draw] = Samples.load(path)
            else:
                self._references[draw] = self.samples(Job(draw))
                self._references[draw].save(path)
        return self._references[draw]

    def prepare(self, draw: Draw) -> None:
        """Make the full-precision samples of a draw, so that all workers find them on disk."""
        self.reference(draw)

    def samples(self, job: Job) -> Samples:
        """Generate the samples of one job."""
        whole = job.labels is None and job.parts is None
        with configured(self.pipe, self.bank, job, self.tables), self.others.applied(self.pipe, job.parts):
            return draw_samples(
                self.pipe, self.protocol, self.extractor, job.draw, batch_size=self.batch_size, what=job.description,
                may_be_constant=not whole,  # it is compared with the reference, which may not
            )  # fmt: skip

    def propose(self, proposal: Proposal) -> dict[str, Any]:
        """Return which configurations are worth measuring next: fitting surrogates is a job like any other."""
        return answer(proposal, SearchSpace.load(self.run.path("space.json")))

    # ----------------------------------------------------------------------------------------------- sensitivities

    def sensitivity(self, probe: Probe) -> list[float]:
        """Return, per option, the relative teacher-forced error of the output when only the probe's layer is quantized.

        The inputs are those of the full-precision trajectory at NOISE_CALLS timesteps, so nothing accumulates. The
        pipeline computes in the dtype it was opened in: float32 unless it was given otherwise; bfloat16 rounding would
        hide the small errors.
        """
        layer_name = probe.layer
        part = self.subject.part_of(layer_name)
        denoiser, calls = self.subject.denoisers[part], self.recorded_calls()[part]
        errors = []
        for scheme in map(Scheme.parse, probe.options):
            with self.bank.applied(self.subject.weights, {layer_name: scheme}):
                outputs = replay(denoiser, calls)
            with told(f"sensitivity of {layer_name} under {scheme}"):
                pairs = zip(outputs, calls, strict=True)
                errors.append(sum(relative_error(out, call.output) for out, call in pairs) / len(calls))
        return errors

    def propagate(self, asked: Pass) -> dict[str, Any]:
        """Return estimates of the same errors, of all layers at once; see `propagated`."""
        return propagated(self.subject, self.bank, self.recorded_calls(), asked)

    def noise_error(self, job: Job) -> dict[str, float]:
        """Return the same error with the whole configuration of a job: the cheapest label, tens of times cheaper."""
        assert job.labels is not None
        errors, recorded = [], self.recorded_calls()  # of the full-precision pipeline: before its weights are others
        with self.bank.applied(self.subject.weights, QuantConfig.from_labels(job.labels)):
            for part, calls in recorded.items():
                outputs = replay(self.subject.denoisers[part], calls)
                errors += [float(relative_error(out, call.output)) for out, call in zip(outputs, calls, strict=True)]
        return {"noise_error": sum(errors) / len(errors)}

    def input_sensitivity(self, layer_name: str, labels: Sequence[str]) -> list[float]:
        """Return, per activation scheme, the same error when only this layer's input is quantized."""
        part = self.subject.part_of(layer_name)
        denoiser, calls = self.subject.denoisers[part], self.recorded_calls()[part]
        own = split_name(layer_name, self.subject.part_names)[1]
        errors = []
        try:
            for label in labels:
                set_activation_bits_(denoiser, ActivationSpec(layers={own: label}))
                pairs = zip(replay(denoiser, calls), calls, strict=True)
                errors.append(sum(relative_error(out, call.output) for out, call in pairs) / len(calls))
        finally:
            set_activation_bits_(denoiser, None)
        return errors

    def recorded_calls(self) -> dict[str, list[Call]]:
        """Return NOISE_CALLS calls of every denoiser, from the middle of its own."""
        if self._calls is None:
            settings, subject = self.run.settings, self.subject
            steps = settings.noise_steps or settings.label_steps
            draw = Draw(settings.seed * 1000 + 1, settings.noise_images, steps)
            with subject.recording(subject.pipe, dict.fromkeys(subject.part_names, ())) as seen:
                generate(subject.pipe, self.protocol, draw.seeds[:1], steps=draw.steps)
            calls = count_calls(subject.pipe, self.protocol, len(draw.seeds), batch_size=self.batch_size)
            wanted = {
                part: [call * recording.seen + i for call in range(calls) for i in _middle(recording.seen)]
                for part, recording in seen.items()
            }
            with subject.recording(subject.pipe, wanted) as recorded:
                generate(subject.pipe, self.protocol, draw.seeds, steps=draw.steps, batch_size=self.batch_size)
            self._calls = {part: recording.calls for part, recording in recorded.items()}
            check_called(self._calls, draw.steps)
        return self._calls


def _influence(samples: Samples, reference: Samples) -> list[float]:
    own, other = frechet_influence(samples.features, reference.features)
    return [float(f"{value:.6g}") for value in (own + other).tolist()]


def _middle(count: int) -> list[int]:
    """Return which of `count` calls are looked at: NOISE_CALLS evenly from the inside, each once."""
    return sorted({min(round((i + 1) * count / (NOISE_CALLS + 1)), count - 1) for i in range(NOISE_CALLS)} - {-1})


@contextmanager
def configured(pipe: DiffusionPipeline, bank: WeightBank, job: Job, tables: Tables) -> Iterator[None]:
    """Give a full-precision pipeline a job's weights, activations and correction while the context is open.

    Raises:
        QuantDMError: the configuration does not name exactly the layers of the denoisers.
    """
    denoisers = find_denoisers(pipe)
    with ExitStack() as stack:
        if job.labels is not None:
            config = QuantConfig.from_labels(job.labels)
            check_layers(config, bank.layers, what="configuration")  # a layer left out would be measured unquantized
            if job.tuned is None:
                stack.enter_context(bank.applied(join_weights(denoisers), config))
            else:
                tuned = TunedWeights.load(job.tuned)
                tuned.check(job.labels)
                whole = join_weights(denoisers)
                stack.enter_context(tuned.applied(whole, room=bank.room_beside(whole)))
        if job.labels is not None and job.embeddings is not None:
            point = stack.enter_context(pointed(join_weights(denoisers)))
            for name, table in tables.of(job.embeddings).items():
                point(f"{name}.weight", lambda dtype, device, t=table: t.dequantize(dtype=dtype).to(device))
        if job.activations is not None:
            for denoiser in denoisers.values():
                set_activation_bits_(denoiser, ActivationSpec.model_validate(job.activations))
                stack.callback(set_activation_bits_, denoiser, None)
        if job.correction is not None:
            scheduler = pipe.scheduler
            apply_correction(pipe, load_correction(Path(job.correction)))
            stack.callback(setattr, pipe, "scheduler", scheduler)
        yield
