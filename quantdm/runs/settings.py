"""What a search is asked for: effort, target, and the settings that determine every number of a run."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from quantdm.errors import QuantDMError, check_kind, nearest
from quantdm.hub.export import lossless_dtype
from quantdm.machine import fast_dtype
from quantdm.metrics.door import check_measures, check_named
from quantdm.modules import packed_layers
from quantdm.pipelines.loading import DiffusionPipeline
from quantdm.pipelines.parts import find_denoisers
from quantdm.pipelines.protocol import Protocol, default_protocol
from quantdm.pipelines.subject import Subject
from quantdm.pipelines.tried import fewest_steps
from quantdm.quantizers.branches import fits_rank
from quantdm.quantizers.options import SWEEPS
from quantdm.runs.room import room_of
from quantdm.runs.run import MIN_TRIALS, RunSettings
from quantdm.runs.target import checked_target
from quantdm.schemes import DEFAULT_OPTIONS, ORIGINAL, TABLE_SCHEME, Scheme

_log = logging.getLogger("quantdm")

DTYPES = ("bfloat16", "float16", "float32")
FIDELITIES = ("full", "auto")
FULL_TRIALS, QUICK_TRIALS = 160, MIN_TRIALS


@dataclass(frozen=True)
class Effort:
    """How much is measured in a search.

    `label_images` at `label_steps` per trial, `verify_images` at `verify_steps` (None: those of the protocol) on up to
    `verify_draws` draws for each of the best candidates, `noise_images` along `noise_steps` (None: `label_steps`) for
    the one-layer noise errors. These come from backward passes, averaged over `noise_signs` random signs (None: every
    option of every layer is measured, tens to hundreds of times as long). Calibrated options see the inputs of
    `calibration_images` trajectories of the protocol's steps and are refined in up to `sweeps` rounds.
    """

    label_images: int = 64
    label_steps: int = 4
    verify_images: int = 150
    noise_images: int = 16
    calibration_images: int = 64
    sweeps: int = SWEEPS
    verify_draws: int = 3
    noise_steps: int | None = 8
    noise_signs: int | None = 512
    verify_steps: int | None = None

    def __post_init__(self) -> None:
        least = {"label_images": 2, "label_steps": 1, "verify_images": 2, "noise_images": 1}
        least |= {"calibration_images": 1, "sweeps": 0, "verify_draws": 1}
        least |= {name: 1 for name in ("noise_steps", "noise_signs", "verify_steps") if getattr(self, name) is not None}
        for name, number in least.items():
            if getattr(self, name) < number:
                raise QuantDMError(f"effort: {name}: got {getattr(self, name)}, expected {number} or more")


FULL, QUICK = Effort(), Effort(48, 4, 240, 2, 8, 1, 1, noise_steps=None, noise_signs=128, verify_steps=4)


def make_settings(
    subject: Subject,
    *,
    target_bits: float | None, target_bytes: int | None, target_pipeline_bytes: int | None = None,
    trials: int, seed: int,
    options: Sequence[Scheme] = DEFAULT_OPTIONS,
    protocol: Protocol | None = None,
    effort: Effort = FULL,
    dtype: str | None = None,
    embeddings: Scheme | None = TABLE_SCHEME,
    learned: str | None = None,
    fidelity: str | None = None,
) -> RunSettings:  # fmt: skip
    """Return the checked settings of a search; see `search` for the arguments and errors.

    The pipeline's call is tried: it costs one step of one image, and what it refuses is known before anything is left.
    """
    options = fitting_options(options, subject.pipe)
    check_given(trials, options, protocol, dtype, fidelity)
    _check_can_be_quantized(subject, options)
    own = _free_dtype(subject) if subject.dtype_is_free else str(subject.dtype).removeprefix("torch.")
    embeddings = _table_scheme(subject, embeddings)
    if target_pipeline_bytes is not None:  # what it leaves is settled once the parts are measured
        target_bytes = room_of(subject, options, embeddings, target_pipeline_bytes).for_denoisers
    target = checked_target(
        subject.layers, options, subject.pipe, target_bits=target_bits, target_bytes=target_bytes, embeddings=embeddings
    )
    asked, effort = _tried(subject, protocol or default_protocol(subject.name), effort)
    return RunSettings(
        model=subject.name,
        location=subject.location or "",
        seen=subject.seen,
        options=tuple(scheme.label for scheme in options),
        target_bits=target,
        trials=trials, seed=seed,
        protocol=asked,
        dtype=dtype or own,  # type: ignore[arg-type]
        embeddings=None if embeddings is None else embeddings.label,
        learned=learned,
        target_pipeline_bytes=target_pipeline_bytes,
        fidelity=fidelity or "full",  # type: ignore[arg-type]
        calibration_steps=asked.steps,
        **asdict(effort),
    )  # fmt: skip


def _tried(subject: Subject, protocol: Protocol, effort: Effort) -> tuple[Protocol, Effort]:
    """Return what is measured, checked and tried, and the effort with as many steps as it takes at least."""
    check_measures(subject.pipe, protocol)
    asked = {name: getattr(effort, name) for name in ("label_steps", "noise_steps", "verify_steps")}
    steps = {name: fewest_steps(subject.pipe, protocol, n) for name, n in asked.items() if n is not None}
    return protocol, replace(effort, **steps)


def _free_dtype(subject: Subject) -> str:
    """Return the dtype in which images are generated where nobody says.

    Without a VAE the images are the denoiser's own output, and such pipelines (DDPM) hand it to numpy as it is, which
    knows no bfloat16.
    """
    networks = {name for name, part in subject.seen.parts.items() if part.dtype is not None}
    return "float32" if networks == set(subject.part_names) else fast_dtype()


def _check_can_be_quantized(subject: Subject, options: Sequence[Scheme]) -> None:
    """Check that nothing is quantized yet, and that every layer can take an option."""
    packed = [part for part, module in subject.denoisers.items() if packed_layers(module)]
    if packed:
        raise QuantDMError(f"{subject.name}: its {packed[0]} is quantized already; give the full-precision pipeline")
    for layer in subject.layers:
        if not any(fits_rank(layer.shape, scheme) for scheme in options):
            raise QuantDMError(
                f"options: got {', '.join(map(str, options[:3]))}, none of which fits {layer.name} "
                f"{tuple(layer.shape)}: their branches have a higher rank; add a scheme without -lowrank, or of a "
                "smaller rank"
            )


def check_given(
    trials: int, options: Sequence[Scheme], protocol: Protocol | None, dtype: str | None, fidelity: str | None = None
) -> None:
    """Check what can be checked before a pipeline is opened.

    Raises:
        QuantDMError: an unknown fidelity, too few trials for these options, an unknown number format, or features or
            metrics that are not there.
    """
    if protocol is not None:
        check_named(protocol)
    if fidelity is not None and fidelity not in FIDELITIES:
        raise QuantDMError(f"fidelity: got {fidelity!r}; {nearest(fidelity, FIDELITIES)}")
    for scheme in [options] if isinstance(options, str) else options:
        check_kind(scheme, Scheme, "options", "give a list of schemes, each by quantdm.Scheme.parse(label)")
    if all(scheme == ORIGINAL for scheme in options):
        raise QuantDMError("options: none of them quantizes; expected a scheme, such as kmeans-channel-4-feedback")
    least = max(MIN_TRIALS, 3 * sum(scheme != ORIGINAL for scheme in options) // 2)
    if trials < least:
        raise QuantDMError(f"trials: got {trials}, expected at least {least}: the surrogates learn nothing from fewer")
    check_dtype(dtype)


def check_dtype(dtype: str | None) -> None:
    """Check that images can be generated in a dtype (None: nobody says).

    Raises:
        QuantDMError: they cannot.
    """
    if dtype not in (None, *DTYPES):
        raise QuantDMError(f"dtype: got {dtype!r}; {nearest(str(dtype), DTYPES)}")


def _table_scheme(subject: Subject, embeddings: Scheme | None) -> Scheme | None:
    if embeddings is not None and embeddings.calibration is not None:
        raise QuantDMError(f"embeddings: got {embeddings}, expected one without calibration: tables have no inputs")
    return embeddings if subject.tables else None


def fitting_options(options: Sequence[Scheme], pipe: DiffusionPipeline) -> tuple[Scheme, ...]:
    """Return the options without `original` where 16 bits do not hold the denoisers' weights: there it would be 32."""
    wide = [name for name, part in find_denoisers(pipe).items() if lossless_dtype(part).itemsize > 2]
    if wide and ORIGINAL in options:
        _log.info("%s: stored in more than 16 bits, every layer is quantized", ", ".join(wide))
        return tuple(scheme for scheme in options if scheme != ORIGINAL)
    return tuple(options)
