"""The correction: what is known of a model's quantization noise per noise level, and how much of it is undone."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from quantdm.correction.memory import age_at
from quantdm.correction.variants import variant_of
from quantdm.errors import QuantDMError, reason_of
from quantdm.files import load_tensors, save_tensors
from quantdm.recipe import ActivationSpec, Recipe, weights_digest

CORRECTION_VERSION, KIND = 3, "correction"
READABLE = (2, CORRECTION_VERSION)  # 2 takes the errors of different steps for independent
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction", "edm", "consistency", "trigflow")
MIN_K = -0.5
NOISIER, FINER = "noisier half", "finer half"
_ARRAYS = ("log_snr", "k", "bias", "shift", "q")
_LABELS = ("variant", "prediction_type", "model", "axis", "network")
_TABLES = ("gain", "bias", "q")  # of a rival


def load_correction(path: str | Path) -> "Correction":
    """Read a correction written by `Correction.save`.

    Raises:
        QuantDMError: no such file, damaged, not a correction or of another version.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != KIND or metadata.get("version") not in READABLE:
        raise QuantDMError(
            f"{path}: got {metadata.get('kind', 'other tensors')} version {metadata.get('version')}, expected a "
            f"correction of version {CORRECTION_VERSION}; write it again with `fit_correction`"
        )
    if missing := [name for name in _ARRAYS if name not in tensors]:
        raise QuantDMError(f"{path}: the correction lacks {', '.join(missing)}; write it again with `fit_correction`")
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in tensors.items()}
    labels: dict[str, Any] = {name: metadata[name] for name in _LABELS}
    parts: dict[str, Any] = {part: _part(arrays, part) for part in ("diagnostics", "rivals", "components")}
    within = metadata.get("within")
    return Correction(
        **{name: arrays[name] for name in _ARRAYS},
        age=arrays.get("age", np.zeros(0)),
        **labels,
        **parts,
        measured=metadata["measured"],
        within=None if within is None else (within[0], within[1]),
        weights=metadata.get("weights", ""),
        activations=_activations(path, metadata.get("activations")),
    )


