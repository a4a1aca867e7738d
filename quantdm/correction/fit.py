"""Fit a correction on some trajectories, run freely on others, keep the variant that measurably helps."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from quantdm.correction.collect import Network, Run, collect_, network, network_digest
from quantdm.correction.levels import prediction_of
from quantdm.correction.record import FINER, NOISIER, Correction, load_correction
from quantdm.correction.schedulers import apply_correction, check_corrects, remove_correction
from quantdm.correction.statistics import NoiseStatistics
from quantdm.correction.variance import MAX_LOG_SNR
from quantdm.correction.variants import VARIANTS, variant_of
from quantdm.errors import QuantDMError
from quantdm.files import read_json, write_json
from quantdm.progress import bar
from quantdm.recipe import Recipe

CONFIDENCE = 0.95
GLANCE = 2  # runs after which a variant that has not lowered the distance on each is given up

FIT_VERSION = 1
END = 2 * MAX_LOG_SNR  # beyond all levels


def fit_correction(
    pipe: DiffusionPipeline,
    quantized: Network,
    *,
    fit_runs: Sequence[Run],
    test_runs: Sequence[Run] = (),
    distance: Callable[[torch.Tensor, torch.Tensor], float] | None = None,
    variant: str | None = None,
    variants: Sequence[str] = VARIANTS,
    explained_from: Network | None = None,
    eta: float = 0.0,
    model: str = "",
    recipe: Recipe | None = None,
    resume: Path | None = None,
) -> Correction:
    """Fit the correction of a quantized denoiser and choose its variant by measurement.

    Args:
        pipe: the full-precision pipeline, with a scheduler that is served; it is left as it was.
        quantized: the quantized denoiser, or a function whose context makes the pipeline's own quantized.
        fit_runs: batches of trajectories for the statistics, 64 to 128 in all; each is generated twice.
        test_runs: other batches on which the variants run freely, at least 2, better 4 or more.
        distance: distance(images, full-precision images), lower is better: fid_fp, or a paired error.
        variant: use this one and measure nothing.
        variants: those that are tried, in this order; see `choose_variant`.
        explained_from: the network against which k, bias and q are fitted, if not full precision: the same weights
            without activation quantization leave only activation noise to explain.
        eta: DDIM's eta, for pipelines that pass none.
        model: name of the model, kept in the record.
        recipe: the exact recipe that `quantized` has, kept in the record: an export takes no correction without it.
        resume: a file in which the measured distances are kept, the statistics beside it, so that an interrupted fit
            with the same arguments goes on. Its name says for what; nothing in it is checked against the networks.

    Raises:
        QuantDMError: no runs, runs that do not repeat themselves, no scheduler or one that is not served.
    """
    check_corrects(pipe)
    _check_runs(fit_runs, test_runs, distance, variant)
    kept = None if resume is None else resume.with_suffix(".safetensors")
    if kept is not None and kept.is_file():
        correction = load_correction(kept)
    else:
        correction = _fit(pipe, quantized, fit_runs, explained_from, eta, model).fitted_for(recipe)
        if kept is not None:
            correction.save(kept)
    if variant is not None:
        return correction.with_variant(variant)
    assert distance is not None
    measure = _measuring(pipe, quantized, test_runs, distance, eta, resume)
    with bar(len(variants), "correction: what helps?") as shown:
        return choose_variant(measure, correction, variants=variants, resume=resume, progress=shown.update)


def _check_runs(fit_runs: Sequence[Run], test_runs: Sequence[Run], distance: object, variant: str | None) -> None:
    if not fit_runs or (variant is None and (len(test_runs) < 2 or distance is None)):
        raise QuantDMError(
            f"fit_correction: got {len(fit_runs)} fit_runs, {len(test_runs)} test_runs and distance {distance}; "
            "expected fit_runs, and to choose a variant at least 2 test_runs and a distance; or name the variant"
        )


def _measuring(
    pipe: DiffusionPipeline,
    quantized: Network,
    runs: Sequence[Run],
    distance: Callable[[torch.Tensor, torch.Tensor], float],
    eta: float,
    resume: Path | None,
) -> Callable[[Correction | None], list[float]]:
    """Return what measures a correction on held-out runs, as `choose_variant` asks for it."""
    with sampling(pipe, None, eta=eta):
        references = [run(pipe) for run in runs]
    without: list[float] = []
    if resume is not None and resume.is_file():
        without = read_json(resume, version=FIT_VERSION)["measured"].get("none", [])

    def measure(candidate: Correction | None) -> list[float]:
        with network(pipe, quantized), sampling(pipe, candidate, eta=eta):
            distances = (distance(run(pipe), ref) for run, ref in zip(runs, references, strict=True))
            if candidate is not None:
                return glanced(distances, without)
            without[:] = distances
            return list(without)

    return measure


def glanced(distances: Iterator[float], without: Sequence[float]) -> list[float]:
    """Return a variant's distances: all of them, or the first GLANCE of one that is not better than none on each."""
    found = []
    for value in distances:
        found.append(value)
        if len(found) == GLANCE and any(a >= b for a, b in zip(found, without, strict=False)):
            break
    return found


