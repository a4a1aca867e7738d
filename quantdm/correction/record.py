"""The correction: what is known of a model's quantization noise per timestep, and how much of it is undone."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from quantdm.errors import QuantDMError
from quantdm.files import load_tensors, save_tensors
from quantdm.recipe import ActivationSpec, Recipe, weights_digest

CORRECTION_VERSION, KIND = 1, "correction"
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# From nothing to everything; the order in which a fit adds them.
VARIANTS = ("none", "bias", "k", "both", "both+variance")
MIN_K = -0.5
_ARRAYS = ("timesteps", "log_snr", "k", "bias", "shift", "q")


def load_correction(path: str | Path) -> "Correction":
    """Read a correction written by `Correction.save`.

    Raises:
        QuantDMError: no such file, damaged, not a correction or of another version.
    """
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != KIND or metadata.get("version") != CORRECTION_VERSION:
        raise QuantDMError(
            f"{path}: got {metadata.get('kind', 'other tensors')} version {metadata.get('version')}, expected a "
            f"correction of version {CORRECTION_VERSION}; write it again with `fit_correction`"
        )
    if missing := [name for name in _ARRAYS if name not in tensors]:
        raise QuantDMError(f"{path}: the correction lacks {', '.join(missing)}; write it again with `fit_correction`")
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    return Correction(
        **{name: arrays[name] for name in _ARRAYS},
        variant=metadata["variant"],
        prediction_type=metadata["prediction_type"],
        model=metadata["model"],
        diagnostics={n.removeprefix("diagnostics."): a for n, a in arrays.items() if n.startswith("diagnostics.")},
        measured=metadata["measured"],
        weights=metadata.get("weights", ""),  # files of quantdm 0.1 do not say it
        activations=_activations(path, metadata.get("activations")),
    )


def is_correction(path: str | Path) -> bool:
    """Tell whether a file is a correction written by `Correction.save`."""
    try:
        return load_tensors(path)[1].get("kind") == KIND
    except QuantDMError:
        return False


@dataclass(frozen=True)
class StepCorrection:
    """The correction of one step: e = (e_quantized - bias) / (1 + k); q is the std that remains, in network units."""

    k: float
    bias: np.ndarray
    q: float


@dataclass(frozen=True, eq=False)
class Correction:
    """Noise statistics over log-SNR, and the variant that is on.

    The noise model is e_quantized = (1 + k) e + bias + noise, in the network's own output space, after guidance.

    Args:
        timesteps: training timesteps at which it was fitted, int64 [T].
        log_snr: log(alpha_bar / (1 - alpha_bar)) there, float64 [T], strictly increasing.
        k: slope of the quantization error on the output, [T], > -0.5; 0 where not significant.
        bias: mean error per channel beside k, [T, C].
        shift: mean error per channel when k is not used, [T, C].
        q: standard deviation of the rest of the error, [T].
        variant: one of `VARIANTS`; "both+variance" also lowers the sampler's noise by what the rest adds.
        prediction_type: what the network predicts.
        model: name of the model it belongs to.
        diagnostics: per timestep, [T] each: r2, k_se, q_robust, lag1, count.
        measured: variant -> distances to full precision, one per held-out run (lower is better).
        weights: `weights_digest` of the schemes that it was fitted for ("": not known).
        activations: the activation quantization that it was fitted for (None: none, if `weights` is known).
    """

    timesteps: np.ndarray
    log_snr: np.ndarray
    k: np.ndarray
    bias: np.ndarray
    shift: np.ndarray
    q: np.ndarray
    variant: str = "both+variance"
    prediction_type: str = "epsilon"
    model: str = ""
    diagnostics: dict[str, np.ndarray] = field(default_factory=dict)
    measured: dict[str, list[float]] = field(default_factory=dict)
    weights: str = ""
    activations: ActivationSpec | None = None

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise QuantDMError(f"correction: got variant {self.variant!r}, expected one of {', '.join(VARIANTS)}")
        if self.prediction_type not in PREDICTION_TYPES:
            raise QuantDMError(
                f"correction: got prediction type {self.prediction_type!r}, expected {', '.join(PREDICTION_TYPES)}"
            )
        for name in _ARRAYS:
            dtype = np.int64 if name == "timesteps" else np.float64
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=dtype))
        num = len(self.timesteps)
        shapes = {name: getattr(self, name).shape for name in _ARRAYS}
        right = all(shapes[name] == (num,) for name in ("timesteps", "log_snr", "k", "q"))
        right = (
            right and len(shapes["bias"]) == 2 and shapes["bias"][0] == num > 0 and shapes["shift"] == shapes["bias"]
        )
        if not right:
            raise QuantDMError(f"correction: got shapes {shapes}, expected [T] and, for bias and shift, [T, C]")
        if not all(np.isfinite(getattr(self, name)).all() for name in _ARRAYS):
            raise QuantDMError("correction: got NaN or infinity; the outputs it was fitted on were not finite")
        if (self.k <= MIN_K).any() or (self.q < 0).any() or (np.diff(self.log_snr) <= 0).any():
            raise QuantDMError("correction: expected k > -0.5, q >= 0 and a strictly increasing log_snr")

    @property
    def channels(self) -> int:
        """Channels of the network's output that it corrects."""
        return self.bias.shape[1]

    @property
    def uses_variance(self) -> bool:
        """Whether the sampler's own noise is lowered too."""
        return self.variant == "both+variance"

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

    def at(self, log_snr: float) -> StepCorrection:
        """Return what the variant undoes at a log-SNR: linear between the fitted ones, constant beyond them."""
        use_k = self.variant in ("k", "both", "both+variance")
        k = _interpolate(log_snr, self.log_snr, self.k[:, None])[0] if use_k else 0.0
        if self.variant in ("both", "both+variance"):
            bias = _interpolate(log_snr, self.log_snr, self.bias)
        elif self.variant == "bias":
            bias = _interpolate(log_snr, self.log_snr, self.shift)
        else:
            bias = np.zeros(self.channels)
        q = _interpolate(log_snr, self.log_snr, self.q[:, None])[0] if self.uses_variance else 0.0
        return StepCorrection(k=float(k), bias=bias, q=float(q))

    def diagnostics_at(self, log_snr: float) -> dict[str, float]:
        """Return the diagnostics interpolated to a log-SNR."""
        return {n: float(np.interp(log_snr, self.log_snr, a)) for n, a in self.diagnostics.items()}

    def save(self, path: str | Path) -> Path:
        """Write the correction as safetensors, atomically; it replaces nothing but another correction."""
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        arrays |= {f"diagnostics.{name}": np.asarray(a, dtype=np.float64) for name, a in self.diagnostics.items()}
        metadata = {"kind": KIND, "version": CORRECTION_VERSION, "measured": self.measured, **self._labels()}
        if self.weights:
            spec = self.activations
            metadata |= {"weights": self.weights, "activations": None if spec is None else spec.model_dump(mode="json")}
        save_tensors(path, {n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in arrays.items()}, metadata)
        return Path(path)

    def to_dict(self) -> dict[str, Any]:
        """Return what sampling needs (no diagnostics) as JSON values that give the same numbers back."""
        arrays = {name: getattr(self, name).tolist() for name in _ARRAYS}
        return {"version": CORRECTION_VERSION, **self._labels(), **arrays}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "Correction":
        """Return the correction of a record written by `to_dict`.

        Raises:
            QuantDMError: another version, or a key is missing.
        """
        keys = (*_ARRAYS, "variant", "prediction_type", "model")
        if record.get("version") != CORRECTION_VERSION or not all(key in record for key in keys):
            raise QuantDMError(
                f"correction in a scheduler: got version {record.get('version')} with keys {', '.join(record)}; "
                f"expected version {CORRECTION_VERSION} with {', '.join(keys)}"
            )
        return cls(**{key: record[key] for key in keys})

    def _labels(self) -> dict[str, str]:
        return {"variant": self.variant, "prediction_type": self.prediction_type, "model": self.model}


def _activations(path: str | Path, record: Any) -> ActivationSpec | None:
    try:
        return None if record is None else ActivationSpec.model_validate(record)
    except ValidationError as error:
        raise QuantDMError(f"{path}: activations: {error.errors()[0]['msg']}; fit it again") from None


def _described(spec: ActivationSpec | None) -> str:
    if spec is None:
        return "activations that are not quantized"
    return spec.description


def _interpolate(x: float, grid: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.array([np.interp(x, grid, column) for column in values.T])
