"""Tuning: what is stored beside the codes, and biases and norms, trained against the full-precision denoiser."""

from quantdm.tuning.train import Tuned, TuneSettings, tune

__all__ = ["TuneSettings", "Tuned", "tune"]
