"""What one worker does: measure a configuration on a draw, measure the sensitivity of one layer."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quantdm.activations import set_activation_bits_
from quantdm.correction import apply_correction, load_correction
from quantdm.denoisers.calls import Call, record_calls, replay
from quantdm.denoisers.inventory import list_layers
from quantdm.errors import told
from quantdm.files import digest
from quantdm.metrics import load_extractor, relative_error
from quantdm.metrics.samples import Draw, Samples, compare, compare_real, draw_samples
from quantdm.pipelines.generate import generate
from quantdm.pipelines.loading import DiffusionPipeline, load_pipeline
from quantdm.pipelines.parts import get_denoiser
from quantdm.recipe import ORIGINAL, ActivationSpec, check_layers
from quantdm.runs.bank import WeightBank
from quantdm.runs.run import Run
from quantdm.schemes import QuantConfig

NOISE_CALLS = 4  # timesteps of the one-layer noise error: from the middle, the extreme ones rank worse


@dataclass(frozen=True)
class Job:
    """One measurement: a configuration (None: full precision), activations and correction, on one draw."""

    draw: Draw
    labels: dict[str, str | None] | None = None
    activations: dict[str, Any] | None = None
    correction: str | None = None

    @property
    def key(self) -> str:
        """Everything that determines the figures, except the run's own settings."""
        return digest(asdict(self))

    @property
    def description(self) -> str:
        """What is measured, in words, for errors."""
        if self.labels is None:
            weights = "full precision"
        else:
            labels = sorted({str(label or ORIGINAL) for label in self.labels.values()})
            mix = f"{labels[0]} everywhere" if len(labels) == 1 else f"a mix of {', '.join(labels)}"
            weights = f"{mix} over {len(self.labels)} layers (configuration {digest(self.labels)})"
        activations = "" if self.activations is None else f", {self.activations['bits']}-bit activations"
        return weights + activations + ("" if self.correction is None else ", corrected sampler")


class Evaluator:
    """A loaded pipeline with its bank: turns jobs into figures, in this process."""

    def __init__(self, run: Run, pipe: DiffusionPipeline | None = None) -> None:
        self.run = run
        self.protocol = run.settings.protocol
        self.extractor = load_extractor(self.protocol.features)
        self._pipes: dict[torch.dtype, DiffusionPipeline] = {}
        self._given = pipe
        self._calls: list[Call] | None = None
        self._references: dict[Draw, Samples] = {}
        layers = list_layers(get_denoiser(self.pipe(run.settings.torch_dtype)))
        self.bank = WeightBank.open(run.path("bank"), layers, run.settings.schemes)

    def pipe(self, dtype: torch.dtype) -> DiffusionPipeline:
        """Return the pipeline in that dtype; a live pipeline that has no source is used in its own."""
        if self._given is not None:
            return self._given
        if dtype not in self._pipes:
            self._pipes[dtype] = load_pipeline(self.run.settings.model, torch_dtype=dtype)
        return self._pipes[dtype]

    # ------------------------------------------------------------------------------------------------------ images

    def measure(self, job: Job) -> dict[str, Any]:
        """Return the figures of one job; full-precision samples of a draw are made once and kept on disk."""
        reference = self.reference(job.draw)
        samples = reference if job == Job(job.draw) else self.samples(job)
        figures = {**compare(samples, reference), **compare_real(samples, self.protocol)}
        return {**figures, "seconds": round(samples.seconds, 3)}

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
        pipe = self.pipe(self.run.settings.torch_dtype)
        with configured(pipe, self.bank, job):
            return draw_samples(
                pipe,
                self.protocol,
                self.extractor,
                job.draw,
                what=job.description,
                may_be_constant=job.labels is not None,  # it is compared with the reference, which may not
            )

    # ----------------------------------------------------------------------------------------------- sensitivities

    def sensitivity(self, layer_name: str) -> list[float]:
        """Return, per option, the relative teacher-forced error of the output when only this layer is quantized.

        The inputs are those of the full-precision trajectory at NOISE_CALLS timesteps, so nothing accumulates. float32:
        bfloat16 rounding would hide the small errors.
        """
        denoiser = get_denoiser(self.pipe(torch.float32))
        calls = self._recorded()
        errors = []
        for scheme in self.run.settings.schemes:
            with self.bank.applied(denoiser, {layer_name: scheme}):
                outputs = replay(denoiser, calls)
            with told(f"sensitivity of {layer_name} under {scheme}"):
                pairs = zip(outputs, calls, strict=True)
                errors.append(sum(relative_error(out, call.output) for out, call in pairs) / len(calls))
        return errors

    def _recorded(self) -> list[Call]:
        if self._calls is None:
            settings = self.run.settings
            pipe = self.pipe(torch.float32)
            draw = Draw(settings.seed * 1000 + 1, settings.noise_images, settings.label_steps)
            wanted = [round((i + 1) * draw.steps / (NOISE_CALLS + 1)) for i in range(NOISE_CALLS)]
            with record_calls(get_denoiser(pipe), sorted(set(wanted))) as recording:
                generate(pipe, self.protocol, draw.seeds, steps=draw.steps)
            self._calls = recording.calls
        return self._calls


@contextmanager
def configured(pipe: DiffusionPipeline, bank: WeightBank, job: Job) -> Iterator[nn.Module]:
    """Give a full-precision pipeline a job's weights, activations and correction while the context is open.

    Raises:
        QuantDMError: the configuration does not name exactly the layers of the denoiser.
    """
    denoiser = get_denoiser(pipe)
    with ExitStack() as stack:
        if job.labels is not None:
            config = QuantConfig.from_labels(job.labels)
            check_layers(config, bank.layers, what="configuration")  # a layer left out would be measured unquantized
            stack.enter_context(bank.applied(denoiser, config))
        if job.activations is not None:
            set_activation_bits_(denoiser, ActivationSpec.model_validate(job.activations))
            stack.callback(set_activation_bits_, denoiser, None)
        if job.correction is not None:
            scheduler = pipe.scheduler
            apply_correction(pipe, load_correction(Path(job.correction)))
            stack.callback(setattr, pipe, "scheduler", scheduler)
        yield denoiser