def _part(arrays: Mapping[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{part}."): array for name, array in arrays.items() if name.startswith(f"{part}.")}


def is_current(path: str | Path) -> bool:
    """Tell whether a correction file is of a version that is read today; older ones have to be fitted again."""
    try:
        return load_tensors(path)[1].get("version") in READABLE
    except QuantDMError:
        return False


def is_correction(path: str | Path) -> bool:
    """Tell whether a file is a correction written by `Correction.save`."""
    try:
        return load_tensors(path)[1].get("kind") == KIND
    except QuantDMError:
        return False


@dataclass(frozen=True)
class StepCorrection:
    """The correction of one step: e = gain_c (e_quantized - bias_c); q is the std that remains, in network units."""

    gain: np.ndarray
    bias: np.ndarray
    q: float

    @property
    def is_nothing(self) -> bool:
        """Whether the mean stays as it is."""
        return not self.bias.any() and bool((self.gain == 1.0).all())


@dataclass(frozen=True, eq=False)
class Correction:
    """Noise statistics over log-SNR, and the variant that is on.

    The noise model is e_quantized = (1 + k) e + bias + noise, in the network's own output space, after guidance.

    Args:
        log_snr: log(signal^2 / noise^2) at which it was fitted, float64 [T], strictly increasing. Any scheduler and
            number of steps are served from them: linear between the fitted ones, constant beyond them.
        k: slope of the quantization error on the output, [T], > -0.5; 0 where not significant.
        bias: mean error per channel beside k, [T, C].
        shift: mean error per channel when k is not used, [T, C].
        q: standard deviation of the rest of the error, [T].
        variant: one of `variants.ALL`; "both+variance" also lowers the sampler's noise by what the rest adds.
        prediction_type: what the network predicts (see `levels.prediction_of`).
        model: name of the model it belongs to.
        axis: axis of the channels in a sample (1; -1 for tokens, 2 for [N, F, C, H, W]).
        network: hash of the denoiser's class and configuration ("": not known).
        within: log-SNR from and to which it corrects (None: everywhere).
        diagnostics: per level, [T] each: r2, k_se, bias_se, q_se, q_robust, lag1, count, snr.
        measured: variant -> distances to full precision, one per held-out run (lower is better).
        weights: `weights_digest` of the schemes that it was fitted for ("": not known).
        activations: the activation quantization that it was fitted for (None: none, if `weights` is known).
        rivals: "NAME.gain" [T, C], "NAME.bias" [T, C], "NAME.q" [T] of "variance" and the variants of others.
        age: the clock of the noise at every level, [T] (see `memory.ages`); empty: errors of steps are independent.
        components: with guidance, "mean" [T, 4, C], "cov" [T, 4, 4] and "count" [T] of (unconditional output,
            conditional output, error of the one, error of the other); see `for_guidance`.
    """

    log_snr: np.ndarray
    k: np.ndarray
    bias: np.ndarray
    shift: np.ndarray
    q: np.ndarray
    variant: str = "both+variance"
    prediction_type: str = "epsilon"
    model: str = ""
    axis: int = 1
    network: str = ""
    within: tuple[float, float] | None = None
    diagnostics: dict[str, np.ndarray] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)
    weights: str = ""
    activations: ActivationSpec | None = None
    rivals: dict[str, np.ndarray] = field(default_factory=dict)
    components: dict[str, np.ndarray] = field(default_factory=dict)
    age: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        tabled = variant_of(self.variant).table
        if self.prediction_type not in PREDICTION_TYPES:
            raise QuantDMError(
                f"correction: got prediction type {self.prediction_type!r}, expected {', '.join(PREDICTION_TYPES)}"
            )
        for name in (*_ARRAYS, "age"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        num = len(self.log_snr)
        shapes = {name: getattr(self, name).shape for name in _ARRAYS}
        right = all(shapes[name] == (num,) for name in ("log_snr", "k", "q"))
        right = (
            right and len(shapes["bias"]) == 2 and shapes["bias"][0] == num > 0 and shapes["shift"] == shapes["bias"]
        )
        if not right:
            raise QuantDMError(f"correction: got shapes {shapes}, expected [T] and, for bias and shift, [T, C]")
        if len(self.age) and (self.age.shape != (num,) or num < 2 or (np.diff(self.age) < 0).any()):
            raise QuantDMError(f"correction: got ages of shape {self.age.shape}, expected [T], not decreasing, or none")
        if not all(np.isfinite(getattr(self, name)).all() for name in (*_ARRAYS, "age")):
            raise QuantDMError("correction: got NaN or infinity; the outputs it was fitted on were not finite")
        if (self.k <= MIN_K).any() or (self.q < 0).any() or (np.diff(self.log_snr) <= 0).any():
            raise QuantDMError("correction: expected k > -0.5, q >= 0 and a strictly increasing log_snr")
        if tabled and any(f"{self.variant}.{name}" not in self.rivals for name in _TABLES):
            raise QuantDMError(f"correction: has no table of {self.variant!r}; fit it with `fit_correction`")

    @property
    def channels(self) -> int:
        """Channels of the network's output that it corrects."""
        return self.bias.shape[1]

    @property
    def room(self) -> str | None:
        """How steps make room for the noise that remains (`variance.ROOMS`); None: they do not."""
        return variant_of(self.variant).room

    @property
    def choice(self) -> str:
        """The name under which `measured` knows what is in use: the variant, and the half of the levels it acts on."""
        if self.within is None:
            return self.variant
        return f"{self.variant}, {NOISIER if self.within[0] < self.log_snr[0] else FINER}"

    def fitted_for(self, recipe: Recipe | None) -> "Correction":
        """Return it as that of an exact recipe: its weights and activations (None: as it is).

        Raises:
            QuantDMError: the recipe has patterns, types or a default, which only a model can resolve.
        """
        if recipe is None:
            return self
        weights = weights_digest(recipe.config.to_labels())
        return replace(self, weights=weights, activations=recipe.activations)

    def check_belongs(self, labels: Mapping[str, str | None], activations: ActivationSpec | None) -> None:
        """Check that it was fitted for these weights (layer name -> scheme) and activations.

        Raises:
            QuantDMError: it was fitted for others, or does not say for which.
        """
        again = "fit it again with `quantdm correct`, or `fit_correction(..., recipe=...)`"
        if not self.weights:
            raise QuantDMError(f"correction of {self.model!r}: does not say which recipe it was fitted for; {again}")
        if self.weights != weights_digest(labels):
            raise QuantDMError(f"correction of {self.model!r}: was fitted for other weights than the recipe's; {again}")
        if self.activations != activations:
            raise QuantDMError(
                f"correction of {self.model!r}: was fitted for {_described(self.activations)}, the recipe has "
                f"{_described(activations)}; {again}, or export it with its activations (--corrected)"
            )

    def with_variant(self, variant: str) -> "Correction":
        """Return the same statistics with another variant on."""
        return replace(self, variant=variant)

    def is_within(self, log_snr: float) -> bool:
        """Say whether it corrects at this log-SNR."""
        return self.within is None or self.within[0] <= log_snr <= self.within[1]

    def at(self, log_snr: float) -> StepCorrection:
        """Return what the variant undoes at a log-SNR: linear between the fitted ones, constant beyond them."""
        variant, ones = variant_of(self.variant), np.ones(self.channels)
        if not self.is_within(log_snr):
            return StepCorrection(ones, np.zeros(self.channels), 0.0)
        if variant.table:
            gain, bias, q = (self._between(log_snr, self.rivals[f"{self.variant}.{name}"]) for name in _TABLES)
            return StepCorrection(gain, bias, float(q) if variant.room else 0.0)
        k = float(self._between(log_snr, self.k)) if variant.k else 0.0
        mean = (self.bias if variant.k else self.shift) if variant.bias else np.zeros_like(self.bias)
        q = float(self._between(log_snr, self.q)) if variant.room else 0.0
        return StepCorrection(ones / (1.0 + k), self._between(log_snr, mean), q / (1.0 + k))

    def age_at(self, log_snr: float) -> float | None:
        """Return the age at a log-SNR; None: errors of steps are independent."""
        return age_at(self.log_snr, self.age, log_snr) if len(self.age) else None

    def _between(self, log_snr: float, values: np.ndarray) -> np.ndarray:
        """Return values [T, ...] interpolated to a log-SNR."""
        grid = self.log_snr
        after = int(np.searchsorted(grid, log_snr))
        if after == 0 or after == len(grid):
            return values[min(after, len(grid) - 1)]
        share = (log_snr - grid[after - 1]) / (grid[after] - grid[after - 1])
        return values[after - 1] * (1.0 - share) + values[after] * share

    def diagnostics_at(self, log_snr: float) -> dict[str, float]:
        """Return the diagnostics interpolated to a log-SNR."""
        return {n: float(np.interp(log_snr, self.log_snr, a)) for n, a in self.diagnostics.items()}

    def save(self, path: str | Path) -> Path:
        """Write the correction as safetensors, atomically; it replaces nothing but another correction."""
        arrays = {name: getattr(self, name) for name in (*_ARRAYS, "age")}
        for part in ("diagnostics", "rivals", "components"):
            kept = np.float32 if part == "rivals" else np.float64  # below 1 MB with 128 channels, too
            arrays |= {f"{part}.{name}": np.asarray(a, dtype=kept) for name, a in getattr(self, part).items()}
        metadata = {"kind": KIND, "version": CORRECTION_VERSION, "measured": self.measured, **self._labels()}
        if self.weights:
            spec = self.activations
            metadata |= {"weights": self.weights, "activations": None if spec is None else spec.model_dump(mode="json")}
        save_tensors(path, {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in arrays.items()}, metadata)
        return Path(path)

    def to_dict(self) -> dict[str, Any]:
        """Return what sampling needs (no diagnostics) as JSON values that give the same numbers back."""
        arrays = {name: getattr(self, name).tolist() for name in (*_ARRAYS, "age")}
        used = {name: a.tolist() for name, a in self.rivals.items() if name.startswith(f"{self.variant}.")}
        return {"version": CORRECTION_VERSION, **self._labels(), **arrays, "rivals": used}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Correction":
        """Return the correction of a record written by `to_dict`.

        Raises:
            QuantDMError: another version, or a key is missing.
        """
        keys = (*_ARRAYS, "variant", "prediction_type", "model", "axis", "network", "within", "rivals")
        if record.get("version") not in READABLE or not all(key in record for key in keys):
            raise QuantDMError(
                f"correction in a scheduler: got version {record.get('version')} with keys {', '.join(record)}; "
                f"expected version {CORRECTION_VERSION} with {', '.join(keys)}; fit it again, or go on without: "
                "quantdm.remove_correction(pipe)"
            )
        tables = {name: np.asarray(table, dtype=np.float64) for name, table in record["rivals"].items()}
        return cls(**{**{key: record[key] for key in keys}, "rivals": tables}, age=np.asarray(record.get("age", [])))

    def _labels(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*_LABELS, "within")}


def _activations(path: str | Path, record: Any) -> ActivationSpec | None:
    try:
        return None if record is None else ActivationSpec.model_validate(record)
    except ValidationError as error:
        raise QuantDMError(f"{path}: {reason_of(error, 'activations')}; fit it again") from None


def _described(spec: ActivationSpec | None) -> str:
    if spec is None:
        return "activations that are not quantized"
    return f"{spec.bits}-bit activations ({spec.description})"