def _fit(
    pipe: DiffusionPipeline,
    quantized: Network,
    runs: Sequence[Run],
    explained_from: Network | None,
    eta: float,
    model: str,
) -> Correction:
    statistics, axis = NoiseStatistics(), 1
    with sampling(pipe, None, eta=eta), bar(len(runs), "correction: statistics") as shown:
        for run in runs:
            axis = collect_(statistics, pipe, run, quantized, explained_from=explained_from)
            shown.update()
        predicts = prediction_of(pipe.scheduler)
    return statistics.correction(prediction_type=predicts, model=model, axis=axis, network=network_digest(pipe))


def choose_variant(
    measure: Callable[[Correction | None], list[float]],
    correction: Correction,
    *,
    variants: Sequence[str] = VARIANTS,
    resume: Path | None = None,
    progress: Callable[[], object] = lambda: None,
) -> Correction:
    """Return the correction with the variant that lowers the distance to full precision beyond noise, else "none".

    From nothing to everything, a variant replaces the best so far when the paired differences of its distances have a
    mean below zero at 95 % (one-sided t test over runs). Variants that cannot differ (no significant k) or have no
    table are left out.
    The best one is then tried on the noisier and on the finer half of the levels alone, and kept to one of them if
    that is lower still beyond noise.

    Args:
        measure: distances to full precision on held-out runs, in the same order every time; None: no correction. Only
            the first GLANCE of a variant that is given up.
        correction: the fitted statistics.
        variants: those to try.
        resume: a file in which measured distances are kept.
        progress: called when one has been measured.

    Raises:
        QuantDMError: fewer than two distances, or one that is not finite.
    """
    hopeless = {"k", "both"} if not correction.k.any() else set()
    bare = {name for name in variants if variant_of(name).table and f"{name}.q" not in correction.rivals}
    tried = [name for name in variants if name != "none" and name not in hopeless | bare]
    measured: dict[str, list[float]] = {}
    if resume is not None and resume.is_file():
        measured = read_json(resume, version=FIT_VERSION)["measured"]

    def distances(name: str, candidate: Correction | None) -> list[float]:
        if name not in measured:
            measured[name] = _checked(measure(candidate), len(measured["none"]) if measured else None)
            if resume is not None:
                write_json(resume, {"version": FIT_VERSION, "measured": measured})
        progress()
        return measured[name]

    distances("none", None)
    best = correction.with_variant("none")
    name = "none"
    for variant in tried:
        candidate = correction.with_variant(variant)
        if _is_lower(distances(variant, candidate), measured[name]):
            best, name = candidate, variant
    if name != "none" and len(correction.log_snr) > 1:
        middle = float(np.median(correction.log_snr))
        for half, within in ((NOISIER, (-END, middle)), (FINER, (middle, END))):
            candidate = replace(correction.with_variant(best.variant), within=within)
            if _is_lower(distances(f"{best.variant}, {half}", candidate), measured[name]):
                best, name = candidate, f"{best.variant}, {half}"
    return replace(best, measured=measured)


@contextmanager
def sampling(pipe: DiffusionPipeline, correction: Correction | None, *, eta: float = 0.0) -> Iterator[None]:
    """Sample with this correction (None: plainly) and default eta while the context is open."""
    own = pipe.scheduler
    try:
        remove_correction(pipe)
        apply_correction(pipe, correction, eta=eta)
        yield
    finally:
        pipe.scheduler = own


def _checked(distances: Sequence[float], count: int | None = None) -> list[float]:
    values = [float(d) for d in distances]
    if (
        len(values) < 2
        or (count is not None and len(values) not in (GLANCE, count))
        or not all(map(math.isfinite, values))
    ):
        raise QuantDMError(f"choose_variant: got distances {values}, expected the same number each time, >= 2, finite")
    return values


def _is_lower(distances: Sequence[float], reference: Sequence[float]) -> bool:
    from scipy.stats import t as student  # heavy, and only needed here

    if len(distances) != len(reference):  # given up
        return False
    gain = np.subtract(reference, distances)
    error = gain.std(ddof=1) / math.sqrt(len(gain))
    return bool(gain.mean() > student.ppf(CONFIDENCE, len(gain) - 1) * error and gain.mean() > 0)
