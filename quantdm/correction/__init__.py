"""Quantization-noise correction while sampling: noise statistics, the record, corrected schedulers, the fit."""

from quantdm.correction.ddim import CorrectedDDIMScheduler
from quantdm.correction.ddpm import CorrectedDDPMScheduler
from quantdm.correction.fit import choose_variant, collect_, fit_correction
from quantdm.correction.record import VARIANTS, Correction, load_correction
from quantdm.correction.schedulers import apply_correction, remove_correction
from quantdm.correction.statistics import NoiseStatistics, statistics_from_pairs
from quantdm.correction.steps import step_table

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
