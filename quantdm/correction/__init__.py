"""Quantization-noise correction while sampling: noise statistics, the record, corrected schedulers, the fit."""

from quantdm.correction.fit import choose_variant, collect_, fit_correction
from quantdm.correction.record import VARIANTS, Correction, load_correction
from quantdm.correction.schedulers import (
    CorrectedDDIMScheduler,
    CorrectedDDPMScheduler,
    apply_correction,
    remove_correction,
    step_table,
)
from quantdm.correction.statistics import NoiseStatistics, statistics_from_pairs

__all__ = [
    "VARIANTS",
    "CorrectedDDIMScheduler",
    "CorrectedDDPMScheduler",
    "Correction",
    "NoiseStatistics",
    "apply_correction",
    "choose_variant",
    "collect_",
    "fit_correction",
    "load_correction",
    "remove_correction",
    "statistics_from_pairs",
    "step_table",
]
